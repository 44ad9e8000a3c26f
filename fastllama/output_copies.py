"""Asynchronous copies of decode steps' output to the host.

The output tensors hold each row's newest steps, so later steps can run while a copy is in flight. Copies use a separate
CUDA stream and pinned memory. The host waits only for the copy it reads.
"""

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from fastllama.kernels.decode_state import DecodeState


class StepOutput(NamedTuple):
    """Each row's token of one step, and its log-probability."""

    tokens: list[int]
    logprobs: list[float]


class NewestSteps(NamedTuple):
    """The newest steps of every row: a row's s-th new token is at index s % steps."""

    tokens: list[list[int]]  # (steps, B)
    logprobs: list[list[float]]
    top_ids: Tensor | None  # (steps, B, n): the most likely tokens, where they were asked for
    top_logprobs: Tensor | None

    def step(self, number: int) -> StepOutput:
        """All rows' output of one step, where all rows started together."""
        at = number % len(self.tokens)
        return StepOutput(self.tokens[at], self.logprobs[at])


class OutputCopies:
    """Copies to the host, received in the order in which they were enqueued. At most `n_buffers` are in flight."""

    def __init__(self, n_buffers: int, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._buffers: list[dict[str, Tensor]] = [{} for _ in range(n_buffers)]
        self._stream = torch.cuda.Stream(device) if self._pinned else None
        self._copied = [torch.cuda.Event() for _ in range(n_buffers)] if self._pinned else []
        self._in_flight: deque[tuple[int, int, bool]] = deque()  # (buffer, rows, with top tokens), oldest first
        self._next_buffer = 0

    @property
    def queued(self) -> int:
        """Copies that have not been received."""
        return len(self._in_flight)

    def clear(self) -> None:
        """Drop all copies that have not been received."""
        self._in_flight.clear()

    def enqueue(self, state: DecodeState, n_rows: int, with_top_tokens: bool = False) -> None:
        """Copy the output of the first n_rows, whose steps the current stream already has in its queue.

        All rows of `state` are copied: memory without gaps is copied without waiting.
        """
        n_buffers = len(self._buffers)
        if len(self._in_flight) == n_buffers:
            raise RuntimeError(f"all {n_buffers} buffers are in flight: receive one first")
        buffer, self._next_buffer = self._next_buffer, (self._next_buffer + 1) % n_buffers
        sources = {"tokens": state.out_tokens, "logprobs": state.out_logprobs}
        if with_top_tokens and state.top is not None:
            sources |= {"top_ids": state.top.ids, "top_logprobs": state.top.logprobs}
        if self._stream is None:
            self._copy(buffer, sources)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            with torch.cuda.stream(self._stream):
                self._copy(buffer, sources)
                self._copied[buffer].record(self._stream)
        self._in_flight.append((buffer, n_rows, "top_ids" in sources))

    def receive(self) -> NewestSteps:
        """Wait for the oldest copy and return it."""
        number, n_rows, with_top_tokens = self._in_flight.popleft()
        if self._stream is not None:
            self._copied[number].synchronize()
        buffer = self._buffers[number]
        tokens, logprobs = (buffer[name][:, :n_rows].tolist() for name in ("tokens", "logprobs"))
        if not with_top_tokens:
            return NewestSteps(tokens, logprobs, None, None)
        # Copies, since the buffer is written again. Of their many numbers only a few are wanted.
        return NewestSteps(tokens, logprobs, buffer["top_ids"].clone(), buffer["top_logprobs"].clone())

    def _copy(self, number: int, sources: dict[str, Tensor]) -> None:
        buffer = self._buffers[number]
        for name, source in sources.items():
            if name not in buffer:
                buffer[name] = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=self._pinned)
            buffer[name].copy_(source, non_blocking=True)
