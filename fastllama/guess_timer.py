"""How long guessing takes: from time to time a step guesses again, which gives the same guesses, and that is timed."""

import time
from collections.abc import Callable

import torch

FIRST_TIMED_STEP = 3  # the first ones compile and warm up
TIMED_STEPS = 64  # then one step in so many
MILLISECONDS = 1e3  # a second's


class GuessTimer:
    """Times guesses. A GPU's time is known some steps later, so that nothing waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._n_steps = 0
        self._events: list[torch.cuda.Event] = []
        self._n_timed = 0  # guesses between the events
        self.seconds = 0.0  # of one guess

    def after_step(self, n_guesses: int, prepare: Callable[[], Callable[[], None]]) -> None:
        """A step made so many guesses. What `prepare` returns makes them again."""
        self._n_steps += 1
        if self._events and self._events[1].query():
            self.seconds = self._events[0].elapsed_time(self._events[1]) / MILLISECONDS / self._n_timed
            self._events = []
        if self._n_steps != FIRST_TIMED_STEP and self._n_steps % TIMED_STEPS:
            return
        guess_again = prepare()
        if self._device.type != "cuda":
            begin = time.perf_counter()
            guess_again()
            self.seconds = (time.perf_counter() - begin) / n_guesses
            return
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._n_timed = n_guesses
        self._events[0].record()
        guess_again()
        self._events[1].record()
