"""The decode step: one token for every row, with all that it reads and writes on the device, captured in a CUDA graph.

A step is embed → layers → logits → sample → write the token and its log-probability → stop test → advance, on the
static tensors of a `DecodeState`. It is one function, which runs eagerly, or once under capture and from then on as a
graph of its launches: one graph for each batch size, all of them in one pool of memory. The host queues steps some
way ahead of what it has read; what they wrote comes to it by copies beside the steps (`arrivals.py`), so that the
device never waits for the host. A row that has ended rests, and costs next to nothing.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from fastllama.cuda_graph import CudaGraph, Graph
from fastllama.kernels.batch import RaggedBatch, SamplingTensors, Segment
from fastllama.kernels.decode_state import DecodeState
from fastllama.kernels.launch.options import override_launch_options
from fastllama.model import Transformer
from fastllama.output_copies import OutputCopies, StepOutput

logger = logging.getLogger(__name__)

# Replays queued behind the one that the host reads: the device has work while the host is busy, and what is
# wasted after the last stop token is as many. On a CPU, where a queued step has run by then, none.
REPLAYS_AHEAD = 2
FINE_BATCH_SIZES = (1, 2, 4, 8, 16)  # of graphs; beyond, multiples of the last, up to the most that the model takes


def step(model: Transformer, state: DecodeState, lengths: Sequence[int] | None = None) -> None:
    """Feed every row's newest token and choose the next.

    lengths: the rows' own, that token included, for a backend that reads no more of the cache. None: of any length, as
    the device alone knows.
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
    model.ops.sample_and_advance(model.logits(model.hidden(batch), batch), state, model.workspace)


