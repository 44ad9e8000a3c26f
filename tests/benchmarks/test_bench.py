"""A run: all suites, the result file, interruption, and the checks before measuring."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastllama.benchmarks import bench, models
from fastllama.benchmarks.ceilings import ReadProbe
from fastllama.benchmarks.models import ModelSource
from fastllama.benchmarks.peers import registry
from fastllama.benchmarks.peers.registry import Peer
from fastllama.benchmarks.report import report
from fastllama.benchmarks.result_file import AS_STORED, read_result
from fastllama.benchmarks.runners import Run
from fastllama.benchmarks.suites import interleaved, kernels
from fastllama.benchmarks.suites.interleaved import SUITES, Case
from fastllama.benchmarks.suites.requests import RequestsCase
from fastllama.cli import bench as bench_command
from tests.benchmarks.cases import CPU, SOURCE, Scripted
from tests.support.checkpoints import random_weights, tiny_params, write_meta, write_tokenizer
from tests.support.quantized_folders import write_int4


def test_a_checkpoint_is_measured_against_the_reference(tmp_path: Path, probe: ReadProbe) -> None:
    params = tiny_params()
    write_meta(tmp_path / "tiny", params, random_weights(params, seed=3))
    write_tokenizer(tmp_path / "tiny")
    source = ModelSource.folder(str(tmp_path / "tiny"), None)
    plan = bench.Plan(source, CPU, torch.float32, batches=(1, 2), contexts=(3,), steps=3, rounds=1, peers=["reference"])
    result = bench.run(plan, lambda text: None, tmp_path / "result.json")
    assert read_result(tmp_path / "result.json") == result
    assert [(record["batch"], record["peers"]["reference"]["status"]) for record in result.records] == [
        (1, "measured"),
        (2, "measured"),
    ]
    assert set(result.ceilings) == {"read", "copy", "matmul"} and not result.interrupted
    shown = report(result)
    assert "vs reference" in shown and "GB/s" in shown and "decode of tiny in float32" in shown


def test_weights_that_are_quantised_in_the_files_are_named(tmp_path: Path, probe: ReadProbe) -> None:
    source = ModelSource.folder(str(write_int4(tmp_path / "small")), None)
    sizes: dict[str, Any] = {"suites": ["decode"], "batches": (1,), "contexts": (3,), "steps": 3, "rounds": 1}
    plan = bench.Plan(source, CPU, torch.float32, peers=["reference"], **sizes)
    result = bench.run(plan, lambda text: None)
    (record,) = result.records
    assert record["quantize"] == AS_STORED and record["peers"]["reference"]["status"] == "measured"
    assert "decode of small in float32, weights as stored, 1 rounds" in report(result)
    cases = [Case(suite, 1, 3, 3, 1) for suite in SUITES]
    for case in cases:
        stored, chosen = plan.record_of(case), replace(plan, quantize="int4").record_of(case)
        assert stored.get("quantize") == (None if case.suite == "kernels" else AS_STORED)  # its ops are dense
        assert chosen["quantize"] == "int4"
    titles = [report(replace(result, records=[{**record, "suite": suite, "not_run": "x"}])) for suite in SUITES]
    assert all("in float32, weights as stored" in title or "as float32, weights as stored" in title for title in titles)


def test_finished_cases_are_kept_when_interrupted(
    tmp_path: Path, probe: ReadProbe, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []

    class Interrupted(Scripted):
        def run(self, prompts: list[list[int]], steps: int, logprobs: bool = False) -> Run:
            if len(prompts) == 2:
                raise KeyboardInterrupt
            return super().run(prompts, steps, logprobs)

    monkeypatch.setattr("fastllama.benchmarks.bench.Ours", lambda llm: Interrupted("ours", 0.01, log))
    plan = bench.Plan(SOURCE, CPU, torch.float32, batches=(1, 2), contexts=(3,), steps=3, rounds=1)
    result = bench.run(plan, lambda text: None, tmp_path / "result.json")
    assert result.interrupted and [record["batch"] for record in result.records] == [1]
    assert read_result(tmp_path / "result.json") == result
    assert "interrupted" in report(result)


def test_a_file_that_cannot_be_written_fails_before_measuring(tmp_path: Path) -> None:
    plan = bench.Plan(SOURCE, CPU, torch.float32)
    with pytest.raises(OSError):
        bench.run(plan, lambda text: pytest.fail(f"measured: {text}"), tmp_path / "nowhere" / "result.json")


def test_the_command_names_every_suite_model_and_peer() -> None:
    assert SUITES == bench_command.SUITES
    assert models.MODEL_NAMES == bench_command.MODELS
    assert (*registry.PEERS, "none") == bench_command.PEERS
    with pytest.raises(ValueError, match="unknown suite 'speed'"):
        bench.Plan(SOURCE, CPU, torch.float32, suites=["speed"])  # type: ignore[list-item]


def test_more_requests_at_a_time_than_rows_need_one_number_of_rows() -> None:
    plan = bench.Plan(SOURCE, CPU, torch.float32, suites=["requests"], batches=(2,), contexts=(4,), clients=5)
    (case,) = plan.cases(["requests"])
    assert isinstance(case, RequestsCase) and (case.batch, case.concurrency) == (2, 5)
    with pytest.raises(ValueError, match="there must be one --batch"):
        bench.Plan(SOURCE, CPU, torch.float32, batches=(2, 4), clients=5)
    with pytest.raises(ValueError, match="no prefix or clients below 0"):
        bench.Plan(SOURCE, CPU, torch.float32, clients=-1)


def test_all_suites_run_in_one_result(probe: ReadProbe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "COPIES_BYTES", 1)
    # Replaces torch.compile, which would take most of the time.
    monkeypatch.setattr(kernels, "compiled", lambda ops: ops)
    plan = bench.Plan(
        SOURCE, CPU, torch.float32, suites=interleaved.SUITES, batches=(2,), contexts=(4,), steps=3, rounds=1
    )
    result = bench.run(plan, lambda text: None)
    assert {record["suite"]: record["steps"] for record in result.records} == {
        "kernels": None,
        "decode": 3,
        "prefill": 1,
        "generate": 3,
        "requests": 3,
        "speculate": 3,
        "load": 3,
        "memory": 3,
    }
    assert bench.failures(result) == []
    for in_markdown in (False, True):
        shown = report(result, in_markdown)
        parts = ["kernels of tiny", "decode of tiny", "prefill of tiny", "ttft ms p50", "generate on tiny"]
        parts += ["requests to tiny", "memory of tiny", "not run: random"]
        assert all(part in shown for part in parts)
        assert ("| --- |" in shown) is in_markdown


def test_gpt_fast_is_not_asked_for_ragged_prompts() -> None:
    peer = Peer.__new__(Peer)
    ragged, even = Case("generate", 3, 12), Case("decode", 3, 12)
    assert bench.runner_for("gpt-fast", peer, ragged) == "it takes equally long prompts only"
    assert bench.runner_for("gpt-fast", peer, even) is peer and bench.runner_for("reference", peer, ragged) is peer
