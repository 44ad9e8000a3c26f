"""The number of guesses follows what was accepted and what steps cost."""

from collections.abc import Sequence

import pytest

from fastllama.guess_control import GUESS_COUNTS, GuessControl
from fastllama.output_copies import NewestSteps


def told(control: GuessControl, position: int, guesses: Sequence[int], matched: int) -> None:
    control.note_guesses(NewestSteps([[0]], [[0.0]], positions=[position], guesses=[list(guesses)], matched=[matched]))


def control_with_costs(cost_of_a_guess: float) -> GuessControl:
    control = GuessControl()
    control.begin()
    for k in GUESS_COUNTS:
        control.note_time(1, k, 1.0 + cost_of_a_guess * k)
    return control


def test_without_a_guess_nothing_is_checked() -> None:
    control = control_with_costs(0.1)
    assert control.choose(1) == 0, "nothing is known of the row"
    told(control, 4, [-1] * 15, 0)
    assert control.choose(1) == 0


def test_accepted_guesses_raise_the_number_and_rejected_ones_lower_it() -> None:
    control = control_with_costs(0.1)
    chosen = []
    for position in range(40):
        told(control, position, [7] * 15, 3)
        chosen.append(control.choose(1))
        control.note_tokens(0, position + 1, [7], chosen[-1])
    assert chosen == sorted(chosen) and chosen[-1] == max(GUESS_COUNTS)
    for position in range(40, 80):
        told(control, position, [7] * 15, 3)
        chosen.append(control.choose(1))
        control.note_tokens(0, position + 1, [8], chosen[-1])
    assert chosen[40:] == sorted(chosen[40:], reverse=True) and chosen[-1] == 0
    told(control, 80, [7] * 15, 2)
    assert control.choose(1) > 0, "a shorter n-gram has an estimate of its own"
    control.begin()
    told(control, 0, [7] * 15, 3)
    assert control.choose(1) > 0, "another call has another text"


def test_a_guess_that_costs_a_step_is_not_checked() -> None:
    control = control_with_costs(1.0)
    for position in range(40):
        told(control, position, [7] * 15, 3)
        assert control.choose(1) == 0
        control.note_tokens(0, position + 1, [7], 0)


def test_more_rows_leave_fewer_guesses_to_each() -> None:
    assert GuessControl().choices(1) == list(GUESS_COUNTS)
    assert GuessControl().choices(4) == [0, 1, 2, 3]
    assert GuessControl().choices(16) == [0]
    fixed = GuessControl(n_guesses=5)
    assert fixed.choices(16) == [0, 5] and fixed.choose(16) == 5


def test_a_row_that_another_prompt_took_teaches_nothing() -> None:
    control = control_with_costs(0.1)
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
