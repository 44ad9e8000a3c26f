"""The least times: bytes and flops against the published models' tables and against sums by hand."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastllama import ModelArgs
from fastllama.memory_plan import plan_memory
from fastllama.quantization import model_schemes
from fastllama.speed_of_light import (
    COLLECTIVE_LATENCY_S,
    DATA_SHEETS,
    Links,
    Machine,
    Work,
    collectives_seconds,
    decode_step,
    least_seconds,
    prefill,
    total_bytes,
    total_flops,
)

LLAMA_3_8B = ModelArgs(
    dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, vocab_size=128256, ffn_dim_multiplier=1.3, multiple_of=1024
)
LLAMA_3_2_1B = ModelArgs(
    dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, vocab_size=128256, ffn_dim_multiplier=1.5, multiple_of=256
)
DOCS = Path(__file__).resolve().parents[2] / "docs"
H200 = Machine(read=4.5e12, matmul=7.9e14)
BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("args", "gigabytes", "tokens_per_second", "bytes_per_position"),
    [(LLAMA_3_8B, 15.01, 300, 131072), (LLAMA_3_2_1B, 2.47, 1820, 32768)],
    ids=["8B", "1B"],
)
def test_published_models(args: ModelArgs, gigabytes: float, tokens_per_second: float, bytes_per_position: int) -> None:
    step = decode_step(args, BF16, batch=1, context=0)
    assert total_bytes(step) / 1e9 == pytest.approx(gigabytes, abs=0.005)
    assert 1 / least_seconds(step, H200) == pytest.approx(tokens_per_second, rel=0.002)
    longer = decode_step(args, BF16, batch=3, context=100)
    embedded = 2 * args.dim * BF16.itemsize
    assert total_bytes(longer) - total_bytes(step) - embedded == 3 * 100 * bytes_per_position
    assert sum(work.count for work in step) == 5 * args.n_layers + 4


@pytest.mark.parametrize(
    ("args", "quantize", "gigabytes", "goal"),
    [
        (LLAMA_3_8B, "int8", 7.51, 480),
        (LLAMA_3_8B, "fp8", 7.51, 480),
        (LLAMA_3_8B, "int4", 4.23, 700),
        (LLAMA_3_8B, "int4-g32", 4.89, 700),
        (LLAMA_3_2_1B, "int8", 1.24, 2300),
    ],
)
def test_quantised_models(args: ModelArgs, quantize: str, gigabytes: float, goal: int) -> None:
    """The goals on an H200 are 65 to 85% of the limit."""
    step = decode_step(args, BF16, batch=1, context=0, schemes=model_schemes(quantize, args))
    assert total_bytes(step) / 1e9 == pytest.approx(gigabytes, abs=0.005)
    assert 0.63 < goal * least_seconds(step, H200) < 0.85
    plain = decode_step(args, BF16, batch=1, context=0)
    assert [work.flops for work in step] == [work.flops for work in plain]


def test_a_launch_takes_the_longer_of_its_two_times() -> None:
    machine = Machine(read=100.0, matmul=1000.0)
    assert Work("a", 2, bytes=50, flops=100).least_seconds(machine) == 0.5
    assert Work("b", 1, bytes=50, flops=900).least_seconds(machine) == 0.9
    assert least_seconds([Work("a", 2, 50, 100), Work("b", 1, 50, 900)], machine) == pytest.approx(1.9)
    with pytest.raises(ValueError, match="read rate must be positive, got 0"):
        Machine(read=0, matmul=1)


def test_every_weight_is_counted_once() -> None:
    args = ModelArgs(dim=48, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=100, hidden_dim=80)
    sizes = {name: torch.Size(shape).numel() for name, shape in args.shapes.items()}
    elements = sum(sizes.values()) - sizes["tok_embeddings.weight"]
    assert total_bytes(decode_step(args, torch.float32, 5, 0)) == 4 * (elements + 5 * 48)
    matrices = elements - sum(size for name, size in sizes.items() if "norm" in name)
    assert total_flops(decode_step(args, torch.float32, 5, 0)) == 2 * 5 * matrices
    attention = {work.name: work for work in decode_step(args, torch.float32, 5, 7)}["attention"]
    assert (attention.bytes, attention.flops) == (2 * 2 * 8 * 5 * 7 * 4, 4 * 6 * 8 * 5 * 7)


def test_tokens_of_a_row_share_what_is_read() -> None:
    args = ModelArgs(dim=48, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=100, hidden_dim=80)
    plain = decode_step(args, torch.float32, 5, 7)
    checking = decode_step(args, torch.float32, 5, 7, tokens_per_row=4)
    assert [(one.name, one.count) for one in checking] == [(one.name, one.count) for one in plain]
    assert [one.flops for one in checking] == [4 * one.flops for one in plain]
    assert total_bytes(checking) == total_bytes(plain) + 3 * 5 * 48 * 4  # rows of the embedding
    with pytest.raises(ValueError, match="at least 1 token per row, got 0"):
        decode_step(args, torch.float32, 5, 7, tokens_per_row=0)


def test_launches_have_gaps_if_asked() -> None:
    machine, work = Machine(read=100.0, matmul=1000.0), [Work("a", 2, 50, 100), Work("b", 1, 50, 900)]
    assert least_seconds(work, machine, launch_gap=0.25) == pytest.approx(least_seconds(work, machine) + 3 * 0.25)


def test_prefill_attends_causally_and_reads_weights_once() -> None:
    args = ModelArgs(dim=48, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=100, hidden_dim=80)
    work = {one.name: one for one in prefill(args, torch.float32, [3, 1])}
    assert work["attention"].flops == 4 * 48 * (1 + 2 + 3 + 1)
    assert work["qkv"].bytes == 4 * (80 * 48 + 48) and work["qkv"].flops == 2 * 4 * 80 * 48
    assert work["head"].flops == 2 * 2 * 100 * 48
    assert "draw" not in work


def test_the_budget_in_the_notes_is_correct() -> None:
    """docs/performance-notes.md has the launches, megabytes and least times of an 8B step."""
    notes = (DOCS / "performance-notes.md").read_text()
    step = decode_step(LLAMA_3_8B, BF16, batch=1, context=128)
    for work in step:
        row = f"| {work.name} | {work.count} | {work.bytes / 1e6:.1f} | {work.least_seconds(H200) * 1e6:.1f} |"
        assert row in notes, row
    least = least_seconds(step, H200)
    assert f"| 164 | {total_bytes(step) / 1e6:,.0f} | **{least * 1e6:,.0f}**" in notes
    assert f"| tokens/s | | | {1 / least:.0f} |" in notes
    # The sums of the predictions are correct.
    rows = [re.split(r" *\| *", line)[1:-1] for line in notes.splitlines() if re.match(r"\| (\w|\+)+ \| \d+ \|", line)]
    for column, total in ((4, "3,916"), (5, "3,612")):
        assert round(sum(int(row[1]) * float(row[column]) for row in rows)) == int(total.replace(",", ""))


def test_collectives_match_a_sum_by_hand() -> None:
    args = ModelArgs(dim=48, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=100, hidden_dim=80)
    links = Links(bandwidth=1e6, latency=1e-3)
    assert collectives_seconds(args, torch.float32, 5, 1, links) == 0
    # Seven all-reduces of 5 x 48 numbers, which a ring of two sends once each; half of 5 x 100 logits.
    expected = 7 * (1e-3 + 5 * 48 * 4 / 1e6) + 1e-3 + 5 * 100 * 4 / 2 / 1e6
    assert collectives_seconds(args, torch.float32, 5, 2, links) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("3.1-8B", {"dim": 4096, "n_layers": 32, "n_heads": 32, "ffn_dim_multiplier": 1.3, "multiple_of": 1024}),
        ("3.1-70B", {"dim": 8192, "n_layers": 80, "n_heads": 64, "ffn_dim_multiplier": 1.3, "multiple_of": 4096}),
        ("3.1-405B", {"dim": 16384, "n_layers": 126, "n_heads": 128, "ffn_dim_multiplier": 1.2, "multiple_of": 4096}),
    ],
)
def test_the_plans_in_the_docs_are_correct(name: str, fields: dict[str, Any]) -> None:
    """docs/scaling.md has the memory and speed limits on several GPUs."""
    text = (DOCS / "scaling.md").read_text()
    args = ModelArgs(**fields, n_kv_heads=8, vocab_size=128256, max_seq_len=8192, max_batch_size=1)
    sheet = DATA_SHEETS["H100"]
    links = Links(sheet.link_bandwidth, COLLECTIVE_LATENCY_S)
    for n in (1, 2, 4, 8, 16) if name == "3.1-405B" else (1, 2, 4, 8):
        plan = plan_memory(args, BF16, 1, 8192, n_processes=n)
        exchanging = collectives_seconds(args, BF16, 1, n, links)
        seconds = least_seconds(decode_step(args.split(n), BF16, 1, 4096), sheet.machine) + exchanging
        limit = f"{1 / seconds:.0f} | {exchanging / seconds:.0%}" if plan.total <= sheet.memory else "does not fit |"
        row = f"| {name} | {n} | {plan.total / 2**30:.1f} | {limit} |"
        assert row in text, row
