"""The decode suite: what it counts, when it refuses to time a peer, and what survives an interruption."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastllama.benchmarks import ceilings, models, run, timing
from fastllama.benchmarks.ceilings import MatmulProbe, ReadProbe
from fastllama.benchmarks.models import ModelSource, build, random_tensors
from fastllama.benchmarks.peer_table import notes, peer_table
from fastllama.benchmarks.peers import client
from fastllama.benchmarks.peers.client import PeerError
from fastllama.benchmarks.report import report
from fastllama.benchmarks.result_file import read_result
from fastllama.benchmarks.runner import Ours, Run, Runner
from fastllama.benchmarks.statistics import summarize
from fastllama.benchmarks.suites import comparison, decode
from fastllama.benchmarks.suites.comparison import SUITES, Case, Measured
from fastllama.benchmarks.tables import aligned
from fastllama.cli import bench as bench_command
from fastllama.speed_of_light import decode_step, total_bytes
from tests.support.checkpoints import random_weights, tiny_params, write_meta, write_tokenizer
from tests.support.comparisons import assert_same_answers

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 600, "multiple_of": 16}
SOURCE = ModelSource("tiny", shape=SHAPE)
ARGS = SOURCE.args(max_batch_size=3, max_seq_len=32)
CASE = Case("decode", batch=2, context=5, steps=4, rounds=2)


class Scripted:
    """A runner that says and takes what it is told, and remembers when it ran."""

    def __init__(self, name: str, step_seconds: float, log: list[str], tokens: int = 7, fails_at: int = -1) -> None:
        self.name, self.step_seconds, self.log, self.token, self.fails_at = name, step_seconds, log, tokens, fails_at
        self.calls = 0

    def run(self, prompts: list[list[int]], steps: int, logprobs: bool = False) -> Run:
        self.calls += 1
        if self.calls == self.fails_at:
            raise PeerError("it broke")
        self.log.append(self.name + ("?" if logprobs else ""))
        rows = [[self.token] * steps for _ in prompts]
        scores = [[-1.0] * steps for _ in prompts]
        seconds = [0.5 + step * self.step_seconds for step in range(steps)]
        return Run(rows, seconds, scores, [[1.0] * steps for _ in prompts]) if logprobs else Run(rows, seconds)


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> ReadProbe:
    """A probe that samples once, and of a small buffer."""
    monkeypatch.setattr(timing, "CPU_BUFFER_BYTES", 2**16)
    monkeypatch.setattr(ceilings, "CPU_MATMUL_SIZE", 16)
    monkeypatch.setattr(ceilings, "PROBE_SECONDS", 0.0)
    for kind in (ReadProbe, MatmulProbe):
        monkeypatch.setattr(kind.sample, "__defaults__", (0.0,))
    return ReadProbe(CPU)


def record_of(ours: Runner, peer: Runner | str, probe: ReadProbe, case: Case = CASE) -> dict[str, Any]:
    said: list[str] = []
    measured = comparison.measure(case, ARGS.vocab_size, ours, {"reference": peer}, probe, torch.float32, said.append)
    assert said[0] == "comparing outputs"
    record = dataclasses.asdict(case) | decode.record(case, measured, ARGS, torch.float32)
    json.dumps(record, allow_nan=False)
    return record


def shown(records: list[dict[str, Any]]) -> str:
    """Records as people see them."""
    return "\n".join([aligned(*peer_table(records, decode.COLUMNS)), *notes(records)])


def test_random_tensors_repeat_and_fill_the_model() -> None:
    first = dict(random_tensors(ARGS, 5, CPU, torch.float32))
    again = dict(random_tensors(ARGS, 5, CPU, torch.float32))
    other = dict(random_tensors(ARGS, 6, CPU, torch.float32))
    assert {name: tuple(tensor.shape) for name, tensor in first.items()} == ARGS.shapes
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in first)
    assert not torch.equal(first["layers.0.attention.wk.weight"], first["layers.1.attention.wk.weight"])
    assert first["output.weight"].std().item() == pytest.approx(models.RANDOM_STD, rel=0.1)
    assert first["norm.weight"].mean().item() == pytest.approx(1.0, abs=0.05)


def test_random_176m_is_the_model_it_says() -> None:
    args = ModelSource.named("random-176m").args(1, 64)
    assert (args.hidden_dim, args.head_dim) == (3584, 64)
    assert sum(torch.Size(shape).numel() for shape in args.shapes.values()) == pytest.approx(176e6, rel=0.01)


def test_model_source_survives_json_and_needs_one_origin() -> None:
    assert ModelSource(**json.loads(json.dumps(SOURCE.to_json()))) == SOURCE
    with pytest.raises(ValueError, match="folder or from a shape"):
        ModelSource("neither")
    with pytest.raises(ValueError, match="folder or from a shape"):
        ModelSource("both", ckpt_dir="x", shape=SHAPE)
    with pytest.raises(ValueError, match=r"unknown model 'gpt'.*random-176m"):
        ModelSource.named("gpt")


def test_build_gives_random_weights_a_printable_tokenizer() -> None:
    llm = build(SOURCE, ARGS, CPU, torch.float32, None)
    assert llm.tokenizer.n_words == ARGS.vocab_size
    assert llm.tokenizer.decode([65, 256, 343]) == "Aaadj"
    with pytest.raises(ValueError, match="at least 512 tokens, got 300"):
        small = dataclasses.replace(SOURCE, shape={**SHAPE, "vocab_size": 300})
        build(small, small.args(1, 8), CPU, torch.float32, None)


@pytest.mark.parametrize(("name", "value"), [("batch", 0), ("context", 0), ("steps", 1), ("rounds", 0)])
def test_case_rejects_sizes_that_measure_nothing(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        dataclasses.replace(CASE, **{name: value})  # type: ignore[arg-type]


def test_case_prompts_differ_by_row_and_repeat() -> None:
    prompts = CASE.prompts(600)
    assert [len(prompt) for prompt in prompts] == [5, 5] and prompts[0] != prompts[1]
    assert prompts == CASE.prompts(600)
    assert all(0 <= token < 600 for prompt in prompts for token in prompt)


def test_ours_runs_full_length_and_gives_the_stop_tokens_back() -> None:
    llm = build(SOURCE, ARGS, CPU, torch.float32, None)
    prompts = CASE.prompts(ARGS.vocab_size)
    expected, scores = llm.generate(prompts, CASE.steps, temperature=0.0, logprobs=True)
    stops = {expected[0][1]}
    llm.tokenizer.stop_tokens = stops
    run = Ours(llm).run(prompts, CASE.steps, logprobs=True)
    assert_same_answers((run.tokens, run.logprobs), (expected, scores))
    assert len(run.seconds) == CASE.steps and run.seconds == sorted(run.seconds)
    assert llm.tokenizer.stop_tokens is stops
    assert Ours(llm).run(prompts, CASE.steps).logprobs is None


def test_figures_count_decode_steps_only() -> None:
    runs = [Run([[0] * 3] * 2, [9.0, 9.5, 10.5]), Run([[0] * 3] * 2, [1.0, 1.25, 1.5])]
    case = dataclasses.replace(CASE, steps=3)
    step_bytes = total_bytes(decode_step(ARGS, torch.float32, 2, 6.5))
    ceilings = [8 * step_bytes / 1e9, 10 * step_bytes / 1e9]
    found = decode.record(
        case, Measured({"fastllama": runs}, {"fastllama": ceilings}, {}, 0.5, 0.0), ARGS, torch.float32
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


def test_measure_compares_first_then_alternates(probe: ReadProbe) -> None:
    log: list[str] = []
    record = record_of(Scripted("ours", 0.01, log), Scripted("peer", 0.03, log), probe)
    assert log == ["ours?", "peer?", "ours", "peer", "peer", "ours"]
    peer = record["peers"]["reference"]
    assert peer["status"] == "measured" and peer["agreement"]["tokens_compared"] == 8
    assert peer["ratio"]["p50"] == pytest.approx(3.0)
    assert record["tokens_per_second"]["p50"] == pytest.approx(200.0)
    assert peer["tokens_per_second"]["p50"] == pytest.approx(200.0 / 3)
    assert "3.00x" in shown([record])


def test_measure_takes_shares_of_the_higher_neighbour(probe: ReadProbe, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([10.0, 30.0, 20.0, 40.0, 20.0, 10.0])
    monkeypatch.setattr(probe, "sample", lambda: summarize([next(rates)]))
    record = record_of(Scripted("ours", 0.01, []), Scripted("peer", 0.01, []), probe)
    # Ours runs between samples 1 and 2, then between 5 and 6; the peer between 2 and 3, then 4 and 5.
    assert (record["read_gb_per_second"]["minimum"], record["read_gb_per_second"]["maximum"]) == (20.0, 30.0)
    assert record["peers"]["reference"]["read_gb_per_second"]["p50"] == 35.0


def test_measure_reports_a_wrong_peer_and_never_times_it(probe: ReadProbe) -> None:
    log: list[str] = []
    record = record_of(Scripted("ours", 0.01, log), Scripted("peer", 0.001, log, tokens=8), probe)
    assert log == ["ours?", "peer?", "ours", "ours"]
    peer = record["peers"]["reference"]
    assert peer["status"] == "disagrees" and "token 7 here, 8 there" in peer["reason"]
    assert "tokens_per_second" not in peer and "ratio" not in peer
    text = shown([record])
    assert "disagrees" in text and "x (" not in text


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_measure_goes_on_without_a_peer_that_breaks(probe: ReadProbe, fails_at: int) -> None:
    log: list[str] = []
    record = record_of(Scripted("ours", 0.01, log), Scripted("peer", 0.01, log, fails_at=fails_at), probe)
    assert record["peers"]["reference"]["status"] == "failed"
    assert record["peers"]["reference"]["reason"] == "it broke"
    assert "ratio" not in record["peers"]["reference"]
    assert record["tokens_per_second"]["count"] == CASE.rounds


def test_measure_skips_an_absent_peer_by_name(probe: ReadProbe) -> None:
    record = record_of(Scripted("ours", 0.01, []), "llama_models not installed", probe)
    assert record["peers"]["reference"] == {"status": "skipped", "reason": "llama_models not installed"}
    assert "reference skipped: llama_models not installed" in shown([record])


def test_table_is_aligned_and_warns_of_others(probe: ReadProbe) -> None:
    quiet = record_of(Scripted("ours", 0.01, []), "absent", probe) | {"other_cores": 0.0}
    lines = shown([quiet, *({**quiet, "batch": 16, "other_cores": cores} for cores in (1.5, 0.5))]).splitlines()
    assert len({len(line) for line in lines[:4]}) == 1
    assert sum("other programs used up to 1.5 cores during 2 of 3" in line for line in lines) == 1
    assert "other programs" not in shown([quiet])


def test_suite_measures_a_checkpoint_against_the_reference(tmp_path: Path, probe: ReadProbe) -> None:
    params = tiny_params()
    write_meta(tmp_path / "tiny", params, random_weights(params, seed=3))
    write_tokenizer(tmp_path / "tiny")
    source = ModelSource.folder(str(tmp_path / "tiny"), None)
    plan = run.Plan(source, CPU, torch.float32, batches=(1, 2), contexts=(3,), steps=3, rounds=1, peers=["reference"])
    result = run.run(plan, lambda text: None, tmp_path / "result.json")
    assert read_result(tmp_path / "result.json") == result
    assert [(record["batch"], record["peers"]["reference"]["status"]) for record in result.records] == [
        (1, "measured"),
        (2, "measured"),
    ]
    assert set(result.ceilings) == {"read", "copy", "matmul"} and not result.interrupted
    shown = report(result)
    assert "vs reference" in shown and "GB/s" in shown and "decode of tiny in float32" in shown


def test_suite_keeps_finished_cases_when_interrupted(
    tmp_path: Path, probe: ReadProbe, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []

    class Interrupted(Scripted):
        def run(self, prompts: list[list[int]], steps: int, logprobs: bool = False) -> Run:
            if len(prompts) == 2:
                raise KeyboardInterrupt
            return super().run(prompts, steps, logprobs)

    monkeypatch.setattr("fastllama.benchmarks.run.Ours", lambda llm: Interrupted("ours", 0.01, log))
    plan = run.Plan(SOURCE, CPU, torch.float32, batches=(1, 2), contexts=(3,), steps=3, rounds=1)
    result = run.run(plan, lambda text: None, tmp_path / "result.json")
    assert result.interrupted and [record["batch"] for record in result.records] == [1]
    assert read_result(tmp_path / "result.json") == result
    assert "interrupted" in report(result)


def test_suite_fails_before_measuring_where_it_cannot_write(tmp_path: Path) -> None:
    plan = run.Plan(SOURCE, CPU, torch.float32)
    with pytest.raises(OSError):
        run.run(plan, lambda text: pytest.fail(f"measured: {text}"), tmp_path / "nowhere" / "result.json")


def test_names_told_by_the_command_are_those_that_exist() -> None:
    assert SUITES == bench_command.SUITES
    assert models.MODEL_NAMES == bench_command.MODELS
    assert (*client.PEERS, "none") == bench_command.PEERS
    with pytest.raises(ValueError, match="unknown suite 'speed'"):
        run.Plan(SOURCE, CPU, torch.float32, suites=["speed"])  # type: ignore[list-item]
