"""How many guesses to check in a step: decided on the host from what was accepted so far and what steps cost.

A guess's chance of being right is estimated from the newest tokens of the call. With the chance a, a row's step of k
guesses makes 1 + a + a² + … + aᵏ tokens. The number is chosen with the most tokens per second.

Lookup guesses in every step, so tokens of steps that checked nothing count, too; each length of the n-gram that it
found has an estimate of its own. A draft model costs time, so it does not run where its guesses do not pay off. Then a
few steps try it again from time to time.

Estimates may be wrong. So a step risks no more than was won: a row's credit is its tokens less the plain steps that its
steps cost, and a little to begin with. Guesses are checked only if the credit suffices for the case that none is right.
A batch is as slow as its slowest row, so there every row's credit must suffice.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fastllama.kernels.guesses import DRAFTED, MAX_GUESSES, NO_GUESS
from fastllama.output_copies import NewestSteps
from fastllama.speculation import MAX_CATCH_UP, MAX_CHECKED_TOKENS, READ_TOGETHER, most_step_tokens
from fastllama.speculation_stats import SpeculationStats

GUESS_COUNTS = (0, 1, 2, 3, 5, 7, 11, MAX_GUESSES)  # each has a graph of its own for every number of rows
MEMORY = 0.93  # how much an earlier guess counts, per guess since
# By the length of the n-gram, or DRAFTED: (right, all) before the first guess.
PRIOR = {0: (0.0, 1.0), 1: (0.2, 1.0), 2: (0.8, 2.0), 3: (1.4, 2.0), DRAFTED: (1.4, 2.0)}
N_TIMES = 16  # of a kind of step that are remembered
MIN_TIMES = 3  # of a kind of step, before it is ruled out by them: the first ones may be slow
ASSUMED_COST = 0.03  # of checking one more token, as a part of a plain step, before it was measured
TRIAL_STEPS = 4  # of a draft model, which are to cost at most TRIAL_SHARE of the steps since its last ones
TRIAL_SHARE = 0.015
TRIAL_MEMORY = 0.25  # how much all earlier guesses count in a trial
CREDIT, CREDIT_SHARE = 1.0, 0.01  # of a row, in plain steps: to begin with, and more for each of its tokens


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
    rows_run: Callable[[int], int] = int  # rows of the graph for so many rows
    stats: SpeculationStats = field(default_factory=SpeculationStats)
    _rates: dict[int, tuple[float, ...]] = field(default_factory=dict)
    _rows: dict[int, _Guessed] = field(default_factory=dict)
    _is_batch: bool = True
    _accepted: tuple[float, ...] = (1.0, 1.0)  # lately: (guesses that were right, that were expected to be)
    _credit: dict[int, float] = field(default_factory=dict)  # by row, in plain steps
    _ended: set[int] = field(default_factory=set)  # rows
    _unguessed: int = 0  # steps since the last one with guesses of a draft model
    _trial: int = 0  # steps left in which it is tried again
    _received_at: float | None = None
    _times: dict[tuple[int, int], deque[float]] = field(default_factory=dict)  # by (rows, guesses)
    _least: dict[tuple[int, int], float] = field(default_factory=dict)  # of these times

    def begin(self, is_batch: bool = True) -> None:
        """A call begins: nothing is known about its text. Costs stay known.

        is_batch: it ends with its last row. Otherwise other rows follow, and all rows' tokens together count.
        """
        self._is_batch = is_batch
        self._rates, self._accepted = dict(PRIOR), (1.0, 1.0)
        self._rows.clear()
        self._credit.clear()
        self._ended.clear()
        self._received_at = None
        self._unguessed = self._trial = 0

    def choose(self, n_rows: int) -> int:
        """The number of guesses to check in the next step of the first n_rows."""
        if self.n_guesses is not None:
            return self.n_guesses
        if self.measures and len(self._times.get((n_rows, 0), ())) < MIN_TIMES - 1:
            return 0  # to have something to compare with
        if not self.guess_cost:
            return self._best(n_rows, {row: self._chance(one.matched) for row, one in self._rows.items()})
        best = self._best(n_rows, dict.fromkeys(self._running(n_rows), self._chance(DRAFTED)))
        if best == 0 and self._is_worth_a_trial(n_rows):
            self._rates[DRAFTED] = tuple(TRIAL_MEMORY * number for number in self._rates[DRAFTED])
            self._trial = TRIAL_STEPS
        if best == 0 and self._trial > 0:
            self._trial -= 1
            best = next(iter(self.choices(n_rows)[1:]), 0)  # none for many rows
        self._unguessed = 0 if best else self._unguessed + 1
        return best

    def _best(self, n_rows: int, chances: Mapping[int, float]) -> int:
        """The number with the most tokens per second. chances: of the guesses of rows that have some."""
        chances = {row: chance for row, chance in chances.items() if row < n_rows and chance}
        if not chances:
            return 0
        right, expected = self._accepted
        share, plain, n_running = min(1.0, right / expected), self._cost(n_rows, 0), len(self._running(n_rows))
        credit, best, best_rate = self._least_credit(n_rows), 0, n_running / plain
        for k in self.choices(n_rows)[1:]:
            cost = self._cost(n_rows, k)
            if cost / plain - 1 > credit:
                break
            rate = (n_running + share * sum(_expected(chance, k) for chance in chances.values())) / cost
            if rate > best_rate:
                best, best_rate = k, rate
            if self.measures and (n_rows, k) not in self._times:
                break  # a number whose cost is unknown follows the next lower one
        return best

    def _least_credit(self, n_rows: int) -> float:
        """The plain steps that a step may lose if all its guesses are wrong."""
        credits = [self._credit.get(row, CREDIT) for row in self._running(n_rows)] or [CREDIT]
        return min(credits) if self._is_batch else sum(credits) / len(credits)

    def _running(self, n_rows: int) -> list[int]:
        """The first n_rows without those that have ended."""
        return [row for row in range(n_rows) if row not in self._ended]

    def _is_worth_a_trial(self, n_rows: int) -> bool:
        """Whether a draft model that was not used for a while may be tried again, and could pay off."""
        plain, counts = self._cost(n_rows, 0), self.choices(n_rows)[1:]
        if self._trial > 0 or not any((k + 1) * plain > self._cost(n_rows, k) for k in counts):
            return False
        steps = TRIAL_STEPS * max(0.0, self._cost(n_rows, counts[0]) / plain - 1)
        if steps > self._least_credit(n_rows):
            return False
        reading = min(self._unguessed, MAX_CATCH_UP) / READ_TOGETHER * self.guess_cost
        return self._unguessed * TRIAL_SHARE >= steps + reading

    @property
    def most_guesses(self) -> int:
        """The most guesses of a row that a step may check."""
        return MAX_GUESSES if self.n_guesses is None else self.n_guesses

    @property
    def positions_ahead(self) -> int:
        """The most positions that a step may write: of new tokens, and of a draft model's guesses after them."""
        return self.most_guesses + 1 + (self.most_guesses if self.guess_cost else 0)

    def choices(self, n_rows: int) -> list[int]:
        """All numbers that may be chosen for a step of so many rows."""
        if self.n_guesses is not None:
            return sorted({0, self.n_guesses})
        return [k for k in GUESS_COUNTS if k == 0 or (k + 1) * self.rows_run(n_rows) <= MAX_CHECKED_TOKENS]

    def step_sizes(self, max_rows: int) -> tuple[int, int]:
        """The most tokens of a step of up to max_rows rows: of one row, and of all together."""
        return self.most_guesses + 1, most_step_tokens(max_rows, self.n_guesses)

    def note_time(self, n_rows: int, n_guesses: int, seconds: float) -> None:
        """A step of so many rows and guesses took so long."""
        self.stats.seconds += seconds
        if self.measures:
            times = self._times.setdefault((n_rows, n_guesses), deque(maxlen=N_TIMES))
            times.append(seconds)
            self._least[n_rows, n_guesses] = min(times)

    def note_received(self, newest: NewestSteps, now: float, *, is_busy: bool) -> None:
        """A GPU's output was received at this time. is_busy: further steps are queued, so that it works on."""
        if self._received_at is not None:
            self.note_time(len(newest.tokens[0]), newest.n_guesses, now - self._received_at)
        self._received_at = now if is_busy else None

    def new_tokens(self, newest: NewestSteps, row: int, start: int, n_known: int) -> list[tuple[int, float]]:
        """`newest.new_tokens`, which are noted. To be called once for every row that has not ended."""
        found = newest.new_tokens(row, start, n_known)
        if newest.positions is not None and found:
            tokens = [token for token, _ in found]
            self.note_tokens(row, start + n_known, tokens, newest.n_guesses, len(newest.tokens[0]))
        return found

    def note_tokens(self, row: int, position: int, tokens: Sequence[int], n_checked: int, n_rows: int = 1) -> None:
        """A step of n_rows gave a row these tokens, the first at this position."""
        self.stats.steps += 1
        self.stats.tokens += len(tokens)
        self.stats.accepted += len(tokens) - 1
        cost = self._cost(n_rows, n_checked) / self._cost(n_rows, 0)
        self._credit[row] = self._credit.get(row, CREDIT) + len(tokens) * (1 + CREDIT_SHARE) - cost
        guessed = self._rows.get(row)
        if guessed is None or guessed.position + 1 != position or not guessed.matched:
            return
        self.stats.checked += sum(guess != NO_GUESS for guess in guessed.tokens[:n_checked])
        if n_checked:
            new = len(tokens) - 1, _expected(self._chance(guessed.matched), n_checked)
            self._accepted = tuple(MEMORY * old + more for old, more in zip(self._accepted, new, strict=True))
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
                if row not in self._ended:
                    self._rows[row] = _Guessed(*guessed)

    def start_row(self, row: int) -> None:
        """A row begins, perhaps after another that had ended."""
        self.end_row(row)
        self._ended.discard(row)

    def move_row(self, source: int, target: int) -> None:
        """A row goes on as another."""
        known, credit = self._rows.get(source), self._credit.get(source)
        self.end_row(source)
        self.start_row(target)
        if known is not None:
            self._rows[target] = known
        if credit is not None:
            self._credit[target] = credit

    def end_row(self, row: int) -> None:
        """A row has ended."""
        self._rows.pop(row, None)
        self._credit.pop(row, None)
        self._ended.add(row)

    def _chance(self, matched: int) -> float:
        right, total = self._rates[matched]
        return right / total

    def _cost(self, n_rows: int, n_guesses: int) -> float:
        """Of a step; the least that was measured lately, since other programs only add to it."""
        known = self._least.get((n_rows, n_guesses))
        if known is not None and (n_guesses == 0 or len(self._times[n_rows, n_guesses]) >= MIN_TIMES):
            return known
        plain = self._least.get((n_rows, 0), 1.0)
        measured = [k for k in self.choices(n_rows)[1:] if k != n_guesses and (n_rows, k) in self._least]
        per_guess = ASSUMED_COST * n_rows + self.guess_cost
        if measured:
            nearest = min(measured, key=lambda k: abs(k - n_guesses))
            per_guess = max(0.0, self._least[n_rows, nearest] / plain - 1) / nearest
        assumed = plain * (1 + n_guesses * per_guess)
        return assumed if known is None else (known + assumed) / 2


def _expected(chance: float, n_guesses: int) -> float:
    """How many of a row's n_guesses are expected to be right."""
    return sum(chance**i for i in range(1, n_guesses + 1))
