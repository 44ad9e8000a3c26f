"""A CUDA graph: launches recorded once and replayed. A capture that fails leaves torch usable."""

import threading
from collections.abc import Callable
from typing import Any, ClassVar

import torch


class CudaGraph:
    """A CUDA graph. Graphs of one stream and pool share their memory, so only one of them may run at a time."""

    _capturing = threading.Lock()  # torch captures one graph at a time
    _failed: ClassVar[list[torch.cuda.CUDAGraph]] = []  # torch's allocator may still point to them

    def __init__(self, stream: torch.cuda.Stream, pool: Any) -> None:
        """stream: the stream of the capture, on the launches' device; nothing else may run on it."""
        self._stream, self._pool = stream, pool
        self._graph = torch.cuda.CUDAGraph()

    @classmethod
    def standalone(cls, device: torch.device) -> "CudaGraph":
        """A graph with its own stream and memory pool."""
        return cls(torch.cuda.Stream(device), torch.cuda.graph_pool_handle())

    def capture(self, launches: Callable[[], object]) -> None:
        """Record the launches. Raises what `launches` raises; the stream and pool are unusable after an error."""
        device = self._stream.device
        # torch.cuda.graph makes the stream's device current. Without a stream it would use one that all graphs of the
        # process share, on the device of the first capture. "thread_local" lets other threads use CUDA meanwhile.
        options = {"stream": self._stream, "pool": self._pool, "capture_error_mode": "thread_local"}
        cause: BaseException | None = None
        # If ending a failed capture raises an error, torch leaves the capture's stream current. The outer
        # torch.cuda.stream block restores the caller's.
        with self._capturing, torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            try:
                with torch.cuda.graph(self._graph, **options):
                    try:
                        launches()
                    except BaseException as error:
                        cause = error
                        raise
            except BaseException as error:
                self._failed.append(self._graph)
                if cause is None or cause is error:
                    raise
                raise cause from None  # torch's own error says only that the capture failed

    def replay(self) -> None:
        """Enqueue the launches on the current stream."""
        self._graph.replay()
