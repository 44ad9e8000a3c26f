"""The variants of a GPU report, and the sizes at which it measures complete steps."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fastllama.benchmarks.gpu_report import launch_search, quantized_weights, whole_steps
from fastllama.benchmarks.gpu_report.measurements import Bench
from fastllama.benchmarks.gpu_report.sizes import TOY
from fastllama.benchmarks.kernels_report.ahead_of_time import GPUS
from fastllama.kernels.projection import few_tokens

H200 = GPUS["sm_90"]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(torch.device("cpu"), TOY, tmp_path)


@pytest.mark.parametrize("batch", [1, 2])
def test_projections_are_tried_with_their_norms(batch: int, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    project = launch_search._project

    def noted(launch: Any, epilogue: dict[str, Any], *tensors: torch.Tensor) -> torch.Tensor:
        seen.append(epilogue)
        return project(launch, epilogue, *tensors)

    monkeypatch.setattr(launch_search, "_project", noted)
    records = list(launch_search._projections(bench, "toy", batch))
    assert not [record for record in records if record["microseconds"] is None]
    kinds = dict.fromkeys(tuple(sorted(epilogue)) for epilogue in seen)
    assert list(kinds) == [("append_to", "eps", "norm"), (), ("eps", "norm", "swiglu"), ("eps", "norm")]


def test_launches_that_spill_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_search, "current_target", lambda: H200)
    for (rows, width, columns), spilling in launch_search.SPILLING.items():
        weight = torch.empty(rows, width, device="meta", dtype=torch.bfloat16)
        tiles = 2 if rows == 3072 else 1
        kept = launch_search._few_tokens_launches(weight, tiles, columns)
        assert kept[0] == few_tokens.choose_launch(weight, tiles, columns, H200), "the table's comes first"
        with monkeypatch.context() as patch:
            patch.setattr(launch_search, "SPILLING", {})
            every = launch_search._few_tokens_launches(weight, tiles, columns)
        assert set(every) - set(kept) == spilling


def test_whole_steps_are_compared_at_both_ends(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "sizes", TOY._replace(batches=(1, 2, 3), contexts=(4, 8, 12)))
    monkeypatch.setattr(whole_steps, "_whole_step", lambda bench, name, model, *case: [case])
    cases: list[Any] = list(whole_steps.whole_steps(bench))
    assert cases == [(b, c, pairs) for c in (4, 12) for b in (1, 3) for pairs in whole_steps.PAIRS]


def test_quantised_weights_are_timed_with_each_kernel(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_weights, "COPIES", 1)
    records = [record for record in quantized_weights.quantized_weights(bench) if isinstance(record, dict)]
    cases = {(record["batch"], record["quantize"], record["op"]) for record in records}
    assert len(cases) == 2 * len(quantized_weights.FORMATS) * 2
    for case in cases:
        found = [record for record in records if (record["batch"], record["quantize"], record["op"]) == case]
        assert len(found) == (3 if case[0] == 1 else 1)
        assert sum(record["chosen"] for record in found) == 1
        assert all(record["microseconds"] > 0 and record["gb_per_second"] > 0 for record in found)
