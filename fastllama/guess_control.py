"""How many guesses to check in a step: decided on the host from what was accepted so far and what steps cost.

A guess's chance of being right is estimated from the newest tokens of the call. With the chance a, a row's step of k
guesses makes 1 + a + a² + … + aᵏ tokens. The number is chosen with the most tokens per second.

Lookup guesses in every step, so tokens of steps that checked nothing count, too; each length of the n-gram that it
found has an estimate of its own. A draft model costs time, so it does not run where its guesses do not pay off. Then a
few steps try it again from time to time.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastllama.kernels.guesses import DRAFTED, MAX_GUESSES, NO_GUESS
from fastllama.output_copies import NewestSteps
from fastllama.speculation import MAX_CATCH_UP, MAX_CHECKED_TOKENS, most_step_tokens
from fastllama.speculation_stats import SpeculationStats

GUESS_COUNTS = (0, 1, 2, 3, 5, 7, 11, MAX_GUESSES)  # each has a graph of its own for every number of rows
MEMORY = 0.93  # how much an earlier guess counts, per guess since
# By the length of the n-gram, or DRAFTED: (right, all) before the first guess.
PRIOR = {0: (0.0, 1.0), 1: (0.2, 1.0), 2: (0.8, 2.0), 3: (1.4, 2.0), DRAFTED: (1.4, 2.0)}
N_TIMES = 16  # of a kind of step that are remembered
ASSUMED_COST = 0.03  # of checking one more token, as a part of a plain step, before it was measured
TRIAL_STEPS = 4  # of a draft model, which are to cost at most TRIAL_SHARE of the steps since its last ones
TRIAL_SHARE = 0.015
TRIAL_MEMORY = 0.25  # how much all earlier guesses count in a trial
READ_TOGETHER = 8  # tokens that a draft model reads in the time of one guess, when it reads what it left out


@dataclass
class _Guessed:
    """The newest guesses of a row that the host knows."""

    position: int  # of the token before the first guess
    tokens: Sequence[int]
    matched: int


@dataclass
class GuessControl:
    """Chooses the number of guesses of each step. n_guesses: always so many; None: by acceptance and cost."""

    n_guesses: int | None = None
    measures: bool = True  # False: costs are assumed, so that all processes that share a model decide alike
    guess_cost: float = 0.0  # of the Guesser
    stats: SpeculationStats = field(default_factory=SpeculationStats)
    _rates: dict[int, tuple[float, ...]] = field(default_factory=dict)
    _rows: dict[int, _Guessed] = field(default_factory=dict)
    _unguessed: int = 0  # steps since the last one with guesses of a draft model
    _trial: int = 0  # steps left in which it is tried again
    _received_at: float | None = None
    _times: dict[tuple[int, int], deque[float]] = field(default_factory=dict)  # by (rows, guesses)

    def begin(self) -> None:
        """A call begins: nothing is known about its text. Costs stay known."""
        self._rates = dict(PRIOR)
        self._rows.clear()
        self._received_at = None
        self._unguessed = self._trial = 0

    def choose(self, n_rows: int) -> int:
        """The number of guesses to check in the next step of the first n_rows."""
        if self.n_guesses is not None:
            return self.n_guesses
        if not self.guess_cost:
            return self._best(n_rows, [self._chance(one.matched) for row, one in self._rows.items() if row < n_rows])
        best = self._best(n_rows, [self._chance(DRAFTED)] * n_rows)
        if best == 0 and self._is_worth_a_trial(n_rows):
            self._rates[DRAFTED] = tuple(TRIAL_MEMORY * number for number in self._rates[DRAFTED])
            self._trial = TRIAL_STEPS
        if best == 0 and self._trial > 0:
            self._trial -= 1
            best = self.choices(n_rows)[1]
        self._unguessed = 0 if best else self._unguessed + 1
        return best

    def _best(self, n_rows: int, chances: Sequence[float]) -> int:
        """The number with the most tokens per second, for rows whose guesses have these chances."""
        if not any(chances):
            return 0
        return max(self.choices(n_rows), key=lambda k: (n_rows + _expected(chances, k)) / self._cost(n_rows, k))

    def _is_worth_a_trial(self, n_rows: int) -> bool:
        """Whether a draft model that was not used for a while may be tried again, and could pay off."""
        plain, counts = self._cost(n_rows, 0), self.choices(n_rows)[1:]
        if self._trial > 0 or not any((k + 1) * plain > self._cost(n_rows, k) for k in counts):
            return False
        steps = TRIAL_STEPS * max(0.0, self._cost(n_rows, counts[0]) / plain - 1)
        reading = min(self._unguessed, MAX_CATCH_UP) / READ_TOGETHER * self.guess_cost
        return self._unguessed * TRIAL_SHARE >= steps + reading

    @property
    def most_guesses(self) -> int:
        """The most guesses of a row that a step may check."""
        return MAX_GUESSES if self.n_guesses is None else self.n_guesses

    def choices(self, n_rows: int) -> list[int]:
        """All numbers that may be chosen for a step of so many rows."""
        if self.n_guesses is not None:
            return sorted({0, self.n_guesses})
        return [k for k in GUESS_COUNTS if k == 0 or (k + 1) * n_rows <= MAX_CHECKED_TOKENS]

    def step_sizes(self, max_rows: int) -> tuple[int, int]:
        """The most tokens of a step of up to max_rows rows: of one row, and of all together."""
        return self.most_guesses + 1, most_step_tokens(max_rows, self.n_guesses)

    def note_time(self, n_rows: int, n_guesses: int, seconds: float) -> None:
        """A step of so many rows and guesses took so long."""
        self.stats.seconds += seconds
        if self.measures:
            self._times.setdefault((n_rows, n_guesses), deque(maxlen=N_TIMES)).append(seconds)

    def note_received(self, newest: NewestSteps, now: float, *, is_busy: bool) -> None:
        """A GPU's output was received at this time. is_busy: further steps are queued, so that it works on."""
        if self._received_at is not None:
            self.note_time(len(newest.tokens[0]), newest.n_guesses, now - self._received_at)
        self._received_at = now if is_busy else None

    def new_tokens(self, newest: NewestSteps, row: int, start: int, n_known: int) -> list[tuple[int, float]]:
        """`newest.new_tokens`, which are noted. To be called once for every row that has not ended."""
        found = newest.new_tokens(row, start, n_known)
        if newest.positions is not None and found:
            self.note_tokens(row, start + n_known, [token for token, _ in found], newest.n_guesses)
        return found

    def note_tokens(self, row: int, position: int, tokens: Sequence[int], n_checked: int) -> None:
        """A step gave a row these tokens, the first at this position."""
        self.stats.steps += 1
        self.stats.tokens += len(tokens)
        self.stats.accepted += len(tokens) - 1
        guessed = self._rows.get(row)
        if guessed is None or guessed.position + 1 != position or not guessed.matched:
            return
        self.stats.checked += sum(guess != NO_GUESS for guess in guessed.tokens[:n_checked])
        for token, guess in zip(tokens, guessed.tokens, strict=False):
            right, total = self._rates[guessed.matched]
            self._rates[guessed.matched] = right * MEMORY + (token == guess), total * MEMORY + 1
            if token != guess:
                return

    def note_guesses(self, newest: NewestSteps) -> None:
        """Note the guesses in the output received last, after its tokens."""
        if self.guess_cost and newest.n_guesses == 0:  # a draft model did not run
            self._rows.clear()
        elif newest.positions is not None and newest.guesses is not None and newest.matched is not None:
            for row, guessed in enumerate(zip(newest.positions, newest.guesses, newest.matched, strict=True)):
                self._rows[row] = _Guessed(*guessed)

    def end_row(self, row: int) -> None:
        """A row has ended."""
        self._rows.pop(row, None)

    def _chance(self, matched: int) -> float:
        right, total = self._rates[matched]
        return right / total

    def _cost(self, n_rows: int, n_guesses: int) -> float:
        """Of a step; the least that was measured lately, since other programs only add to it."""
        known = self._times.get((n_rows, n_guesses))
        if known:
            return min(known)
        plain = self._times.get((n_rows, 0))
        return (min(plain) if plain else 1.0) * (1 + n_guesses * (ASSUMED_COST * n_rows + self.guess_cost))


def _expected(chances: Sequence[float], n_guesses: int) -> float:
    """How many of n_guesses each row's step is expected to accept, summed over the rows."""
    return sum(sum(chance**i for i in range(1, n_guesses + 1)) for chance in chances)
