"""Times of a decode step's launches: each call is recorded with its layer's tensors, and the model is unchanged."""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastllama.args import ModelArgs
from fastllama.benchmarks.statistics import summarize
from fastllama.benchmarks.suites import step_launches as timing
from fastllama.benchmarks.suites.step_launches import LaunchTime, columns, fill_cache, launch_times
from fastllama.benchmarks.tables import table_of
from fastllama.kernels import fused
from fastllama.kernels.sampling import sample
from fastllama.model import Transformer
from fastllama.speed_of_light import Machine, Work, decode_step

ARGS = ModelArgs(
    dim=32, n_layers=3, n_heads=2, n_kv_heads=1, vocab_size=64, multiple_of=16, max_batch_size=2, max_seq_len=16
)
NAMES = ["embed", "qkv", "attention", "output", "gate+up", "down", "head", "sampling"]


def transformer(backend: str = "reference", device: str | torch.device = "cpu") -> Transformer:
    torch.manual_seed(1)
    return Transformer(ARGS, device=device, dtype=torch.float32, backend=backend)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_every_launch_of_a_step_is_timed(temperature: float) -> None:
    model = transformer()
    times = launch_times(model, 2, 5, temperature=temperature, repeats=2)
    assert [one.work for one in times] == decode_step(ARGS, torch.float32, 2, 5)
    assert [one.work.name for one in times] == NAMES
    assert all(one.microseconds.count == 2 and one.microseconds.minimum > 0 for one in times)
    assert model.ops.__name__ == "fastllama.kernels.reference"
    used = model.cache.table[:, 0]
    assert len(set(used.tolist())) == 2 and model.cache.k[:, used].all() and model.cache.k.any((0, 2, 3, 4)).sum() == 2


def test_a_step_is_recorded_call_by_call(device: torch.device) -> None:
    """On the fused backend each call is one launch, and sampling two."""
    model = transformer("fused", device)
    with model.exclusively(), torch.inference_mode():
        calls = timing._recorded(model, 2, 5, 0.0, spare_steps=4)
        assert Counter(call.name for call in calls) == {name: 3 if name in NAMES[1:6] else 1 for name in NAMES}
        lengths = {call.name: len(_launched(call.run)) for call in reversed(calls)}
        assert lengths == {name: 2 if name == "sampling" else 1 for name in NAMES}


def _launched(run: Callable[[], object]) -> list[str]:
    """The wrappers of kernels that a call of the fused backend calls."""
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("gather", "few_tokens", "matvec", "attention_decode"):
            patch.setattr(fused, name, _counted(getattr(fused, name), seen))
        patch.setattr(fused, "rms_norm", _counted(fused.rms_norm, seen))
        patch.setattr(sample, "sample_and_advance", _counted(sample.sample_and_advance, seen, launches=2))
        run()
    return seen


def _counted(function: Callable[..., Any], seen: list[str], launches: int = 1) -> Callable[..., Any]:
    def counted(*arguments: Any, **named: Any) -> Any:
        seen.extend([function.__name__] * launches)
        return function(*arguments, **named)

    return counted


def test_calls_of_a_layer_read_that_layers_weights() -> None:
    model = transformer()
    with model.exclusively(), torch.inference_mode():
        calls = timing._recorded(model, 1, 4, 0.0, spare_steps=4)
        weights = [call.run.args[2] for call in calls if call.name == "qkv"]  # type: ignore[attr-defined]
        assert all(weight is layer.wqkv for weight, layer in zip(weights, model.layers, strict=True))


@pytest.mark.parametrize(("batch", "context"), [(0, 4), (3, 4), (1, 0), (1, 17)])
def test_more_rows_or_positions_than_the_cache_has_are_refused(batch: int, context: int) -> None:
    with pytest.raises(ValueError, match=f"2 rows of 16 positions, got {batch} rows of {context}"):
        launch_times(transformer(), batch, context)


def test_a_busy_model_is_refused_and_works_afterwards() -> None:
    model = transformer()
    with model.exclusively(), pytest.raises(RuntimeError, match="busy"):
        launch_times(model, 1, 4)
    assert len(launch_times(model, 1, 4, repeats=1)) == len(NAMES)


def test_fill_cache_does_not_change_other_rows() -> None:
    model = transformer()
    fill_cache(model, 1, 3)
    first = model.cache.table[0, 0]
    before = model.cache.v[:, first].clone()
    assert before.all() and model.cache.v.any((0, 2, 3, 4)).nonzero().tolist() == [[first]]
    fill_cache(model, 2, 3)
    assert model.cache.table[0, 0] == first != model.cache.table[1, 0]
    assert not torch.equal(model.cache.v[:, first], before) and model.cache.v[:, model.cache.table[1, 0]].all()


def test_records_and_table_hold_times_against_the_limit() -> None:
    machine = Machine(read=1e9, matmul=1e12)
    launches = [
        LaunchTime(Work("qkv", 2, bytes=2e5, flops=1e3), summarize([400.0])).against(machine),
        LaunchTime(Work("sampling", 2, bytes=0, flops=0), summarize([10.0])).against(machine),
    ]
    json.dumps(launches, allow_nan=False)
    assert launches[0]["least_microseconds"] == pytest.approx(200) and launches[0]["share"] == pytest.approx(0.5)
    records = [{"batch": 1, "context": 8, "launches": launches}]
    head, rows = table_of(records, columns(records))
    assert list(head) == ["batch", "context", "qkv x2", "sampling x2", "all, ms", "least, ms"]
    assert [list(row) for row in rows] == [[1, 8, "400 50%", "10.0", "0.82", "0.40"]]
