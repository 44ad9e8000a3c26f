"""The decode step, and its graphs: captured once for each batch size, replayed for each token.

All graphs of a model share one memory pool, so only one of them may run at a time. Steps run eagerly where the backend
has no graphs.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch

from fastllama.cuda_graph import CudaGraph
from fastllama.guess_timer import GuessTimer
from fastllama.kernels.batch import RaggedBatch, Segment
from fastllama.kernels.decode_state import DecodeState
from fastllama.kernels.graph import Graph
from fastllama.kernels.launch.options import override_launch_options
from fastllama.kernels.sampling.extras import sample_with_extras
from fastllama.model import Transformer
from fastllama.speculation import Guesser, checked_step, record

logger = logging.getLogger(__name__)

FINE_BATCH_SIZES = (1, 2, 4, 8, 16)  # of graphs; larger sizes are multiples of the last, up to the model's batch size


class Extras(NamedTuple):
    """What a step does beyond drawing each row's token. All cost launches, so they are off unless a row needs them."""

    controls: bool = False  # penalties, biases and so on
    top_tokens: bool = False  # output of the most likely tokens
    masks: bool = False  # only tokens that the rows' grammars allow
    scores: bool = False  # log-probabilities of the model in rows with masks, too

    def with_memory(self, state: DecodeState) -> DecodeState:
        """The state with memory for them. What it has stays where it is."""
        if (self.controls or self.top_tokens) and state.controls is None:
            state = state.with_extras()
        return state.with_masks() if self.masks and state.masks is None else state


PLAIN = Extras()


def step(model: Transformer, state: DecodeState, lengths: Sequence[int] | None = None, extras: Extras = PLAIN) -> None:
    """Run the model on every row's newest token and sample the next.

    lengths: each row's tokens, the newest included, so that a backend reads only these cache positions. None: only the
    device knows the lengths.
    """
    keys = lengths or [model.cache.max_seq_len] * state.rows.shape[0]
    batch = RaggedBatch(
        tokens=state.tokens,
        positions=state.positions,
        rows=state.rows,
        segments=tuple(Segment(row, row, row + 1, length) for row, length in enumerate(keys)),
        exact=lengths is not None,
        workspace=model.workspace,
    )
    logits = model.logits(model.hidden(batch), batch)
    if extras == PLAIN:
        model.ops.sample_and_advance(logits, state, model.workspace)
    else:
        sample_with_extras(
            model.ops,
            logits,
            state,
            model.workspace,
            controls=state.controls if extras.controls else None,
            top=state.top if extras.top_tokens else None,
            masks=state.masks if extras.masks else None,
            scores=extras.scores,
        )


def speculative_step(
    model: Transformer,
    state: DecodeState,
    guesser: Guesser,
    n_guesses: int,
    lengths: Sequence[int] | None = None,
    extras: Extras = PLAIN,
) -> None:
    """`step` that checks n_guesses of every row, and guesses again. With extras it is a single step."""
    if extras == PLAIN:
        checked_step(model, state, guesser, n_guesses, lengths)
        return
    was_running = state.positions >= 0
    step(model, state, lengths, extras)
    record(state, was_running)
    guesser.guess(state, n_guesses, lengths)


