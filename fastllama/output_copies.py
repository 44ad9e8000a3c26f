"""What decode steps wrote, on its way to the host, without holding up the device.

Every step has a place of its own in the state's output, so a copy may take its time while later steps run: it goes
beside them, on a stream of its own, into pinned memory, and the host waits for that copy alone.
"""

from collections import deque
from typing import NamedTuple

import torch

from fastllama.kernels.decode_state import DecodeState


class StepOutput(NamedTuple):
    """What every row gained in one step."""

    tokens: list[int]
    logprobs: list[float]


class OutputCopies:
    """Copies to the host, in the order in which they were sent. At most `slots` of them are on their way."""

    def __init__(self, state: DecodeState, n_steps: int, slots: int) -> None:
        """n_steps: the most that one copy brings."""
        self._state = state
        shape, pinned = (slots, n_steps, state.rows.shape[0]), state.rows.is_cuda
        self._tokens = torch.empty(shape, dtype=torch.int64, device="cpu", pin_memory=pinned)
        self._logprobs = torch.empty(shape, dtype=torch.float32, device="cpu", pin_memory=pinned)
        self._stream = torch.cuda.Stream(state.rows.device) if pinned else None
        self._done = [torch.cuda.Event() for _ in range(slots)] if pinned else []
        self._sent: deque[tuple[int, int]] = deque()  # slot, steps in it
        self._next = 0

    @property
    def queued(self) -> int:
        """Copies that are yet to be received."""
        return len(self._sent)

    def clear(self) -> None:
        """Forget what was sent and is not wanted any more."""
        self._sent.clear()

    def send(self, first: int, n_steps: int) -> None:
        """Copy the results of steps [first, first + n_steps), which have been queued on the current stream."""
        if len(self._sent) == len(self._tokens):
            raise RuntimeError(f"all {len(self._tokens)} slots are on their way: receive one first")
        slot, self._next = self._next, (self._next + 1) % len(self._tokens)
        if self._stream is None:
            self._copy(slot, first, n_steps)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            with torch.cuda.stream(self._stream):
                self._copy(slot, first, n_steps)
                self._done[slot].record(self._stream)
        self._sent.append((slot, n_steps))

    def receive(self) -> list[StepOutput]:
        """What the oldest copy brings, step by step, as soon as it is here."""
        slot, n_steps = self._sent.popleft()
        if self._stream is not None:
            self._done[slot].synchronize()
        tokens, logprobs = self._tokens[slot, :n_steps].tolist(), self._logprobs[slot, :n_steps].tolist()
        return [StepOutput(*step) for step in zip(tokens, logprobs, strict=True)]

    def _copy(self, slot: int, first: int, n_steps: int) -> None:
        steps = slice(first, first + n_steps)
        self._tokens[slot, :n_steps].copy_(self._state.out_tokens[steps], non_blocking=True)
        self._logprobs[slot, :n_steps].copy_(self._state.out_logprobs[steps], non_blocking=True)
