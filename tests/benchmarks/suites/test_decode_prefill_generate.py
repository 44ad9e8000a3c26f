"""The figures of the decode, prefill and generate suites, from given runs."""

import dataclasses
import json
from typing import Any

import pytest
import torch

from fastllama.benchmarks.runners import Run
from fastllama.benchmarks.suites import decode, generate, prefill
from fastllama.benchmarks.suites.interleaved import Case, CaseRuns
from fastllama.benchmarks.tables import Columns, peer_columns, table_of
from fastllama.speed_of_light import decode_step, total_bytes, total_flops
from fastllama.speed_of_light import prefill as prefill_work
from tests.benchmarks.cases import ARGS, CASE, RAGGED

MATMUL = 1e-6  # TFLOP/s


def test_decode_counts_only_decode_steps() -> None:
    runs = [Run([[0] * 3] * 2, [9.0, 9.5, 10.5]), Run([[0] * 3] * 2, [1.0, 1.25, 1.5])]
    case = dataclasses.replace(CASE, steps=3)
    step_bytes = total_bytes(decode_step(ARGS, torch.float32, 2, 6.5))
    ceilings = [8 * step_bytes / 1e9, 10 * step_bytes / 1e9]
    found = decode.record(
        case, CaseRuns({"fastllama": runs}, {"fastllama": ceilings}, {}, 0.5, 0.0), ARGS, torch.float32
    )
    # 2 steps of 2 rows in 1.5 and in 0.5 seconds.
    assert found["samples_ts"] == [4 / 1.5, 8.0] and found["avg_ts"] == pytest.approx((4 / 1.5 + 8) / 2)
    assert found["samples_ns"] == [1_500_000_000, 500_000_000] and found["avg_ns"] == 1_000_000_000
    assert found["stddev_ns"] == pytest.approx(0.5e9 * 2**0.5)
    assert (found["tokens_per_second"]["minimum"], found["tokens_per_second"]["maximum"]) == (4 / 1.5, 8.0)
    assert found["itls"] == [[0.5, 1.0], [0.25, 0.25]]
    assert found["median_ttft_ms"] == 5000.0 and found["median_itl_ms"] == 375.0 and found["mean_itl_ms"] == 500.0
    assert (found["n_prompt"], found["n_gen"], found["n_depth"]) == (0, 2, 5)
    # Steps a second over those that the ceiling allows: 4/3 of 8 and 4 of 10.
    assert found["read_share"] == pytest.approx((4 / 3 / 8 + 4 / 10) / 2)
    assert found["warmup_seconds"] == 0.5


def run_taking(*seconds: float) -> Run:
    return Run([[0]] * 2, list(seconds))


def runs_of(ours: list[Run], peer: list[Run]) -> CaseRuns:
    ceilings = {"fastllama": [10.0] * len(ours), "reference": [10.0] * len(peer)}
    return CaseRuns({"fastllama": ours, "reference": peer}, ceilings, {"reference": {"status": "measured"}}, 0.0, 0.0)


def shown(record: dict[str, Any], columns: Columns) -> str:
    return table_of([record], {**columns, **peer_columns([record])}).text()


def test_prefill_counts_only_the_first_token() -> None:
    case = Case("prefill", batch=2, context=5, steps=1, rounds=2)
    found = prefill.record(
        case,
        runs_of([run_taking(0.5), run_taking(0.25)], [run_taking(1.0), run_taking(1.0)]),
        ARGS,
        torch.float32,
        MATMUL,
    )
    json.dumps(found, allow_nan=False)
    flops = total_flops(prefill_work(ARGS, torch.float32, [5, 5]))
    assert found["median_ttft_ms"] == 375 and found["tokens_per_second"]["maximum"] == 40
    assert (found["n_prompt"], found["n_gen"]) == (5, 0)
    assert found["tflops"] == pytest.approx(flops / 0.375 / 1e12)
    assert found["matmul_share"] == pytest.approx(found["tflops"] / 1e-6)
    assert found["peers"]["reference"]["ratio"]["p50"] == pytest.approx(3.0)
    text = shown(dataclasses.asdict(case) | found, prefill.COLUMNS)
    assert "3.00x (2.00-4.00)" in text and "vs reference" in text


def test_generate_counts_the_whole_call_and_every_token() -> None:
    ours, peer = [run_taking(0.5, 1.0, 1.5, 2.0)], [run_taking(1.0, 2.0, 3.0, 5.0)]
    found = generate.record(RAGGED, runs_of(ours, peer), ARGS, torch.float32, MATMUL)
    json.dumps(found, allow_nan=False)
    assert found["seconds"]["p50"] == 2.0 and found["tokens_per_second"]["p50"] == 3 * 4 / 2.0
    assert found["peers"]["reference"]["ratio"]["p50"] == 2.5
    assert found["least_seconds"] > 0 and found["share"] == pytest.approx(found["least_seconds"] / 2.0)
    assert found["output_throughput"] == 6.0 and found["total_token_throughput"] == (12 + 8 + 3 + 12) / 2
    assert found["median_e2el_ms"] == 2000
    assert "3-12" in shown(dataclasses.asdict(RAGGED) | found, generate.COLUMNS)
