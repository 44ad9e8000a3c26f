"""Many requests: the workload, ours on a tiny model, and the figures."""

import dataclasses
import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from fastllama.benchmarks import bench
from fastllama.benchmarks.ceilings import ReadProbe
from fastllama.benchmarks.report import report
from fastllama.benchmarks.runners import FixedBatches, OurEngine, ServedRun, Workload
from fastllama.benchmarks.suites import requests
from fastllama.benchmarks.suites.interleaved import CaseRuns
from fastllama.benchmarks.suites.requests import RequestsCase
from fastllama.generation import Llama
from fastllama.kernels.paged_cache import PAGE_TOKENS
from tests.benchmarks.cases import CPU, SOURCE, SPEC

CASE = RequestsCase("requests", batch=2, context=12, steps=9, rounds=2, requests=5)
RUN = ServedRun(
    tokens=[[7, 7, 7], [8], [9, 9]],
    starts=[0.0, 0.0, 1.0],
    times=[[1.0, 1.5, 3.0], [1.0], [4.0]],  # the last two tokens came together
    cached_tokens=4,
    preemptions=1,
)


@pytest.fixture(scope="module")
def llm() -> Llama:
    return dataclasses.replace(SPEC, max_batch_size=9, max_seq_len=256).build()


def test_lengths_are_log_uniform_and_the_same_in_every_case() -> None:
    case = RequestsCase("requests", 4, context=512, steps=256, requests=4000)
    for lengths, longest in ((case.lengths, 512), (case.output_lens, 256)):
        assert min(lengths) == 8 and longest - 2 <= max(lengths) <= longest
        edges = [8, *(2**power for power in range(4, longest.bit_length()))]
        shares = [sum(low <= one < high for one in lengths) / 4000 for low, high in pairwise(edges)]
        assert shares == pytest.approx([1 / len(shares)] * len(shares), abs=0.03)
    other = dataclasses.replace(case, batch=16, rounds=1)
    assert (other.lengths, other.output_lens) == (case.lengths, case.output_lens)
    assert set(dataclasses.replace(CASE, context=5, steps=2).lengths) == {5}, "shorter than the shortest"


def test_prompts_are_new_in_each_case_and_round_and_begin_with_the_prefix() -> None:
    case = dataclasses.replace(CASE, prefix=6)
    first, again, later = (case.workload(600, index) for index in (0, 0, 1))
    assert first == again and first.max_concurrency == 2
    assert [len(prompt) for prompt in first.prompts] == case.lengths == [6 + length for length in CASE.lengths]
    assert len({tuple(prompt[:6]) for prompt in first.prompts}) == 1
    assert len({tuple(prompt[6:]) for prompt in first.prompts}) == case.requests
    assert first.prompts[0][:6] != later.prompts[0][:6] and first.output_lens == later.output_lens
    assert dataclasses.replace(case, batch=4).workload(600, 0).prompts[0] != first.prompts[0]


