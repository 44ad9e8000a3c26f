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
    n_steps: int = 1  # the copy's steps; without speculation, each made one token of every row
    first_step: int = 0  # the number of the first of them in the call
    top_ids: Tensor | None = None  # (steps, B, n): the most likely tokens, where they were asked for
    top_logprobs: Tensor | None = None
    positions: list[int] | None = None  # the position of each row's newest token, where steps check guesses
    n_guesses: int = 0  # that the step checked
    guesses: list[list[int]] | None = None  # (B, n): of the tokens after it
    matched: list[int] | None = None  # the length of the n-gram they come from

    def new_tokens(self, row: int, start: int, n_known: int) -> list[tuple[int, float]]:
        """A row's tokens after its first n_known, with log-probabilities; the first of all is at position `start`.

        Where steps check no guesses, these may go beyond the row's end.
        """
        end = n_known + self.n_steps if self.positions is None else self.positions[row] - start + 1
        places = [number % len(self.tokens) for number in range(n_known, end)]
        return [(self.tokens[at][row], self.logprobs[at][row]) for at in places]

    def steps(self) -> list[StepOutput]:
        """All rows' output of the copy's steps, where all rows started together and no guesses are checked."""
        places = [number % len(self.tokens) for number in range(self.first_step, self.first_step + self.n_steps)]
        return [StepOutput(self.tokens[at], self.logprobs[at]) for at in places]


class _Copy(NamedTuple):
    """A copy in flight."""

    buffer: int
    n_rows: int
    names: list[str]  # of the tensors
    first_step: int
    n_steps: int
    n_guesses: int


class OutputCopies:
    """Copies to the host, received in the order in which they were enqueued. At most `n_buffers` are in flight."""

    def __init__(self, n_buffers: int, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._buffers: list[dict[str, Tensor]] = [{} for _ in range(n_buffers)]
        self._stream = torch.cuda.Stream(device) if self._pinned else None
        self._copied = [torch.cuda.Event() for _ in range(n_buffers)] if self._pinned else []
        self._in_flight: deque[_Copy] = deque()  # oldest first
        self._next_buffer = self._n_steps = 0

    @property
    def queued(self) -> int:
        """Copies that have not been received."""
        return len(self._in_flight)

    @property
    def queued_steps(self) -> int:
        """Their steps."""
        return sum(copy.n_steps for copy in self._in_flight)

    def clear(self) -> None:
        """Drop all copies that have not been received, and count steps from 0."""
        self._in_flight.clear()
        self._n_steps = 0

    def enqueue(
        self, state: DecodeState, n_rows: int, with_top_tokens: bool = False, n_steps: int = 1, n_guesses: int = 0
    ) -> None:
        """Copy the output of the first n_rows, whose n_steps the current stream already has in its queue.

        n_guesses: those that the steps check.
        All rows of `state` are copied: memory without gaps is copied without waiting.
        """
        n_buffers = len(self._buffers)
        if len(self._in_flight) == n_buffers:
            raise RuntimeError(f"all {n_buffers} buffers are in flight: receive one first")
        buffer, self._next_buffer = self._next_buffer, (self._next_buffer + 1) % n_buffers
        guesses, sources = state.guesses, {}
        if guesses is not None:
            # Before the tokens: a later step may change it during the copy, and must have written none of them then.
            sources = {"newest": guesses.newest, "guesses": guesses.tokens, "matched": guesses.matched}
        sources |= {"tokens": state.out_tokens, "logprobs": state.out_logprobs}
        if with_top_tokens and state.top is not None:
            sources |= {"top_ids": state.top.ids, "top_logprobs": state.top.logprobs}
        if self._stream is None:
            self._copy(buffer, sources)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            with torch.cuda.stream(self._stream):
                self._copy(buffer, sources)
                self._copied[buffer].record(self._stream)
        self._in_flight.append(_Copy(buffer, n_rows, list(sources), self._n_steps, n_steps, n_guesses))
        self._n_steps += n_steps

    def receive(self) -> NewestSteps:
        """Wait for the oldest copy and return it."""
        number, n_rows, names, first_step, n_steps, n_guesses = self._in_flight.popleft()
        if self._stream is not None:
            self._copied[number].synchronize()
        buffer = self._buffers[number]
        tokens, logprobs = (buffer[name][:, :n_rows].tolist() for name in ("tokens", "logprobs"))
        newest = NewestSteps(tokens, logprobs, n_steps, first_step)
        if "top_ids" in names:
            # Copies, since the buffer is written again. Of their many numbers only a few are wanted.
            newest = newest._replace(top_ids=buffer["top_ids"].clone(), top_logprobs=buffer["top_logprobs"].clone())
        if "newest" in names:
            known, guesses, matched = (buffer[name][:n_rows].tolist() for name in ("newest", "guesses", "matched"))
            newest = newest._replace(positions=known, n_guesses=n_guesses, guesses=guesses, matched=matched)
        return newest

    def _copy(self, number: int, sources: dict[str, Tensor]) -> None:
        buffer = self._buffers[number]
        for name, source in sources.items():
            if name not in buffer:
                buffer[name] = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=self._pinned)
            buffer[name].copy_(source, non_blocking=True)
