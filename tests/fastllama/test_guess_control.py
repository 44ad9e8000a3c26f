"""The number of guesses follows what was accepted and what steps cost."""

import random
from collections.abc import Sequence

import pytest

from fastllama.guess_control import CREDIT, CREDIT_SHARE, GUESS_COUNTS, MIN_TIMES, GuessControl
from fastllama.kernels.guesses import DRAFTED, MAX_GUESSES
from fastllama.output_copies import NewestSteps
from fastllama.step_graphs import graph_size


def told(control: GuessControl, position: int, guesses: Sequence[int], matched: int) -> None:
    control.note_guesses(NewestSteps([[0]], [[0.0]], positions=[position], guesses=[list(guesses)], matched=[matched]))


def control_with_costs(cost_of_a_guess: float, n_rows: int = 1, guess_cost: float = 0.0) -> GuessControl:
    control = GuessControl(guess_cost=guess_cost)
    control.begin()
    for k in control.choices(n_rows):
        for _ in range(MIN_TIMES):
            control.note_time(n_rows, k, 1.0 + cost_of_a_guess * k)
    return control


class World:
    """Rows whose guesses are right with some chance, and steps that cost 1 and something for each guess."""

    def __init__(self, control: GuessControl, chances: Sequence[float], cost: float, seed: int = 1) -> None:
        self.control, self.chances, self.cost = control, chances, cost
        self.random = random.Random(seed)
        self.tokens = [1] * len(chances)
        self.seconds = 0.0
        self.chosen: list[int] = []

    def step(self) -> None:
        n_rows, drafts = len(self.chances), self.control.guess_cost > 0
        k = self.control.choose(n_rows)
        self.chosen.append(k)
        cost = 1.0 + self.cost * k
        self.seconds += cost
        self.control.note_time(n_rows, k, cost)
        for row, chance in enumerate(self.chances):
            run = next((i for i in range(MAX_GUESSES) if self.random.random() >= chance), MAX_GUESSES)
            checked = min(run, k) if not drafts or (len(self.chosen) > 1 and self.chosen[-2]) else 0
            self.control.note_tokens(row, self.tokens[row], [7] * checked + [7 if run > checked else 8], k, n_rows)
            self.tokens[row] += checked + 1
        if k or not drafts:
            known = {"positions": [n - 1 for n in self.tokens], "guesses": [[7] * MAX_GUESSES] * n_rows}
            matched = [(DRAFTED if drafts else 3) if chance else 0 for chance in self.chances]
            self.control.note_guesses(NewestSteps([[0] * n_rows], [[0.0]], n_guesses=k, matched=matched, **known))  # type: ignore[arg-type]

    def run(self, n_tokens: int) -> None:
        while min(self.tokens) < n_tokens:
            self.step()


def test_without_a_guess_nothing_is_checked() -> None:
    control = control_with_costs(0.1)
    assert control.choose(1) == 0, "nothing is known of the row"
    told(control, 4, [-1] * 15, 0)
    assert control.choose(1) == 0


def test_accepted_guesses_raise_the_number_and_rejected_ones_lower_it() -> None:
    control = control_with_costs(0.1)
    world = World(control, [1.0], 0.1)
    world.run(200)
    assert world.chosen == sorted(world.chosen) and world.chosen[-1] == max(GUESS_COUNTS)
    world.chances = [0.0001]
    world.run(400)
    assert set(world.chosen[-20:]) == {0}
    told(control, world.tokens[0], [7] * 15, 2)
    assert control.choose(1) > 0, "a shorter n-gram has an estimate of its own"
    control.begin()
    told(control, 0, [7] * 15, 3)
    assert control.choose(1) > 0, "another call has another text"


@pytest.mark.parametrize("guess_cost", [0.0, 0.05])
@pytest.mark.parametrize("cost", [0.02, 0.1, 0.3, 1.5])
@pytest.mark.parametrize("chances", [[0.01], [0.3], [0.8], [0.95, 0.02], [0.9, 0.0, 0.7], [0.99] * 4])
def test_no_batch_is_slower_than_plain_steps(chances: list[float], cost: float, guess_cost: float) -> None:
    """Not even with unknown costs, and when the text changes to one that is guessed badly, again and again."""
    world = World(GuessControl(guess_cost=guess_cost), chances, cost)
    world.control.begin()
    for part in range(1, 7):
        world.run(100 * part)
        # Costs that are not measured may be taken for lower ones.
        allowed = CREDIT + 2 * cost * max(GUESS_COUNTS) ** 0.5
        assert world.seconds <= min(world.tokens) * (1 + CREDIT_SHARE) + allowed
        world.chances = [1 - chance for chance in chances] if part % 2 else chances
    if min(chances) >= 0.8 and cost <= 0.1:  # half of the time
        assert world.seconds < (0.9 if guess_cost else 0.8) * min(world.tokens)


