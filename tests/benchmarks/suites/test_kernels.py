"""The kernels suite compares every implementation of an op first, and does not time wrong ones."""

import dataclasses
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama.benchmarks.bench import failures
from fastllama.benchmarks.ceilings import Probes, ReadProbe
from fastllama.benchmarks.models import ModelSpec
from fastllama.benchmarks.result_file import ResultFile
from fastllama.benchmarks.suites import kernels, op_cases
from fastllama.benchmarks.suites.kernels import Bench, WrongOutput, check_draw, measure_op
from fastllama.benchmarks.suites.op_cases import Inputs, Op, ops_of
from fastllama.benchmarks.tables import peer_columns, table_of
from fastllama.kernels import reference
from fastllama.speed_of_light import decode_step, prefill
from tests.benchmarks.cases import CPU, SOURCE
from tests.support.tiers import parameters

MODEL = ModelSpec(SOURCE, CPU, torch.float32, max_batch_size=2, max_seq_len=8)
ARGS = MODEL.args
ROWS, CONTEXT = 2, 5
OPS = {op.name: op for op in ops_of(MODEL, ROWS, CONTEXT)}


def silent(text: str) -> None:
    pass


@pytest.fixture
def bench(probe: ReadProbe, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Bench]:
    """A function that makes a Bench with few copies and without torch.compile, which would take most of the time."""
    monkeypatch.setattr(kernels, "COPIES_BYTES", 2**15)
    monkeypatch.setattr(kernels, "compiled", lambda ops: ops)
    return lambda backend="reference", dtype=torch.float32: Bench(
        dataclasses.replace(MODEL, backend=backend, dtype=dtype), 2, Probes(CPU, dtype)
    )


def test_ops_have_the_work_of_a_step_and_a_prefill() -> None:
    step = {work.name: work for work in decode_step(ARGS, torch.float32, ROWS, CONTEXT)}
    prompts = {work.name: work for work in prefill(ARGS, torch.float32, [CONTEXT] * ROWS)}
    assert [OPS[name].work for name in step if name != "sampling"] == [
        step[name] for name in step if name != "sampling"
    ]
    assert {"greedy", "top-p"} < OPS.keys()
    assert all(OPS[f"prefill {name}"].work == prompts[name] for name in op_cases.IN_PREFILL)
    fewer = [op.name for op in ops_of(MODEL, ROWS, CONTEXT, every=False)]
    assert fewer == ["attention", *(f"prefill {name}" for name in op_cases.IN_PREFILL)]


def test_copies_differ_and_repeat_and_exceed_the_caches(bench: Callable[..., Bench]) -> None:
    found = bench().copies(OPS["down"])
    assert 1 < len(found) <= kernels.MAX_COPIES
    assert sum(one.n_bytes for one in found) >= kernels.COPIES_BYTES or len(found) == kernels.MAX_COPIES
    assert not torch.equal(found[0].weight, found[1].weight)
    assert torch.equal(found[1].weight, OPS["down"].inputs(1).weight)
    assert all(bool(one.x.any()) for one in found)


@pytest.mark.parametrize("dtype", parameters({"fp32": torch.float32, "bf16": torch.bfloat16}, ("fp32",)))
@pytest.mark.parametrize("name", OPS)
def test_every_op_is_measured_against_its_peers(bench: Callable[..., Bench], name: str, dtype: torch.dtype) -> None:
    (op,) = (op for op in ops_of(dataclasses.replace(MODEL, dtype=dtype), ROWS, CONTEXT) if op.name == name)
    record = measure_op(op, bench(dtype=dtype), silent)
    json.dumps(record, allow_nan=False)
    assert record["op"] == name and record["microseconds"]["count"] == 2 * kernels.REPEATS
    assert {peer: one["status"] for peer, one in record["peers"].items()} == {
        "torch-compile": "measured",
        "library": "measured",
    }
    assert all(one["ratio"]["p50"] > 0 and one["microseconds"]["p50"] > 0 for one in record["peers"].values())
    table = table_of([record | {"batch": ROWS, "context": CONTEXT}], {**kernels.COLUMNS, **peer_columns([record])})
    assert table.rows[0][0] == name and "vs library" in table.head


