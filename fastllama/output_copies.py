"""Asynchronous copies of decode steps' output to the host.

Each step writes its own row of the output tensors, so later steps can run while a copy is in flight. Copies use a
separate CUDA stream and pinned memory. The host waits only for the copy it reads.
"""

from collections import deque
from typing import NamedTuple

import torch

from fastllama.kernels.decode_state import DecodeState


class StepOutput(NamedTuple):
    """Each row's token of one step, and its log-probability."""

    tokens: list[int]
    logprobs: list[float]


class OutputCopies:
    """Copies to the host, received in the order in which they were enqueued. At most `n_buffers` are in flight."""

    def __init__(self, state: DecodeState, n_steps: int, n_buffers: int) -> None:
        """Allocate the buffers. n_steps: the maximum number of steps in one copy."""
        self._state = state
        shape, pinned = (n_buffers, n_steps, state.rows.shape[0]), state.rows.is_cuda
        self._tokens = torch.empty(shape, dtype=torch.int64, device="cpu", pin_memory=pinned)
        self._logprobs = torch.empty(shape, dtype=torch.float32, device="cpu", pin_memory=pinned)
        self._stream = torch.cuda.Stream(state.rows.device) if pinned else None
        self._copied = [torch.cuda.Event() for _ in range(n_buffers)] if pinned else []
        self._in_flight: deque[tuple[int, int]] = deque()  # (buffer, steps in it), oldest first
        self._next_buffer = 0

    @property
    def queued(self) -> int:
        """Copies that have not been received."""
        return len(self._in_flight)

    def clear(self) -> None:
        """Drop all copies that have not been received."""
        self._in_flight.clear()

    def enqueue(self, first: int, n_steps: int) -> None:
        """Copy the output of steps [first, first + n_steps), which the current stream already has in its queue."""
        n_buffers = len(self._tokens)
        if len(self._in_flight) == n_buffers:
            raise RuntimeError(f"all {n_buffers} buffers are in flight: receive one first")
        buffer, self._next_buffer = self._next_buffer, (self._next_buffer + 1) % n_buffers
        if self._stream is None:
            self._copy(buffer, first, n_steps)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            with torch.cuda.stream(self._stream):
                self._copy(buffer, first, n_steps)
                self._copied[buffer].record(self._stream)
        self._in_flight.append((buffer, n_steps))

    def receive(self) -> list[StepOutput]:
        """Wait for the oldest copy and return its steps."""
        buffer, n_steps = self._in_flight.popleft()
        if self._stream is not None:
            self._copied[buffer].synchronize()
        tokens, logprobs = self._tokens[buffer, :n_steps].tolist(), self._logprobs[buffer, :n_steps].tolist()
        return [StepOutput(*step) for step in zip(tokens, logprobs, strict=True)]

    def _copy(self, buffer: int, first: int, n_steps: int) -> None:
        steps = slice(first, first + n_steps)
        self._tokens[buffer, :n_steps].copy_(self._state.out_tokens[steps], non_blocking=True)
        self._logprobs[buffer, :n_steps].copy_(self._state.out_logprobs[steps], non_blocking=True)