class Decoder:
    """The decode steps of one model, whose cache rows 0, 1, … they use: hold `model.exclusively()` around a call.

    A call is `begin`, then `choose` with the logits of the prompts' last tokens, then `launch` and `receive` by turns.
    Only `receive` waits, and for no more than it brings; and `begin`, for the device, when a graph has to be captured
    that `warm` has not. Graphs are made anew when the model's weights or cache have moved.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        graphs: bool | None = None,
        dependent: bool | None = None,
        unroll: int = 1,
        new_graph: Callable[[], Graph] | None = None,
    ) -> None:
        """graphs: capture steps; None does so where the backend is made for it. dependent: False launches every kernel
        as usual, else as dependent on the one before where the GPU can (`kernels/launch/dependent.py`). unroll:
        steps of one replay. new_graph: makes graphs other than CUDA's.

        Raises ValueError for an unroll below 1, and where graphs are asked for on a CPU.
        """
        if unroll < 1:
            raise ValueError(f"unroll must be at least 1 step, got {unroll}")
        if graphs and new_graph is None and model.device.type != "cuda":
            raise ValueError(f"CUDA graphs need a GPU, and the model is on {str(model.device)!r}: leave graphs out")
        self.model = model
        self.unroll = unroll
        self._captures, self._dependent, self._new_graph = graphs, dependent, new_graph
        self._revision = -1
        self._call_stream: torch.cuda.Stream | None = None

    @property
    def ahead(self) -> int:
        """Replays that are worth queueing behind the next one to be received."""
        return REPLAYS_AHEAD if self.model.device.type == "cuda" else 0

    @property
    def dependent(self) -> bool:
        """Whether kernels are launched as dependent on the one before: asked for, possible here, and not given up."""
        with self.launching():
            return bool(self.model.ops.uses_dependent_launch())

    @property
    def queued(self) -> int:
        """Results that are yet to be received."""
        return self._copies.queued

    @torch.inference_mode()
    def warm(self, batch_sizes: Sequence[int]) -> None:
        """Capture the graphs of these batch sizes before they are first used. Waits for the device."""
        with self.model.exclusively():
            self._take_stream()
            self._follow_model()
            for n_rows in batch_sizes:
                self._graph_of(n_rows)

    @torch.inference_mode()
    def rehearse(self, n_rows: int) -> None:
        """Run a step of so many parked rows, launch by launch: it compiles kernels and leaves nothing behind.

        Raises RuntimeError, naming the switch that does without dependent launches, where one of them fails.
        """
        with self.model.exclusively():
            self._take_stream()
            self._follow_model()
            self._state.deactivate()
            try:
                with self.launching():
                    step(self.model, self._state.first(n_rows))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                if not self.dependent:
                    raise
                hint = "if dependent launches are to blame, dependent_launch=False does without them"
                raise RuntimeError(f"a decode step of {n_rows} rows failed ({error}): {hint}") from error

    def begin(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        last: Sequence[int],
        stop_ids: Sequence[int],
        sampling: SamplingTensors,
    ) -> None:
        """Take on rows, each standing on its newest token at its position, to gain more up to position `last`.

        All that the call launches goes to the stream that is current now, whichever is when it goes on.
        """
        self._take_stream()
        self._follow_model()
        self._graph = self._graph_of(len(tokens))
        self._state.set(tokens, positions, last, stop_ids, sampling)
        self._rows = self._state.first(len(tokens)).with_greedy(greedy=sampling.greedy)
        self._lengths = [position + 1 for position in positions]
        self._finished: set[int] = set()
        self._steps = 0
        self._copies.clear()

    def choose(self, logits: Tensor) -> None:
        """Queue the rows' next tokens, from logits (B, V) that are at hand."""
        with self.launching():
            self.model.ops.sample_and_advance(logits, self._rows, self.model.workspace)
            self._sent(1)

    def launch(self) -> None:
        """Queue the next `unroll` steps."""
        with self.launching():
            if self._graph is not None:
                self._graph.replay()
            else:
                for ahead in range(self.unroll):
                    step(self.model, self._rows, self._keys(ahead))
            self._sent(self.unroll)

    @contextmanager
    def launching(self) -> Iterator[None]:
        """Within the block launches go to the call's stream, as dependent ones or not, as this decoder has it."""
        with ExitStack() as stack:
            if self._call_stream is not None:
                stack.enter_context(torch.cuda.stream(self._call_stream))
            if self._dependent is False:
                stack.enter_context(override_launch_options(dependent=False, prefetch=False))
            yield

    def receive(self) -> list[StepOutput]:
        """What the oldest of what was queued brought, step by step, as soon as it has run.

        Of a row that had ended before a step, that step's token means nothing.
        """
        return self._copies.receive()

    def finish(self, row: int) -> None:
        """The host has seen that a row ended, so that eager steps need not read its keys."""
        self._finished.add(row)

    def _take_stream(self) -> None:
        """Keep the current stream for a call; steps of the one before may still run on another."""
        if self.model.device.type != "cuda":
            return
        before, now = self._call_stream, torch.cuda.current_stream(self.model.device)
        if before is not None and before != now:
            now.wait_stream(before)
            self.model.workspace.reset()  # which those steps have used since the call began
        self._call_stream = now

    def _keys(self, ahead: int) -> list[int]:
        """The lengths of the rows in the step after `ahead` more. One that ended unseen counts a few too many."""
        most = self.model.cache.max_seq_len
        return [1 if row in self._finished else min(length + ahead, most) for row, length in enumerate(self._lengths)]

    def _sent(self, n_steps: int) -> None:
        self._copies.send(self._steps, n_steps)
        self._steps += n_steps
        self._lengths = [length + n_steps for length in self._lengths]

    def _follow_model(self) -> None:
        """Allocate the state, and forget graphs, whenever the model's tensors are others than they were."""
        model = self.model
        if self._revision == model.revision:
            return
        cache = model.cache
        self._graphs: dict[int, Graph] = {}
        self._state = DecodeState.of(
            cache.max_batch_size, cache.max_seq_len + self.unroll, model.vocab_size, model.device
        )
        self._copies = OutputCopies(self._state, self.unroll, REPLAYS_AHEAD + 1)
        self._new_memory()
        self._revision = model.revision

    def _graph_of(self, n_rows: int) -> Graph | None:
        """The graph for a batch of so many rows; None where steps run eagerly."""
        captures = self._captures
        if captures is None:
            captures = self._new_graph is not None or self.model.ops.supports_cuda_graphs(self.model.device)
        if not captures:
            return None
        size = graph_size(n_rows, self.model.cache.max_batch_size)
        if size not in self._graphs:
            self._graphs[size] = self._capture(self._state.first(size))
        return self._graphs[size]

    def _capture(self, state: DecodeState) -> Graph:
        def steps() -> None:
            for _ in range(self.unroll):
                step(self.model, state)

        try:
            return self._captured(steps)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not self.dependent:
                raise
            logger.warning(
                "a graph of dependent launches could not be captured (%s): this model's kernels are launched as usual "
                "from now on, as dependent_launch=False has them from the start",
                error,
            )
        self._dependent = False
        self._new_memory()
        return self._captured(steps)

    def _captured(self, steps: Callable[[], None]) -> Graph:
        graph = self._new_graph() if self._new_graph else CudaGraph(self._stream, self._pool)
        self._state.deactivate()  # so that the run before, which compiles kernels, leaves nothing behind
        with self.launching():
            steps()
            graph.capture(steps)
        return graph

    def _new_memory(self) -> None:
        """A stream to capture on, and a pool of memory for all graphs."""
        if self.model.device.type == "cuda":
            self._stream, self._pool = torch.cuda.Stream(self.model.device), torch.cuda.graph_pool_handle()


def graph_size(n_rows: int, max_batch_size: int) -> int:
    """Rows of the graph that serves a batch of n_rows: the others are parked."""
    fine = FINE_BATCH_SIZES[-1]
    size = next((size for size in FINE_BATCH_SIZES if size >= n_rows), -(-n_rows // fine) * fine)
    return min(size, max_batch_size)
