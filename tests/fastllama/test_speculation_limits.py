"""The limits of speculation: against sums by hand, against the launches of the code, and against the notes."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from docs.speculation import CASES, GPU, N_GUESSES, model, setting, tables
from fastllama import ModelArgs, Transformer
from fastllama.draft import DraftGuesser
from fastllama.kernels.decode_state import DecodeState
from fastllama.memory_plan import plan_memory
from fastllama.speculation import Guesser, LookupGuesser, checked_step
from fastllama.speculation_limits import (
    CHECKING,
    DRAFTING,
    LOOK_UP,
    Setting,
    SharedModel,
    best_limits,
    expected_tokens,
    most_guesses,
    speculation_limits,
)
from fastllama.speed_of_light import (
    DATA_SHEETS,
    LAUNCH_GAP_S,
    DataSheet,
    Links,
    Machine,
    collectives_seconds,
    decode_step,
    least_seconds,
    total_flops,
)

NOTES = Path(__file__).resolve().parents[2] / "docs" / "performance-notes.md"
TINY = ModelArgs(dim=48, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=100, hidden_dim=80)
SMALLER = ModelArgs(dim=24, n_layers=1, n_heads=2, n_kv_heads=2, vocab_size=100, hidden_dim=40)
SLOW = DataSheet(Machine(read=1e6, matmul=1e7), link_bandwidth=1e5, memory=1e9)
GOAL = 1.10  # of a plain step, for checking 4 guesses


# The launches of each op of the fused backend, as `kernels/fused.py` says, by the name of its work.
OPS = {
    "embed": ("embed", 1),
    "norm_qkv_rope_append": ("qkv", 1),
    "attention": ("attention", 1),
    "linear_residual": ("output and down", 1),
    "norm_swiglu": ("gate+up", 1),
    "norm_lm_head": ("head", 1),
    "sample": ("sampling", 2),
    "window": ("window", 1),
    "accept": ("accept", 1),
    "look_up": ("look up", 1),
    "put_guess": ("guess", 1),
}


class CountedOps:
    """A backend that counts the launches of its ops."""

    def __init__(self, ops: Any) -> None:
        self.ops, self.counts = ops, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        if name in OPS:
            work, count = OPS[name]
            self.counts[work] += count
        return getattr(self.ops, name)


def shared(args: ModelArgs, n_processes: int = 1) -> SharedModel:
    return SharedModel(args, torch.float32, n_processes=n_processes)


def test_expected_tokens_match_a_simulation() -> None:
    drawn, n_steps = random.Random(1), 20000
    for acceptance in (0.0, 0.3, 0.9, 1.0):
        tokens = 0
        for _ in range(n_steps):
            right = [drawn.random() < acceptance for _ in range(4)]
            tokens += 1 + [*right, False].index(False)
        assert tokens / n_steps == pytest.approx(expected_tokens(acceptance, 4), rel=0.02)
    assert expected_tokens(1.0, 4) == 5 and expected_tokens(0.7, 0) == 1
    with pytest.raises(ValueError, match="from 0 to 1, got 70"):
        expected_tokens(70, 4)


@pytest.mark.parametrize("n_processes", [1, 2])
def test_limits_match_a_sum_by_hand(n_processes: int) -> None:
    target, draft = shared(TINY, n_processes), shared(SMALLER, n_processes)
    here = Setting(SLOW, batch=2, context=7, launch_gap=0.01, collective_latency=0.1)

    def step(args: ModelArgs, tokens_per_row: int, n_others: int) -> float:
        work = decode_step(args.split(n_processes), torch.float32, 2, 7, tokens_per_row=tokens_per_row)
        links = Links(SLOW.link_bandwidth, 0.1)
        exchanging = collectives_seconds(args, torch.float32, 2 * tokens_per_row, n_processes, links)
        n_launches = 5 * args.n_layers + 4 + n_others
        return least_seconds(work, SLOW.machine) + n_launches * 0.01 + exchanging

    looked_up = speculation_limits(target, None, here, 3, 0.5)
    assert looked_up.plain == pytest.approx(step(TINY, 1, 0))
    assert looked_up.checking == pytest.approx(step(TINY, 4, 2)) and looked_up.guessing == pytest.approx(0.01)
    drafted = speculation_limits(target, draft, here, 3, 0.5)
    assert (drafted.plain, drafted.checking) == (looked_up.plain, looked_up.checking)
    assert drafted.guessing == pytest.approx(step(SMALLER, 2, 2) + 2 * step(SMALLER, 1, 2))
    assert drafted.plain_rate == pytest.approx(2 / drafted.plain)
    assert drafted.rate == pytest.approx(2 * 1.875 / (drafted.checking + drafted.guessing))
    assert drafted.speed_up == pytest.approx(1.875 * drafted.plain / (drafted.checking + drafted.guessing))
    assert drafted.checking_cost == pytest.approx(drafted.checking / drafted.plain)


def test_without_guesses_a_step_is_plain() -> None:
    for draft in (None, shared(SMALLER)):
        limits = speculation_limits(shared(TINY), draft, Setting(SLOW, 2, 7), 0, 0.5)
        assert (limits.checking, limits.guessing) == (limits.plain, 0)
        assert limits.rate == limits.plain_rate and limits.speed_up == limits.checking_cost == 1


def test_the_best_number_is_the_best_of_all() -> None:
    here = setting()
    pairs = ((model("3.1-8B"), None), (model("3.1-8B"), model("3.2-1B")))
    for target, draft in pairs:
        for acceptance in (0.0, 0.4, 0.7):
            best = best_limits(target, draft, here, acceptance)
            rates = [speculation_limits(target, draft, here, k, acceptance).rate for k in range(16)]
            assert best.rate == max(rates) and best.n_guesses == rates.index(max(rates))
    assert best_limits(*pairs[1], here, 0.0).n_guesses == 0
    assert [most_guesses(n) for n in (1, 2, 3, 5, 8, 9, 100)] == [15, 7, 4, 2, 1, 0, 0]
    assert best_limits(*pairs[0], replace(here, batch=9), 0.9).speed_up == 1


def test_launches_are_those_of_the_code() -> None:
    """The ops that a step calls, and that each kind of guesser calls, are the works that are counted."""

    def transformer(args: ModelArgs) -> Transformer:
        built = Transformer(replace(args, max_batch_size=2, max_seq_len=64), device="cpu", backend="reference")
        vars(built)["ops"] = CountedOps(built.ops)
        return built

    def counted(work: Any) -> Counter[str]:
        names = {"output": "output and down", "down": "output and down"}
        found: Counter[str] = Counter()
        for one in work:
            found[names.get(one.name, one.name)] += one.count
        return found

    target, draft, n_guesses = transformer(TINY), transformer(SMALLER), 4
    guessers: list[tuple[Guesser, Transformer | None]] = [
        (LookupGuesser(target), None),
        (DraftGuesser(target, draft), draft),
    ]
    for guesser, drafting in guessers:
        state = DecodeState.of(2, 16, TINY.vocab_size, target.device).with_guesses(64)
        guesser.prepare()
        for one in (target, draft):
            one.ops.counts.clear()
        checked_step(target, state, guesser, n_guesses, None)
        step = decode_step(TINY, torch.float32, 2, 0, tokens_per_row=n_guesses + 1)
        assert target.ops.counts == counted([*step, *CHECKING, *(() if drafting else LOOK_UP)])
        draft_step = [*decode_step(SMALLER, torch.float32, 2, 0), *DRAFTING]
        assert draft.ops.counts == counted(draft_step * n_guesses if drafting else [])


def test_limits_refuse_what_cannot_be() -> None:
    here = Setting(SLOW, 1, 7)
    for n_guesses in (-1, 16):
        with pytest.raises(ValueError, match=f"0 to 15 guesses, got {n_guesses}"):
            speculation_limits(shared(TINY), None, here, n_guesses, 0.5)
    with pytest.raises(ValueError, match="draft model runs on 1 processes, the target on 2"):
        speculation_limits(shared(TINY, 2), shared(SMALLER), here, 4, 0.5)


@pytest.mark.parametrize("gap", [0.0, 1e-6, LAUNCH_GAP_S, 1e-5])
@pytest.mark.parametrize(
    ("name", "quantize", "n_processes"),
    [("3.1-8B", None, 1), ("3.1-70B", "int8", 1), ("3.1-70B", None, 2), ("3.1-70B", None, 4), ("3.1-70B", None, 8)],
)
def test_checking_reaches_its_goal_in_the_limit(name: str, quantize: str | None, n_processes: int, gap: float) -> None:
    """Also where no flop is hidden behind a load: of 8 tokens, to which the kernels for few tokens pad 5."""
    target = model(name, quantize, n_processes)
    limits = speculation_limits(target, None, setting(gap), N_GUESSES, 0.7)
    cost = (limits.checking + limits.guessing) / limits.plain
    assert 1 < cost < 1.01 < GOAL
    share = target.args.split(n_processes)
    padded = decode_step(share, target.dtype, 1, setting().context, target.schemes, tokens_per_row=8)
    assert cost + total_flops(padded) / DATA_SHEETS[GPU].machine.matmul / limits.plain < GOAL


def test_models_of_the_notes_fit() -> None:
    """The target and the draft model together, in the memory of each GPU."""
    for name, quantize, draft, draft_quantize, n_processes in CASES:
        total = 0
        for one, precision in ((name, quantize), (draft, draft_quantize)):
            args, dtype, *_ = model(one) if one else (None, None)
            if args is not None and dtype is not None:
                plan = plan_memory(args, dtype, 1, args.max_seq_len, n_processes=n_processes, quantize=precision)
                total += plan.total
        assert total <= DATA_SHEETS[GPU].memory


def test_the_notes_have_the_figures() -> None:
    """docs/performance-notes.md has the tables, and figures in the text around them."""
    notes = NOTES.read_text()
    for table in tables():
        assert table in notes, table
    text, seconds = " ".join(notes.split()), []
    for target in (model("3.1-8B"), model("3.1-70B", "int8")):
        limits = speculation_limits(target, None, setting(), N_GUESSES, 0.7)
        work = decode_step(target.args, target.dtype, 1, setting().context, target.schemes, tokens_per_row=8)
        flops = total_flops(work) / DATA_SHEETS[GPU].machine.matmul
        seconds.append((limits.plain, limits.checking + limits.guessing, flops))
    (plain, checking, flops), (plain_70b, checking_70b, flops_70b) = seconds
    assert f"{checking / plain:.3f} plain steps of 8B, and {checking_70b / plain_70b:.3f} of 70B in int8" in text
    leaves = (GOAL * plain - checking) * 1e6
    assert f"leaves {leaves:.0f} µs for 8B" in text
    assert f"take {flops * 1e6:.0f} µs for 8B and {flops_70b * 1e6:,.0f} µs for 70B in int8" in text
    shown = [f"{(checked + hidden) / single:.2f}" for single, checked, hidden in seconds]
    assert f"checking would cost {shown[0]} and {shown[1]}" in text
    parts = []
    for name in ("3.2-1B", "3.1-8B"):
        with_gap, without = (speculation_limits(model(name), None, setting(gap), 0, 0).plain for gap in (None, 0.0))
        parts.append(f"{1 - without / with_gap:.0%} for {name}")
    assert " and ".join(parts) in text
