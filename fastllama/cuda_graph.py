"""A CUDA graph: launches that are recorded once and replayed, and a recording that fails without a trace."""

import threading
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch


class Graph(Protocol):
    """Launches that are recorded once and replayed."""

    def capture(self, launches: Callable[[], object]) -> None:
        """Record what this function launches. It has run before."""

    def replay(self) -> None:
        """Queue the same launches, on the same memory."""


class CudaGraph:
    """A CUDA graph. All that are given one stream and pool share their memory, and so run one at a time."""

    _capturing = threading.Lock()  # torch captures one graph at a time
    _failed: ClassVar[list[torch.cuda.CUDAGraph]] = []  # torch's allocator may still point to them

    def __init__(self, stream: torch.cuda.Stream, pool: Any) -> None:
        """stream: to capture on, of the device that the launches go to; no other work may be on it."""
        self._stream, self._pool = stream, pool
        self._graph = torch.cuda.CUDAGraph()

    @classmethod
    def alone(cls, device: torch.device) -> "CudaGraph":
        """One with memory of its own."""
        return cls(torch.cuda.Stream(device), torch.cuda.graph_pool_handle())

    def capture(self, launches: Callable[[], object]) -> None:
        """Record, and raise what `launches` raises. After an error stream and pool are of no more use."""
        device = self._stream.device
        # Entering torch's context makes the stream's device the current one. Without a stream it would take one that
        # all graphs of the process share, on whichever device captured first. Other threads may go on meanwhile.
        how = {"stream": self._stream, "pool": self._pool, "capture_error_mode": "thread_local"}
        cause: BaseException | None = None
        # Where the end of a broken capture raises, torch leaves its stream the current one: the block's puts it right.
        with self._capturing, torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            try:
                with torch.cuda.graph(self._graph, **how):
                    try:
                        launches()
                    except BaseException as error:
                        cause = error
                        raise
            except BaseException as error:
                self._failed.append(self._graph)
                if cause is None or cause is error:
                    raise
                raise cause from None  # the other says only that the capture was broken

    def replay(self) -> None:
        """Queue the launches on the current stream."""
        self._graph.replay()