class StepGraphs:
    """The graphs of one model's decode steps on one state, each of `unroll` steps."""

    def __init__(
        self,
        model: Transformer,
        unroll: int,
        graphs: bool | None,
        dependent: bool | None,
        new_graph: Callable[[], Graph] | None,
        guesser: Guesser | None,
    ) -> None:
        """The arguments are those of `Decoder`."""
        self.model, self.unroll, self.guesser = model, unroll, guesser
        self.use_graphs, self.dependent, self._new_graph = graphs, dependent, new_graph
        self.captured: dict[tuple[int, Extras, int, bool], Graph] = {}  # by the arguments of `_capture`
        self.call_stream: torch.cuda.Stream | None = None
        self.timer = GuessTimer(model.device)

    @property
    def captured_sizes(self) -> list[int]:
        """The batch sizes of all graphs that are captured."""
        return sorted({size for size, *_ in self.captured})

    def clear(self) -> None:
        """Drop all graphs: the model's tensors were replaced."""
        self.captured = {}
        self._new_capture_memory()

    def run(
        self, state: DecodeState, lengths: Sequence[int] | None = None, extras: Extras = PLAIN, n_guesses: int = 0
    ) -> None:
        """A step without a graph. The arguments are those of `step` and `speculative_step`."""
        if self.guesser is None:
            step(self.model, state, lengths, extras)
        else:
            speculative_step(self.model, state, self.guesser, n_guesses, lengths, extras)

    def get(
        self, state: DecodeState, n_rows: int, extras: Extras, n_guesses: int = 0, only_guess: bool = False
    ) -> Graph | None:
        """The graph for a batch of n_rows and n_guesses, captured at its first use; None where steps run eagerly.

        only_guess: of the step's end alone, which guesses. Capturing leaves all rows of the state as they are if they
        are inactive.
        """
        if self._factory(extras) is None:
            return None
        key = graph_size(n_rows, self.model.cache.max_batch_size), extras, n_guesses, only_guess
        if key not in self.captured:
            self.captured[key] = self._capture(state, *key)
        return self.captured[key]

    def guess_seconds(self, state: DecodeState, n_rows: int, lengths: Sequence[int], n_guesses: int) -> float:
        """The time for guessing at the end of the step before, which is measured from time to time."""
        guesser = self.guesser
        if guesser is None or (guesser.cost and n_guesses == 0):
            return 0.0

        count = n_guesses if guesser.cost else 1  # lookup guesses once, however many are checked

        def guess_again() -> Callable[[], None]:
            graph = self.get(state, n_rows, PLAIN, n_guesses if guesser.cost else 0, only_guess=True)
            return graph.replay if graph is not None else lambda: guesser.guess(state.first(n_rows), n_guesses, lengths)

        with self.launch_context():
            self.timer.after_step(count, guess_again)
        return count * self.timer.seconds

    def dry_run(self, state: DecodeState, n_guesses: int) -> None:
        """Run an eager step of inactive rows. Raises RuntimeError as `Decoder.dry_run`."""
        try:
            with self.launch_context():
                self.run(state, n_guesses=n_guesses)
                if self.guesser is not None:
                    self.guesser.dry_run(state)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not self.uses_dependent_launch:
                raise
            hint = "if dependent launches are the cause, dependent_launch=False turns them off"
            raise RuntimeError(f"a decode step of {len(state.rows)} rows failed ({error}): {hint}") from error

    def use_current_stream(self) -> None:
        """Make the current stream the call's. The previous call's steps may still run on another stream."""
        if self.model.device.type != "cuda":
            return
        before, now = self.call_stream, torch.cuda.current_stream(self.model.device)
        if before is not None and before != now:
            now.wait_stream(before)
            self.model.workspace.reset()  # those steps have written to it since `exclusively` reset it
        self.call_stream = now

    @contextmanager
    def launch_context(self) -> Iterator[None]:
        """A block whose launches use the call's stream and this decoder's setting of dependent launches."""
        with ExitStack() as stack:
            if self.call_stream is not None:
                stack.enter_context(torch.cuda.stream(self.call_stream))
            if self.dependent is False:
                stack.enter_context(override_launch_options(dependent=False, prefetch=False))
            yield

    @property
    def uses_dependent_launch(self) -> bool:
        """Whether kernels use dependent launches: allowed, supported here, and not turned off by a failed capture."""
        with self.launch_context():
            return bool(self.model.ops.uses_dependent_launch())

    def _factory(self, extras: Extras) -> Callable[[], Graph] | None:
        """What makes the graphs; None where steps run eagerly."""
        model = self.model
        if self.use_graphs is False:
            return None
        if self._new_graph is not None:
            return self._new_graph
        if self.use_graphs or model.ops.supports_cuda_graphs(model.device):
            return lambda: CudaGraph(self._stream, self._pool)
        # A backend's own graphs do not record collectives, nor the operations of torch that extras use.
        factory: Callable[[], Graph] | None = model.ops.graph_factory(model.device)
        return factory if model.group.size == 1 and extras == PLAIN else None

    def _capture(self, state: DecodeState, n_rows: int, extras: Extras, n_guesses: int, only_guess: bool) -> Graph:
        """Capture a graph of `unroll` steps; if it fails with dependent launches, turn them off and try again."""
        rows, guesser = state.first(n_rows), self.guesser

        def steps() -> None:
            if only_guess and guesser is not None:
                guesser.guess(rows, n_guesses, None)
                return
            for _ in range(self.unroll):
                self.run(rows, extras=extras, n_guesses=n_guesses)

        with self.launch_context():
            kept = [state.positions] + ([state.guesses.tokens, state.guesses.matched] if state.guesses else [])
            values = [tensor.clone() for tensor in kept]
            state.deactivate()  # so that the eager run, which compiles kernels, changes nothing else
        try:
            return self._capture_steps(steps, extras)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not self.uses_dependent_launch:
                raise
            logger.warning(
                "a graph with dependent launches could not be captured (%s): this model runs without them from now on, "
                "as with dependent_launch=False",
                error,
            )
            self.dependent = False
            self._new_capture_memory()
            return self._capture_steps(steps, extras)
        finally:
            with self.launch_context():
                for tensor, value in zip(kept, values, strict=True):
                    tensor.copy_(value)

    def _capture_steps(self, steps: Callable[[], None], extras: Extras) -> Graph:
        factory = self._factory(extras)
        assert factory is not None
        graph = factory()
        with self.launch_context():
            steps()
            graph.capture(steps)
        return graph

    def _new_capture_memory(self) -> None:
        """Create the stream to capture on and the memory pool of all graphs."""
        if self.model.device.type == "cuda":
            self._stream, self._pool = torch.cuda.Stream(self.model.device), torch.cuda.graph_pool_handle()


def graph_sizes(max_batch_size: int) -> list[int]:
    """The numbers of rows of all graphs that batches of up to max_batch_size need."""
    return sorted({graph_size(n_rows, max_batch_size) for n_rows in range(1, max_batch_size + 1)})


def graph_size(n_rows: int, max_batch_size: int) -> int:
    """The number of rows of the graph for a batch of n_rows; its other rows are inactive."""
    fine = FINE_BATCH_SIZES[-1]
    size = next((size for size in FINE_BATCH_SIZES if size >= n_rows), -(-n_rows // fine) * fine)
    return min(size, max_batch_size)
