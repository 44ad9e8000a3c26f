"""The decode step: one token for every row, entirely on the device, captured in a CUDA graph.

A step is embed → layers → logits → sample → write the token and its log-probability → stop test → advance, on the
static tensors of a `DecodeState`. The same function runs eagerly, or is captured once and replayed. There is one graph
for each captured batch size, and all graphs share one memory pool. The host enqueues steps ahead of the output it has
read, and output is copied to it asynchronously (`output_copies.py`), so the device never waits for the host. A row that
has ended is inactive and costs almost nothing.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from fastllama.cuda_graph import CudaGraph
from fastllama.kernels.batch import RaggedBatch, SamplingTensors, Segment
from fastllama.kernels.decode_state import DecodeState
from fastllama.kernels.graph import Graph
from fastllama.kernels.launch.options import override_launch_options
from fastllama.model import Transformer
from fastllama.output_copies import OutputCopies, StepOutput

logger = logging.getLogger(__name__)

# Replays enqueued ahead of the one whose output the host reads, so that the device has work while the host is busy.
# This number is wasted after the last stop token. It is 0 on a CPU, where enqueueing a step runs it.
REPLAYS_AHEAD = 2
FINE_BATCH_SIZES = (1, 2, 4, 8, 16)  # of graphs; larger sizes are multiples of the last, up to the model's batch size


def step(model: Transformer, state: DecodeState, lengths: Sequence[int] | None = None) -> None:
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
    model.ops.sample_and_advance(model.logits(model.hidden(batch), batch), state, model.workspace)


class Decoder:
    """Runs the decode steps of one model on its cache rows 0, 1, …. The caller holds `model.exclusively()`.

    A call is `start`, then `sample_first` with the logits of the prompts' last tokens, then `enqueue_steps` and
    `receive` in turn. `receive` waits for the output it returns. `start` waits for the device only if it has to capture
    a graph that `capture_graphs` did not capture. Nothing else waits. Graphs are captured again after the model's
    weights or cache were replaced.
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
        """Prepare to decode with a model; memory is allocated at the first use.

        graphs: whether to capture steps; None does so if the backend supports it. dependent: False turns
        dependent launches (`kernels/launch/dependent.py`) off; otherwise they are used if the GPU supports them.
        unroll: steps in one replay. new_graph: makes the graphs, in place of CudaGraph.

        Raises ValueError for an unroll below 1, and for graphs=True on a CPU.
        """
        if unroll < 1:
            raise ValueError(f"unroll must be at least 1 step, got {unroll}")
        if graphs and new_graph is None and model.device.type != "cuda":
            raise ValueError(f"CUDA graphs need a GPU, and the model is on {str(model.device)!r}: leave graphs out")
        self.model = model
        self.unroll = unroll
        self._use_graphs, self._dependent, self._new_graph = graphs, dependent, new_graph
        self._revision = -1
        self._call_stream: torch.cuda.Stream | None = None

    @property
    def replays_ahead(self) -> int:
        """How many replays to enqueue beyond the one that is received next."""
        return REPLAYS_AHEAD if self.model.device.type == "cuda" else 0

    @property
    def dependent(self) -> bool:
        """Whether kernels use dependent launches: allowed, supported here, and not turned off by a failed capture."""
        with self.launch_context():
            return bool(self.model.ops.uses_dependent_launch())

    @property
    def queued(self) -> int:
        """Output copies that have not been received."""
        return self._copies.queued

    @torch.inference_mode()
    def capture_graphs(self, batch_sizes: Sequence[int]) -> None:
        """Capture the graphs of these batch sizes before they are first used. Waits for the device."""
        with self.model.exclusively():
            self._use_current_stream()
            self._allocate_for_model()
            for n_rows in batch_sizes:
                self._graph_for(n_rows)

    @torch.inference_mode()
    def dry_run(self, n_rows: int) -> None:
        """Run an eager step of n_rows inactive rows, which compiles its kernels and changes nothing.

        Raises RuntimeError if it fails. With dependent launches, the message names the option that turns them off.
        """
        with self.model.exclusively():
            self._use_current_stream()
            self._allocate_for_model()
            self._state.deactivate()
            try:
                with self.launch_context():
                    step(self.model, self._state.first(n_rows))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                if not self.dependent:
                    raise
                hint = "if dependent launches are the cause, dependent_launch=False turns them off"
                raise RuntimeError(f"a decode step of {n_rows} rows failed ({error}): {hint}") from error

    def start(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        last: Sequence[int],
        stop_ids: Sequence[int],
        sampling: SamplingTensors,
    ) -> None:
        """Start a call. Row i has its newest token tokens[i] at positions[i], and generates up to position last[i].

        All launches of the call go to the stream that is current here, even if another is current later.
        """
        self._use_current_stream()
        self._allocate_for_model()
        self._graph = self._graph_for(len(tokens))
        self._state.set(tokens, positions, last, stop_ids, sampling)
        self._rows = self._state.first(len(tokens)).with_greedy(greedy=sampling.greedy)
        self._lengths = [position + 1 for position in positions]
        self._finished: set[int] = set()
        self._steps = 0
        self._copies.clear()

    def sample_first(self, logits: Tensor) -> None:
        """Enqueue sampling of each row's first token, from the prompts' logits (B, V)."""
        with self.launch_context():
            self.model.ops.sample_and_advance(logits, self._rows, self.model.workspace)
            self._enqueue_copy(1)

    def enqueue_steps(self) -> None:
        """Enqueue the next `unroll` steps."""
        with self.launch_context():
            if self._graph is not None:
                self._graph.replay()
            else:
                for ahead in range(self.unroll):
                    step(self.model, self._rows, self._row_lengths(ahead))
            self._enqueue_copy(self.unroll)

    @contextmanager
    def launch_context(self) -> Iterator[None]:
        """A block whose launches use the call's stream and this decoder's setting of dependent launches."""
        with ExitStack() as stack:
            if self._call_stream is not None:
                stack.enter_context(torch.cuda.stream(self._call_stream))
            if self._dependent is False:
                stack.enter_context(override_launch_options(dependent=False, prefetch=False))
            yield

    def receive(self) -> list[StepOutput]:
        """Wait for the oldest enqueued output and return it, step by step.

        After a row has ended, its tokens are undefined.
        """
        return self._copies.receive()

    def mark_finished(self, row: int) -> None:
        """Tell the decoder that a row has ended, so that eager steps do not read its keys."""
        self._finished.add(row)

    def _use_current_stream(self) -> None:
        """Make the current stream the call's. The previous call's steps may still run on another stream."""
        if self.model.device.type != "cuda":
            return
        before, now = self._call_stream, torch.cuda.current_stream(self.model.device)
        if before is not None and before != now:
            now.wait_stream(before)
            self.model.workspace.reset()  # those steps have written to it since `exclusively` reset it
        self._call_stream = now

    def _row_lengths(self, ahead: int) -> list[int]:
        """Upper bounds of the rows' lengths after `ahead` more steps, 1 for a row that is marked finished."""
        limit = self.model.cache.max_seq_len
        return [1 if row in self._finished else min(length + ahead, limit) for row, length in enumerate(self._lengths)]

    def _enqueue_copy(self, n_steps: int) -> None:
        self._copies.enqueue(self._steps, n_steps)
        self._steps += n_steps
        self._lengths = [length + n_steps for length in self._lengths]

    def _allocate_for_model(self) -> None:
        """Allocate the state and drop all graphs, if the model's tensors were replaced since the last time."""
        model = self.model
        if self._revision == model.revision:
            return
        cache = model.cache
        self._graphs: dict[int, Graph] = {}
        self._state = DecodeState.of(
            cache.max_batch_size, cache.max_seq_len + self.unroll, model.vocab_size, model.device
        )
        self._copies = OutputCopies(self._state, self.unroll, REPLAYS_AHEAD + 1)
        self._new_capture_memory()
        self._revision = model.revision

    def _graph_for(self, n_rows: int) -> Graph | None:
        """The graph for a batch of n_rows, captured at its first use; None where steps run eagerly."""
        if self._graph_factory() is None:
            return None
        size = graph_size(n_rows, self.model.cache.max_batch_size)
        if size not in self._graphs:
            self._graphs[size] = self._capture(self._state.first(size))
        return self._graphs[size]

    def _graph_factory(self) -> Callable[[], Graph] | None:
        """What makes the graphs; None where steps run eagerly."""
        model = self.model
        if self._use_graphs is False:
            return None
        if self._new_graph is not None:
            return self._new_graph
        if self._use_graphs or model.ops.supports_cuda_graphs(model.device):
            return lambda: CudaGraph(self._stream, self._pool)
        # A backend's own graphs do not record collectives.
        factory: Callable[[], Graph] | None = model.ops.graph_factory(model.device)
        return factory if model.group.size == 1 else None

    def _capture(self, state: DecodeState) -> Graph:
        """Capture a graph of `unroll` steps; if it fails with dependent launches, turn them off and try again."""

        def steps() -> None:
            for _ in range(self.unroll):
                step(self.model, state)

        try:
            return self._capture_steps(steps)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not self.dependent:
                raise
            logger.warning(
                "a graph with dependent launches could not be captured (%s): this model runs without them from now on, "
                "as with dependent_launch=False",
                error,
            )
        self._dependent = False
        self._new_capture_memory()
        return self._capture_steps(steps)

    def _capture_steps(self, steps: Callable[[], None]) -> Graph:
        factory = self._graph_factory()
        assert factory is not None
        graph = factory()
        self._state.deactivate()  # so that the eager run, which compiles kernels, changes nothing
        with self.launch_context():
            steps()
            graph.capture(steps)
        return graph

    def _new_capture_memory(self) -> None:
        """Create the stream to capture on and the memory pool of all graphs."""
        if self.model.device.type == "cuda":
            self._stream, self._pool = torch.cuda.Stream(self.model.device), torch.cuda.graph_pool_handle()


def graph_size(n_rows: int, max_batch_size: int) -> int:
    """The number of rows of the graph for a batch of n_rows; its other rows are inactive."""
    fine = FINE_BATCH_SIZES[-1]
    size = next((size for size in FINE_BATCH_SIZES if size >= n_rows), -(-n_rows // fine) * fine)
    return min(size, max_batch_size)