@pytest.mark.parametrize(("name", "value"), [("requests", 0), ("prefix", -1), ("clients", -1), ("batch", 0)])
def test_sizes_that_measure_nothing_are_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        dataclasses.replace(CASE, **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("server", [OurEngine, FixedBatches])
def test_every_request_gets_its_tokens_at_times_in_order(llm: Llama, server: Callable[[Llama], Any]) -> None:
    workload = dataclasses.replace(CASE, requests=11, batch=9).workload(600, 0)
    run: ServedRun = server(llm).serve(workload, logprobs=True)
    assert [len(row) for row in run.tokens] == workload.output_lens
    assert run.logprobs is not None and [len(row) for row in run.logprobs] == workload.output_lens
    for place, (start, times) in enumerate(zip(run.starts, run.times, strict=True)):
        assert 0 <= start <= times[0] and times == sorted(times)
        assert 1 <= len(times) <= workload.output_lens[place]
    assert run.duration == max(times[-1] for times in run.times)
    assert run.preemptions == 0 and run.cached_tokens == 0
    assert server(llm).serve(workload).logprobs is None


def test_no_more_requests_than_allowed_run_at_a_time(llm: Llama) -> None:
    run = OurEngine(llm).serve(CASE.workload(600, 0))
    ends = [times[-1] for times in run.times]
    for place, start in enumerate(run.starts):
        assert sum(end > start for end in ends[:place]) < CASE.batch
    run = OurEngine(llm).serve(dataclasses.replace(CASE, clients=4).workload(600, 0))
    assert sum(start < min(ends) for start in run.starts) >= 4, "more than there are rows"
    fixed = FixedBatches(llm).serve(CASE.workload(600, 0))
    assert fixed.starts[0] == fixed.starts[1] < fixed.starts[2] == fixed.starts[3] < fixed.starts[4]


def test_a_common_prefix_is_computed_once_in_each_run(llm: Llama) -> None:
    case = dataclasses.replace(CASE, prefix=PAGE_TOKENS + 1)
    for _ in range(2):
        run = OurEngine(llm).serve(case.workload(600, 0))
        assert run.cached_tokens == PAGE_TOKENS * (case.requests - 1)
    assert FixedBatches(llm).serve(case.workload(600, 0)).cached_tokens == 0


def test_latencies_are_those_of_vllms_benchmark() -> None:
    assert list(requests.latencies(RUN)) == [
        ([1.0], [1.0], [0.5, 1.5], [3.0]),
        ([1.0], [], [], [1.0]),
        ([3.0], [0.0], [], [3.0]),
    ]


def test_a_record_has_vllms_names_and_counts_useful_tokens_only() -> None:
    case = dataclasses.replace(CASE, requests=3)
    runs = {"fastllama": [RUN, RUN], "peer": [dataclasses.replace(RUN, cached_tokens=None)] * 2}
    measured = CaseRuns(runs, {name: [1.0] * 2 for name in runs}, {"peer": {"status": "measured"}}, 0.0, 0.0)
    found = requests.record(case, measured)
    json.dumps(found, allow_nan=False)
    n_tokens = sum(case.output_lens)
    assert found["num_prompts"] == 3 and found["max_concurrency"] == 2 and found["total_output_tokens"] == n_tokens
    assert (
        found["duration"] == 4.0 and found["output_throughput"] == n_tokens / 4 and found["request_throughput"] == 0.75
    )
    assert found["total_token_throughput"] == (sum(case.lengths) + n_tokens) / 4
    assert (found["median_ttft_ms"], found["mean_tpot_ms"], found["mean_itl_ms"]) == (1000, 500, 1000)
    assert found["median_e2el_ms"] == 3000 and found["p99_itl_ms"] == pytest.approx(1500)
    assert (found["cached_tokens"], found["preemptions"], found["peers"]["peer"]["cached_tokens"]) == (4, 1, None)
    assert found["peers"]["peer"]["ratio"]["p50"] == 1.0


@pytest.mark.slow
def test_the_suite_compares_and_reports(probe: ReadProbe) -> None:
    plan = bench.Plan(
        SOURCE,
        CPU,
        torch.float32,
        suites=["requests"],
        batches=(1, 3),
        contexts=(10,),
        steps=9,
        rounds=2,
        requests=4,
        prefix=PAGE_TOKENS,
        peers=["reference", "transformers-continuous", "serve", "serve-whole"],
    )
    assert plan.model.max_seq_len == PAGE_TOKENS + 10 + 9
    result = bench.run(plan, lambda text: None)
    assert bench.failures(result) == []
    for record in result.records:
        peers = record["peers"]
        assert peers["reference"] == {"status": "skipped", "reason": "it is not measured with many requests"}
        for name in ("fixed-8", "transformers-continuous", "serve", "serve-whole"):
            assert peers[name]["status"] == "measured", peers[name]
            assert peers[name]["agreement"]["tokens_compared"] == record["total_output_tokens"]
        assert peers["serve"]["cached_tokens"] == peers["serve-whole"]["cached_tokens"] == record["cached_tokens"]
    shown = report(result)
    assert "requests to tiny in float32, 2 rounds: 4 with prompts of" in shown and "64 of them common" in shown
    assert "vs fixed-8" in shown and "vs transformers-continuous" in shown


def test_several_processes_and_impossible_numbers_are_refused() -> None:
    for fields, message in (({"nproc": 2}, "the engine of one process"), ({"requests": 0}, "at least 1 request")):
        with pytest.raises(ValueError, match=message):
            bench.Plan(SOURCE, CPU, torch.float32, suites=["requests"], **fields)  # type: ignore[arg-type]


def test_a_workload_fits_in_json() -> None:
    workload = CASE.workload(600, 0)
    assert Workload(*json.loads(json.dumps(workload))) == workload
