"""The decode loop: one token for every row and step, entirely on the device.

A step is embed → layers → logits → sample → write the token and its log-probability → stop test → advance, on the
static tensors of a `DecodeState`. The same function runs eagerly, or as a graph (`step_graphs.py`). The host enqueues
steps ahead of the output it has read, and output is copied to it asynchronously (`output_copies.py`), so the device
never waits for the host. A row that has ended is inactive and costs almost nothing.

Rows may start and stop between steps, while earlier steps are still queued. This is safe without waiting: all changes
of the state and of the page table are enqueued on the stream of the steps. So the steps before a change see the old
state, and those after it the new one. A row that has ended by itself is inactive from that step on: it writes no token,
and appends to no page, in the steps that were queued before the host knew.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from fastllama.guess_control import GuessControl
from fastllama.kernels.batch import SamplingTensors
from fastllama.kernels.decode_state import DecodeState
from fastllama.kernels.graph import Graph
from fastllama.kernels.guesses import MAX_GUESSES
from fastllama.model import Transformer
from fastllama.output_copies import NewestSteps, OutputCopies, StepOutput
from fastllama.row_lengths import RowLengths
from fastllama.speculation import Guesser, advance
from fastllama.step_graphs import PLAIN, Extras, StepGraphs, graph_size

# Replays enqueued ahead of the one whose output the host reads, so that the device has work while the host is busy.
# This number is wasted after the last stop token. It is 0 on a CPU, where enqueueing a step runs it.
REPLAYS_AHEAD = 2


class Decoder:
    """Runs the decode steps of one model on its cache rows 0, 1, …. The caller holds `model.exclusively()`.

    A call is `start`, then `sample_first` with the logits of the prompts' last tokens, then `enqueue_steps` and
    `receive` in turn. Or it is `begin`, then rows start and stop at any time (`state`, `set_lengths`), with
    `enqueue_steps` and `receive_newest` in turn. Receiving waits for the output it returns, and so does the first use
    of a batch size whose graph is not captured. Graphs are captured again after the model's tensors were replaced.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        graphs: bool | None = None,
        dependent: bool | None = None,
        unroll: int = 1,
        new_graph: Callable[[], Graph] | None = None,
        guesser: Guesser | None = None,
        n_guesses: int | None = None,
    ) -> None:
        """Prepare to decode with a model; memory is allocated at the first use.

        graphs: whether to capture steps; None does so if the backend supports it. dependent: False turns
        dependent launches (`kernels/launch/dependent.py`) off; otherwise they are used if the GPU supports them.
        unroll: steps in one replay. new_graph: makes the graphs, in place of CudaGraph. guesser: steps check its
        guesses of the next tokens (`speculation.py`): n_guesses, or as many as pay off if it is None.

        Raises ValueError for an unroll below 1, or above 1 with a guesser, and for graphs=True on a CPU.
        """
        if unroll < 1 or (guesser is not None and unroll > 1):
            wanted = "at least 1 step" if guesser is None else "1 for steps that check guesses"
            raise ValueError(f"unroll must be {wanted}, got {unroll}")
        if graphs and new_graph is None and model.device.type != "cuda":
            raise ValueError(f"CUDA graphs need a GPU, and the model is on {str(model.device)!r}: leave graphs out")
        self.model = model
        self.unroll = unroll
        self.graphs = StepGraphs(model, unroll, graphs, dependent, new_graph, guesser)
        self.guesser = guesser
        # Times differ between the processes that share a model, and they must decide alike.
        cost = 0.0 if guesser is None else guesser.cost
        rows_run = partial(graph_size, max_batch_size=model.cache.max_batch_size)
        self.control = GuessControl(n_guesses, measures=model.group.size == 1, guess_cost=cost, rows_run=rows_run)
        self._revision = -1
        self._state: DecodeState
        self._copies: OutputCopies

    @property
    def replays_ahead(self) -> int:
        """How many replays to enqueue beyond the one that is received next."""
        return REPLAYS_AHEAD if self.model.device.type == "cuda" else 0

    @property
    def dependent(self) -> bool:
        """Whether kernels use dependent launches: allowed, supported here, and not turned off by a failed capture."""
        return self.graphs.uses_dependent_launch

    @property
    def queued(self) -> int:
        """Output copies that have not been received."""
        return self._copies.queued

    @property
    def queued_steps(self) -> int:
        """Their steps."""
        return self._copies.queued_steps

    @property
    def positions_ahead(self) -> int:
        """The most positions after a row's newest token that the next `enqueue_steps` may write."""
        return self.unroll if self.guesser is None else self.control.positions_ahead

    @property
    def state(self) -> DecodeState:
        """The state of all rows. Changes belong into a block of `launch_context`."""
        return self._state

    @torch.inference_mode()
    def capture_graphs(self, batch_sizes: Sequence[int]) -> None:
        """Capture the graphs of these batch sizes before they are first used. Waits for the device."""
        with self.model.exclusively():
            self.graphs.use_current_stream()
            self._allocate_for_model()
            self.capture_sizes(batch_sizes)

    def capture_sizes(self, batch_sizes: Iterable[int]) -> None:
        """Capture the graphs of these batch sizes that are not captured, in a call that has begun."""
        for n_rows in batch_sizes:
            for n_guesses in self._guess_counts(n_rows):
                self.graphs.get(self._state, n_rows, PLAIN, n_guesses)

    @torch.inference_mode()
    def dry_run(self, n_rows: int) -> None:
        """Run an eager step of n_rows inactive rows, which compiles its kernels and changes nothing.

        Raises RuntimeError if it fails. With dependent launches, the message names the option that turns them off.
        """
        with self.model.exclusively():
            self.graphs.use_current_stream()
            self._allocate_for_model()
            self._state.deactivate()
            for n_guesses in self._guess_counts(n_rows):
                self.graphs.dry_run(self._state.first(n_rows), n_guesses)

    def begin(self, is_batch: bool = False) -> None:
        """Begin a call without rows. All its launches go to the stream that is current here.

        is_batch: no other rows follow the first ones.
        """
        self.graphs.use_current_stream()
        self._allocate_for_model()
        with self.launch_context():
            self._state.deactivate()
        self._lengths = RowLengths(self.model.cache.max_batch_size, self.model.cache.max_seq_len)
        self._copies.clear()
        self._selected: tuple[int, bool, Extras] | None = None
        self.control.begin(is_batch)

    def select(self, n_rows: int, greedy: bool = False, extras: Extras = PLAIN) -> None:
        """The steps from now on run the first n_rows. greedy: no row draws."""
        if extras != PLAIN:
            self.add_extras(extras)
        if self._selected == (n_rows, greedy, extras):
            return
        self._rows = self._state.first(n_rows).with_greedy(greedy)
        self._extras = extras
        self._replayed: dict[int, Graph | None] = {0: self.graphs.get(self._state, n_rows, extras)}  # by guesses
        self._selected = n_rows, greedy, extras

    def add_extras(self, extras: Extras) -> None:
        """Allocate the state's memory for these extras, if it is not there."""
        with self.launch_context():
            state = extras.with_memory(self._state)
        if state is not self._state:
            self._state, self._selected = state, None

    def start(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        last: Sequence[int],
        stop_ids: Sequence[int],
        sampling: SamplingTensors,
        prompts: Sequence[Sequence[int]] | None = None,
    ) -> list[int]:
        """Begin a call. Row i has its newest token tokens[i] at positions[i], and generates up to position last[i].

        The rows get pages of the cache for all of it. prompts: their tokens, to begin with pages that are in the cache.
        Returns how many tokens of each prompt are; all others are to be computed (`prefill`).
        """
        self.begin(is_batch=True)
        self.select(len(tokens), sampling.greedy)
        lengths = [max(end, position + 1) for end, position in zip(last, positions, strict=True)]
        n_cached = self.model.cache.assign(lengths, prompts)
        self._state.set(tokens, positions, last, stop_ids, sampling)
        self.set_lengths(dict(enumerate(position + 1 for position in positions)))
        return n_cached

    def set_histories(self, tokens: dict[int, Sequence[int]]) -> None:
        """Tell the device all tokens of these rows, for guesses; without speculation, do nothing."""
        if self._state.guesses is not None:
            with self.launch_context():
                for row, history in tokens.items():
                    self._state.guesses.set_history(row, history)
                    self.control.start_row(row)

    def set_lengths(self, lengths: dict[int, int]) -> None:
        """Tell the decoder how many tokens these rows have, so that eager steps read only their keys."""
        for row, length in lengths.items():
            self._lengths.set(row, length)

    def mark_finished(self, row: int) -> None:
        """Tell the decoder that a row has ended, so that eager steps do not read its keys."""
        self._lengths.end(row)
        self.control.end_row(row)
        if self.guesser is not None:
            self.guesser.end_row()

    def sample_first(self, logits: Tensor) -> None:
        """Enqueue sampling of each row's first token, from the prompts' logits (B, V)."""
        with self.launch_context():
            if self.guesser is None:
                self.model.ops.sample_and_advance(logits, self._rows, self.model.workspace)
            else:
                advance(self.model, self._rows, self.guesser, 0, logits, self._rows.positions + 1)
            self._enqueue_copy(1, 0)

    def enqueue_steps(self) -> int:
        """Enqueue the next `unroll` steps, or one that checks as many guesses as `control` chooses.

        Returns the most tokens that a row gets from it.
        """
        n_rows, n_guesses = self._rows.rows.shape[0], 0
        if self.guesser is not None and self._extras == PLAIN:
            n_guesses = self.control.choose(n_rows)
        if n_guesses not in self._replayed:
            self._replayed[n_guesses] = self.graphs.get(self._state, n_rows, self._extras, n_guesses)
        graph, begin = self._replayed[n_guesses], time.perf_counter()
        with self.launch_context():
            if self.guesser is not None:
                self.guesser.before_step(self._rows, n_guesses, self._lengths.bounds(n_rows))
            if graph is not None:
                graph.replay()
            else:
                for ahead in range(self.unroll):
                    self.graphs.run(self._rows, self._lengths.bounds(n_rows, ahead), self._extras, n_guesses)
            self._enqueue_copy(self.unroll, n_guesses)
        if self.guesser is not None:
            if self.replays_ahead == 0:
                self.control.note_time(n_rows, n_guesses, time.perf_counter() - begin)
            seconds = self.graphs.guess_seconds(self._state, n_rows, self._lengths.bounds(n_rows), n_guesses)
            self.control.stats.guess_seconds += seconds
        return self.unroll + n_guesses

    @contextmanager
    def launch_context(self) -> Iterator[None]:
        """A block whose launches use the call's stream and this decoder's setting of dependent launches."""
        with self.graphs.launch_context():
            yield

    def receive(self) -> list[StepOutput]:
        """Wait for the oldest enqueued output and return it, step by step.

        After a row has ended, its tokens are undefined.
        """
        return self.receive_newest().steps()

    def receive_newest(self) -> NewestSteps:
        """Wait for the oldest enqueued output and return it as the rows' newest steps."""
        newest = self._copies.receive()
        if newest.positions is not None:
            if self.replays_ahead:
                self.control.note_received(newest, time.perf_counter(), is_busy=self.queued > 0)
            if not self.queued:
                self._lengths.correct(newest.positions)
        return newest

    def _guess_counts(self, n_rows: int) -> list[int]:
        """The numbers of guesses that steps of so many rows may check."""
        return self.control.choices(n_rows) if self.guesser else [0]

    def _enqueue_copy(self, n_steps: int, n_guesses: int) -> None:
        n_rows = self._rows.rows.shape[0]
        self._copies.enqueue(self._state, n_rows, self._extras.top_tokens, n_steps, n_guesses)
        self._lengths.grow(n_rows, n_steps + n_guesses)

    def _allocate_for_model(self) -> None:
        """Allocate the state and drop all graphs, if the model's tensors were replaced since the last time."""
        model = self.model
        if self.guesser is not None:
            model.allow_step_sizes(*self.control.step_sizes(model.cache.max_batch_size))
            self.guesser.prepare()
        if self._revision == model.revision:
            return
        # The steps that may be written before a copy is read: those of the copies in flight, and of the next replay.
        n_steps = (REPLAYS_AHEAD + 2) * self.unroll
        if self.guesser is not None:
            n_steps *= MAX_GUESSES + 1
        self._state = DecodeState.of(model.cache.max_batch_size, n_steps, model.vocab_size, model.device)
        if self.guesser is not None:
            self._state = self._state.with_guesses(model.cache.length + 1)
        self._copies = OutputCopies(REPLAYS_AHEAD + 1, model.device)
        self.graphs.clear()
        self._revision = model.revision