def test_rows_that_are_followed_by_others_count_together() -> None:
    seconds = []
    for is_batch in (True, False):
        control = control_with_costs(0.2, n_rows=4)
        control.begin(is_batch)
        world = World(control, [0.95, 0.95, 0.95, 0.0001], 0.2)
        for _ in range(300):
            world.step()
        seconds.append(world.seconds / sum(world.tokens))
    assert seconds[1] < 0.8 * seconds[0], "three rows go fast, and one is slower than it was"


def test_numbers_whose_cost_is_unknown_follow_the_next_lower_one() -> None:
    world = World(GuessControl(), [1.0], 0.01)
    world.control.begin()
    world.run(100)
    first = [world.chosen.index(k) for k in GUESS_COUNTS]
    assert first == sorted(first), "each is measured before the next"


def test_a_draft_model_is_tried_again_at_little_cost() -> None:
    control = control_with_costs(0.2, guess_cost=0.2)
    world = World(control, [0.001], 0.2)
    world.run(3000)
    trials = [at for at, k in enumerate(world.chosen) if k and at > 500]
    assert trials and len(trials) < 0.1 * len(world.chosen)
    assert world.seconds < 1.02 * world.tokens[0] + 2
    world.chances = [0.95]
    world.chosen.clear()
    world.run(6000)
    assert len(world.chosen) < 0.4 * 3000 and world.chosen[-1] > 0, "its guesses are right now"


def test_a_draft_model_that_can_never_pay_off_is_not_tried() -> None:
    control = control_with_costs(1.2, guess_cost=1.0)
    world = World(control, [1.0], 1.2)
    world.run(2000)
    assert set(world.chosen) == {0}


def test_a_guess_that_costs_a_step_is_not_checked() -> None:
    world = World(control_with_costs(1.0), [0.9], 1.0)
    world.run(60)
    assert set(world.chosen) == {0}


def test_more_rows_leave_fewer_guesses_to_each() -> None:
    assert GuessControl().choices(1) == list(GUESS_COUNTS)
    assert GuessControl().choices(4) == [0, 1, 2, 3]
    assert GuessControl().choices(16) == [0]
    fixed = GuessControl(n_guesses=5)
    assert fixed.choices(16) == [0, 5] and fixed.choose(16) == 5


def test_the_rows_that_a_graph_runs_count() -> None:
    control = GuessControl(rows_run=lambda n_rows: graph_size(n_rows, 8))
    assert control.choices(4) == [0, 1, 2, 3] and control.choices(5) == control.choices(8) == [0, 1]


def test_a_trial_ends_where_more_rows_leave_no_guesses() -> None:
    control = control_with_costs(0.2, guess_cost=0.2)
    control._trial = 3
    control._rates[DRAFTED] = 0.0, 9.0
    for _ in range(2):
        control.note_time(9, 0, 1.0)
    assert control.choose(1) == 1 and control.choose(9) == 0


def test_rows_that_have_ended_do_not_count() -> None:
    control = control_with_costs(0.3, n_rows=4)
    for row in range(4):
        control.start_row(row)
        control._credit[row] = 9.0
    matched = [0, 0, 0, 3]
    control.note_guesses(NewestSteps([[0] * 4], [[0.0]], 1, 0, None, None, [4] * 4, 0, [[7] * 15] * 4, matched))
    control._rates[3] = 0.5 * 20, 20.0
    assert control.choose(4) == 0, "three rows would be slower"
    for row in (0, 1, 2):
        control.end_row(row)
    assert control.choose(4) == 1
    control.move_row(3, 0)
    assert control._credit == {0: 9.0} and set(control._rows) == {0}


def test_a_row_that_another_prompt_took_teaches_nothing() -> None:
    control = control_with_costs(0.0)
    told(control, 10, [7] * 15, 3)
    before = control.choose(1)
    for _ in range(20):
        control.note_tokens(0, 3, [8], 0)
    assert control.choose(1) == before
    control.end_row(0)
    assert control.choose(1) == 0


def test_statistics_add_up() -> None:
    control = control_with_costs(0.1)
    told(control, 4, [1, 2, 9, 9, 9], 3)
    control.note_tokens(0, 5, [1, 2, 3], 4)
    told(control, 7, [9] * 5, 3)
    control.note_tokens(0, 8, [4], 0)
    told(control, 8, [-1] * 5, 0)
    control.note_tokens(0, 9, [4], 3)
    stats = control.stats
    assert (stats.steps, stats.tokens, stats.checked, stats.accepted) == (3, 5, 4, 2)
    assert stats.tokens_per_step == pytest.approx(5 / 3) and stats.acceptance == 0.5


def test_times_between_a_gpus_outputs_are_steps_only_where_it_was_busy() -> None:
    control = GuessControl()
    control.begin()
    newest = NewestSteps([[0]], [[0.0]], positions=[1], n_guesses=3)
    for now, is_busy in ((0.0, True), (1.0, False), (9.0, True), (10.5, True)):
        control.note_received(newest, now, is_busy=is_busy)
    assert list(control._times[1, 3]) == [1.0, pytest.approx(1.5)]