@pytest.mark.parametrize("name", ["qkv", "attention", "gate+up", "top-p", "prefill qkv", "prefill attention"])
def test_interpreted_kernels_are_compared_and_not_timed(bench: Callable[..., Bench], name: str) -> None:
    record = measure_op(OPS[name], bench("fused"), silent)
    assert record["interpreted"] and record["status"] == "measured" and "mean nothing" in record["not_run"]
    assert "microseconds" not in record


@pytest.mark.parametrize("name", ["embed", "qkv", "attention", "output", "gate+up", "head", "greedy", "top-p"])
def test_a_wrong_kernel_is_reported_and_not_timed(
    bench: Callable[..., Bench], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, ours = OPS[name], bench()
    wrong = dataclasses.replace(op, spec=op.spec._replace(library=lambda inputs: _made_wrong(op, inputs)))
    peer = measure_op(wrong, ours, silent)["peers"]["library"]
    assert peer["status"] == "disagrees" and peer["reason"].startswith(f"{name}: ") and "ratio" not in peer
    # A backend with the reference's ops and row-major weights, whose outputs are made wrong.
    monkeypatch.setattr(ours, "ops", SimpleNamespace(embed=reference.embed, workspace=reference.workspace, pack=_plain))
    call = op.spec.call

    def wrong_call(backend: Any, inputs: Inputs) -> Any:
        return call(backend, inputs) if backend is reference else _made_wrong(op, inputs)

    record = measure_op(dataclasses.replace(op, spec=op.spec._replace(call=wrong_call)), ours, silent)
    assert record["status"] == "disagrees" and "microseconds" not in record and name in record["not_run"]
    result = ResultFile.__new__(ResultFile)
    object.__setattr__(result, "records", [record | {"suite": "kernels"}])
    assert any("fastllama disagrees" in failure for failure in failures(result))


def _plain(weight: Tensor) -> Tensor:
    return weight


def _made_wrong(op: Op, inputs: Inputs) -> Any:
    """The library's output with one wrong number: an unlikely token, or an element that is slightly wrong."""
    found = op.spec.library(inputs)
    if isinstance(found, tuple):
        return inputs.x.argmin(-1), found[1]
    flat = found.clone()
    flat.view(-1)[-1] += 0.01
    return flat


def test_a_projection_that_appends_nothing_is_wrong(bench: Callable[..., Bench]) -> None:
    op = OPS["qkv"]

    def without_append(inputs: Inputs) -> Any:
        before = inputs.cache.v.clone()
        found = op.spec.library(inputs)
        inputs.cache.v.copy_(before)
        return found

    wrong = dataclasses.replace(op, spec=op.spec._replace(library=without_append))
    assert measure_op(wrong, bench(), silent)["peers"]["library"]["status"] == "disagrees"


def test_a_peer_that_raises_is_reported(bench: Callable[..., Bench]) -> None:
    def fail(inputs: Inputs) -> Tensor:
        raise RuntimeError("no\nkernel " + "x" * 1000)

    op = OPS["down"]
    record = measure_op(dataclasses.replace(op, spec=op.spec._replace(library=fail)), bench(), silent)
    library = record["peers"]["library"]
    assert library["status"] == "failed" and library["reason"].startswith("down: no kernel x")
    assert len(library["reason"]) < 400 and record["microseconds"]["p50"] > 0


def test_a_drawn_token_must_be_in_the_nucleus() -> None:
    inputs = OPS["top-p"].inputs(0)
    scores = torch.log_softmax(inputs.x, -1)
    ordered, ids = torch.softmax(inputs.x.double() / op_cases.TEMPERATURE, -1).sort(-1, descending=True)
    last = (ordered.cumsum(-1) - ordered <= op_cases.TOP_P).sum(-1) - 1  # of the nucleus
    for place in (0 * last, last):
        tokens = ids.gather(-1, place[:, None])
        check_draw(inputs, tokens[:, 0], scores.gather(-1, tokens)[:, 0])
    beyond = ids.gather(-1, last[:, None] + 1)
    with pytest.raises(WrongOutput, match="cannot be chosen"):
        check_draw(inputs, beyond[:, 0], scores.gather(-1, beyond)[:, 0])
    best = ids[:, :1]
    with pytest.raises(WrongOutput, match="not close"):
        check_draw(inputs, best[:, 0], scores.gather(-1, best)[:, 0] + 0.01)
