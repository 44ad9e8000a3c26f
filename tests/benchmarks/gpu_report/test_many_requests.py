"""The GPU report's section about many requests, rehearsed on a CPU."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fastllama.benchmarks.environment import describe_environment
from fastllama.benchmarks.gpu_report import many_requests
from fastllama.benchmarks.gpu_report.markdown import summary
from fastllama.benchmarks.gpu_report.measurements import Bench
from fastllama.benchmarks.gpu_report.sizes import FULL, TOY
from fastllama.benchmarks.result_file import ResultFile
from fastllama.benchmarks.suites.requests import RequestsCase
from tests.benchmarks.cases import SPEC


@pytest.mark.slow
def test_the_engine_and_fixed_batches_answer_the_same_requests(tmp_path: Path) -> None:
    bench = Bench(torch.device("cpu"), TOY, tmp_path)
    warm, *engine, fixed = (record for record in many_requests.many_requests(bench) if isinstance(record, dict))
    assert warm["program"] == "warm-up" and warm["seconds"] > 0
    assert [(one["program"], one["batch"]) for one in engine] == [("engine", 1), ("engine", 2)]
    assert (fixed["program"], fixed["batch"]) == ("fixed-8", 1)
    for record in (*engine, fixed):
        assert record["requests"] == 3 and record["seconds"] > 0 < record["tokens_per_second"]
        assert record["median_e2el_ms"] >= record["median_ttft_ms"] > 0
    for record in engine:
        assert record["decode_steps"] > 0 and record["decoder_step_milliseconds"] > 0
        assert 0 < record["host_milliseconds"] <= record["step_milliseconds"]
    records = [{"suite": "engine", **record} for record in (warm, *engine, fixed)]
    page = summary(ResultFile(describe_environment("cpu"), {}, records))
    assert "## Many requests through the engine" in page and "host milliseconds" in page


def test_only_the_hosts_work_counts_and_the_decoder_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = SPEC.build()
    receive = llm.decoder.receive_newest

    def slow() -> Any:
        time.sleep(0.02)  # the device
        return receive()

    monkeypatch.setattr(llm.decoder, "receive_newest", slow)
    workload = RequestsCase("requests", 2, 8, 8, requests=2).workload(llm.model.vocab_size, 0)
    found = many_requests._step_times(llm, workload)
    assert found["decode_steps"] > 0 and found["step_milliseconds"] - found["host_milliseconds"] > 19
    assert llm.decoder.receive_newest is slow


def test_without_a_step_in_which_all_rows_decode_there_are_no_times() -> None:
    llm = SPEC.build()
    workload = RequestsCase("requests", 3, 8, 8, requests=2).workload(llm.model.vocab_size, 0)
    assert many_requests._step_times(llm, workload) == {"decode_steps": 0}


def test_the_cache_holds_what_is_at_a_time() -> None:
    assert all(one <= FULL.requests for one in FULL.requests_at_a_time)
    assert (FULL.longest_prompt, FULL.longest_answer) == (512, 256)
