"""The prefill and generate suites, and the peers that they are run against."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastllama.benchmarks import run
from fastllama.benchmarks.ceilings import Ceiling, ReadProbe
from fastllama.benchmarks.models import PUBLISHED_MODELS, ModelSource, build
from fastllama.benchmarks.peer_table import peer_table
from fastllama.benchmarks.peers import client
from fastllama.benchmarks.peers.agreement import compare
from fastllama.benchmarks.peers.client import Peer
from fastllama.benchmarks.report import report
from fastllama.benchmarks.runner import Ours, Run
from fastllama.benchmarks.statistics import summarize
from fastllama.benchmarks.suites import comparison, generate, kernels, load_and_memory, prefill
from fastllama.benchmarks.suites.comparison import Case, Measured
from fastllama.benchmarks.tables import aligned
from fastllama.speed_of_light import prefill as prefill_work
from fastllama.speed_of_light import total_flops
from tests.benchmarks.suites.test_decode import ARGS, CPU, SOURCE, Scripted, probe
from tests.support.checkpoints import random_weights, tiny_params, write_meta, write_tokenizer

__all__ = ["probe"]  # a fixture
COPY = Ceiling("copy", "GB/s", "given", summarize([1e-6]))
MATMUL = 1e-6  # TFLOP/s
RAGGED = Case("generate", batch=3, context=12, steps=4, rounds=1)


def run_taking(*seconds: float) -> Run:
    return Run([[0]] * 2, list(seconds))


def measured(ours: list[Run], theirs: list[Run]) -> Measured:
    ceilings = {"fastllama": [10.0] * len(ours), "reference": [10.0] * len(theirs)}
    return Measured({"fastllama": ours, "reference": theirs}, ceilings, {"reference": {"status": "measured"}}, 0.0, 0.0)


def test_ragged_prompts_are_spread_from_the_longest_down() -> None:
    assert RAGGED.lengths == [12, 8, 3] and [len(prompt) for prompt in RAGGED.prompts(600)] == [12, 8, 3]
    assert Case("generate", 1, 9).lengths == [9] and Case("prefill", 2, 9, 1).lengths == [9, 9]
    assert Case("generate", 2, 1).lengths == [1, 1]


def test_prefill_counts_the_first_token_alone() -> None:
    case = Case("prefill", batch=2, context=5, steps=1, rounds=2)
    found = prefill.record(
        case,
        measured([run_taking(0.5), run_taking(0.25)], [run_taking(1.0), run_taking(1.0)]),
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
    shown = aligned(*peer_table([dataclasses.asdict(case) | found], prefill.COLUMNS))
    assert "3.00x (2.00-4.00)" in shown and "vs reference" in shown


def test_generate_counts_the_whole_call_and_every_token() -> None:
    ours, theirs = [run_taking(0.5, 1.0, 1.5, 2.0)], [run_taking(1.0, 2.0, 3.0, 5.0)]
    found = generate.record(RAGGED, measured(ours, theirs), ARGS, torch.float32, MATMUL)
    json.dumps(found, allow_nan=False)
    assert found["seconds"]["p50"] == 2.0 and found["tokens_per_second"]["p50"] == 3 * 4 / 2.0
    assert found["peers"]["reference"]["ratio"]["p50"] == 2.5
    assert found["least_seconds"] > 0 and found["share"] == pytest.approx(found["least_seconds"] / 2.0)
    assert found["output_throughput"] == 6.0 and found["total_token_throughput"] == (12 + 8 + 3 + 12) / 2
    assert found["median_e2el_ms"] == 2000
    assert "3-12" in aligned(*peer_table([dataclasses.asdict(RAGGED) | found], generate.COLUMNS))


def test_a_peer_that_disagrees_in_any_suite_is_not_timed(probe: ReadProbe) -> None:
    log: list[str] = []
    wrong = Scripted("peer", 0.001, log, tokens=8)
    found = comparison.measure(
        RAGGED, 600, Scripted("ours", 0.01, log), {"reference": wrong}, probe, torch.float32, lambda text: None
    )
    record = generate.record(RAGGED, found, ARGS, torch.float32, MATMUL)
    assert record["peers"]["reference"]["status"] == "disagrees" and "seconds" not in record["peers"]["reference"]
    assert "disagrees" in aligned(*peer_table([dataclasses.asdict(RAGGED) | record], generate.COLUMNS))
    assert "peer" not in log


@pytest.mark.parametrize("name", ["reference", "transformers"])
def test_peers_give_our_tokens_to_ragged_prompts(name: str) -> None:
    prompts = RAGGED.prompts(ARGS.vocab_size)
    ours = Ours(build(SOURCE, ARGS, CPU, torch.float32, None)).run(prompts, 8, logprobs=True)
    with Peer(name, SOURCE, device=CPU, dtype=torch.float32, max_batch_size=3, max_seq_len=32) as peer:
        theirs = peer.run(prompts, 8, logprobs=True)
        again = peer.run(prompts, 8)
    agreement = compare(ours, theirs, torch.float32)
    assert agreement.agrees and agreement.tokens_compared == 24, agreement.difference
    assert again.tokens == theirs.tokens and len(again.seconds) == 8 and again.seconds == sorted(again.seconds)


@pytest.mark.slow
def test_transformers_takes_scaled_rope_and_tied_output() -> None:
    shape: dict[str, Any] = SOURCE.shape | {
        "use_scaled_rope": True,
        "rope_scaling_factor": 32.0,
        "rope_theta": 500000.0,
        "tied_output": True,
    }
    source = dataclasses.replace(SOURCE, shape=shape)
    prompts = RAGGED.prompts(ARGS.vocab_size)
    args = source.args(3, 32)
    ours = Ours(build(source, args, CPU, torch.float32, None)).run(prompts, 4, logprobs=True)
    with Peer("transformers", source, device=CPU, dtype=torch.float32, max_batch_size=3, max_seq_len=32) as peer:
        agreement = compare(ours, peer.run(prompts, 4, logprobs=True), torch.float32)
    assert agreement.agrees, agreement.difference


def test_all_suites_run_in_one_result(probe: ReadProbe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ROTATED_BYTES", 1)
    # What torch.compile gives is compared in test_op_times.py; here it would take most of the time.
    monkeypatch.setattr(kernels, "compiled", lambda ops: ops)
    plan = run.Plan(
        SOURCE, CPU, torch.float32, suites=comparison.SUITES, batches=(2,), contexts=(4,), steps=3, rounds=1
    )
    result = run.run(plan, lambda text: None)
    assert {record["suite"]: record["steps"] for record in result.records} == {
        "kernels": None,
        "decode": 3,
        "prefill": 1,
        "generate": 3,
        "load": 3,
        "memory": 3,
    }
    assert run.failures(result) == []
    for in_markdown in (False, True):
        shown = report(result, in_markdown)
        parts = ["kernels of tiny", "decode of tiny", "prefill of tiny", "ttft ms p50", "generate on tiny"]
        parts += ["memory of tiny", "not run: random"]
        assert all(part in shown for part in parts)
        assert ("| --- |" in shown) is in_markdown


@pytest.mark.slow
def test_load_and_memory_are_those_of_a_fresh_process(tmp_path: Path) -> None:
    params = tiny_params()
    write_meta(tmp_path, params, random_weights(params, seed=3), shards=2)
    write_tokenizer(tmp_path)
    source = ModelSource.folder(str(tmp_path), None)
    how = {"device": "cpu", "dtype": "float32", "backend": None, "nproc": 1}
    loaded = load_and_memory.load_record(Case("load", 2, 8, 2, rounds=2), source, how, COPY)
    json.dumps(loaded, allow_nan=False)
    files = load_and_memory.weight_files(tmp_path)
    assert len(files) == 2 and loaded["checkpoint_bytes"] == sum(path.stat().st_size for path in files)
    assert loaded["seconds"]["count"] == 2 and loaded["seconds"]["minimum"] > 0
    assert "GB/s" in aligned(*load_and_memory.load_table([loaded | {"batch": 2, "context": 8}]))
    record = load_and_memory.memory_record(Case("memory", 2, 8, 2), source, how)
    planned = record["planned"]
    assert planned["total"] == planned["weights"] + planned["cache"] + planned["workspace"] > 0
    assert record["peak_bytes"] >= record["held_bytes"] > 0
    with pytest.raises(load_and_memory.LoadError, match="nowhere"):
        load_and_memory.memory_record(
            Case("memory", 1, 8, 2), ModelSource("no", ckpt_dir="nowhere", tokenizer_path="x"), how
        )


@pytest.mark.parametrize(
    ("name", "billions", "hidden_dim"),
    [
        ("llama3-8b", 8.03, 14336),
        ("llama3-70b", 70.55, 28672),
        ("llama3.1-8b", 8.03, 14336),
        ("llama3.2-1b", 1.24, 8192),
        ("llama3.2-3b", 3.21, 8192),
    ],
)
def test_published_shapes_have_the_published_sizes(name: str, billions: float, hidden_dim: int) -> None:
    args = ModelSource.named(name).args(1, 64)
    counted = [name for name in args.shapes if not (args.tied_output and name == "output.weight")]
    assert sum(torch.Size(args.shapes[name]).numel() for name in counted) / 1e9 == pytest.approx(billions, abs=0.005)
    assert args.hidden_dim == hidden_dim and name in PUBLISHED_MODELS


def test_every_peer_is_a_module_with_its_packages() -> None:
    assert all(kind.module.startswith("fastllama.benchmarks.") for kind in client.PEERS.values())
