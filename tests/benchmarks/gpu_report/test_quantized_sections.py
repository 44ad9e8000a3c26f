"""The GPU report's sections about quantised weights: whole models with their goals, and other launches."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from fastllama.benchmarks.environment import describe_environment
from fastllama.benchmarks.gpu_report import quantized_models, quantized_search, run_tests
from fastllama.benchmarks.gpu_report.markdown import summary
from fastllama.benchmarks.gpu_report.measurements import Bench, Record, ceilings, random_model
from fastllama.benchmarks.gpu_report.quantized_weights import random_weight, supported_formats
from fastllama.benchmarks.gpu_report.sizes import FULL, TOY
from fastllama.benchmarks.kernels_report.ahead_of_time import GPUS
from fastllama.benchmarks.kernels_report.model_launches import lazy_weight
from fastllama.benchmarks.result_file import ResultFile
from fastllama.kernels.projection import quantized_launch, quantized_matvec
from fastllama.kernels.projection.packing import FusedWeight, checked
from fastllama.model import Transformer
from fastllama.quantization import model_schemes, scheme_of
from fastllama.speed_of_light import decode_step, total_bytes

H200 = GPUS["sm_90"]
CPU = torch.device("cpu")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = Bench(CPU, TOY, tmp_path)
    for ceiling in ceilings(bench):
        bench.ceilings[ceiling.name] = ceiling  # type: ignore[union-attr, assignment]
    return bench


def weight_of(model: str, op: str, quantize: str) -> tuple[FusedWeight, int]:
    """A weight that takes no memory, and the tiles of rows in a program."""
    case = quantized_search.ops_of(FULL.models[model], 1, 8, CPU)[op]
    return checked(lazy_weight(case.name, case.shape, quantize)), case.tiles  # type: ignore[arg-type]


def test_models_are_decoded_in_every_format(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Transformer] = []

    def build(*arguments: Any, **options: Any) -> Transformer:
        built.append(random_model(*arguments, **options))
        return built[-1]

    monkeypatch.setattr(quantized_models, "random_model", build)
    monkeypatch.setattr(quantized_models, "GOALS", {("toy", "fp8"): 480})
    records = [record for record in quantized_models.quantized_models(bench) if isinstance(record, dict)]
    cases = [(record["quantize"], record["batch"]) for record in records]
    assert cases == [(quantize, batch) for quantize in ("int8", "fp8", "int4") for batch in (1, 2)]
    for model, quantize in zip(built, quantized_models.FORMATS, strict=True):
        formats = {name: scheme.format for name, scheme in model_schemes(quantize, model.params).items()}
        assert {name: scheme.format for name, scheme in model.schemes.items()} == formats
        assert model.params.max_seq_len < TOY.positions, "only what the steps need"
    for record in records:
        context = TOY.contexts[0] + (TOY.steps + TOY.warm_steps) / 2
        schemes = model_schemes(record["quantize"], TOY.models["toy"])
        work = decode_step(TOY.models["toy"], torch.bfloat16, record["batch"], context, schemes)
        assert record["step_gb"] == pytest.approx(total_bytes(work) / 1e9)
        assert record["slowest"] <= record["tokens_per_second"] <= record["fastest"] and record["share"] > 0
        assert record["goal_on_h200"] == (480 if (record["quantize"], record["batch"]) == ("fp8", 1) else None)


def test_goals_are_those_of_models_of_the_report() -> None:
    assert {model for model, _ in quantized_models.GOALS} == FULL.models.keys()
    assert {quantize for _, quantize in quantized_models.GOALS} == {*quantized_models.FORMATS}


def test_older_gpus_are_not_given_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    for capability, n_formats in (((8, 0), 2), ((8, 9), 3), ((9, 0), 3)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert len(supported_formats(cuda, quantized_models.FORMATS)) == n_formats


def test_the_summary_has_goals_and_the_best_launches() -> None:
    def variant(name: str, microseconds: float, in_table: bool) -> Record:
        case = {"suite": "quantised variants", "model": "8B", "batch": 1, "op": "qkv", "quantize": "int8"}
        return {**case, "variant": name, "in_table": in_table, "microseconds": microseconds}

    rate = {"suite": "quantised models", "model": "8B", "quantize": "int8", "batch": 1, "tokens_per_second": 512.25}
    records = [
        rate | {"goal_on_h200": 480, "step_gb": 7.75, "share": 0.875},
        rate | {"batch": 16, "goal_on_h200": None, "step_gb": 8.0, "share": None},
        variant("rows 2", 5.5, in_table=True),
        variant("rows 4", 5.25, in_table=False),
    ]
    page = summary(ResultFile(describe_environment("cpu"), {}, records))
    assert "| 8B | int8 | 1 | 512.2 | 480 | 7.75 | 88% |" in page
    assert "| 8B | int8 | 16 | 512.2 |  | 8 |  |" in page
    assert "| 8B | 1 | qkv | int8 | rows 2 | 5.5 | rows 4 | 5.25 |  |" in page


@pytest.mark.slow
def test_every_projection_is_tried_in_every_format(bench: Bench) -> None:
    bench.sizes = TOY._replace(batches=(1,))
    records = [record for record in quantized_search.quantized_variants(bench) if isinstance(record, dict)]
    assert not [record for record in records if record["microseconds"] is None]
    cases = {(record["quantize"], record["op"]) for record in records}
    assert len(cases) == 5 + 5 + 4, "int4's head is int8"
    tables = [record for record in records if record["in_table"]]
    assert len(tables) == len(cases) and len(records) > len(tables)


@pytest.mark.parametrize("quantize", quantized_models.FORMATS)
@pytest.mark.parametrize("op", ["qkv", "down"])
def test_the_tables_launch_comes_first(quantize: str, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (quantized_search, quantized_matvec):
        monkeypatch.setattr(module, "current_target", lambda: H200)
    weight, tiles = weight_of("3-8B", op, quantize)
    for batch in (1, 4, 16):
        launches = quantized_search.launches_of(weight, tiles, batch)
        assert len(launches) == len(set(launches)) > 1
        if batch == 1 and quantize != "int4":
            assert launches[0] == quantized_matvec.choose_launch(weight, tiles)
        else:
            table = quantized_launch.choose_launch(weight, tiles, 16 if batch == 16 else 8, 2, H200)
            assert launches[0] == table and all(launch.chunk == table.chunk for launch in launches)


def test_launches_that_spill_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_search, "current_target", lambda: H200)
    ops = {
        (quantize, *case.shape): (model, op, quantize)
        for model, args in FULL.models.items()
        for op, case in quantized_search.ops_of(args, 1, 8, CPU).items()
        for quantize in quantized_models.FORMATS
    }
    for (quantize, rows, width, columns), spilling in quantized_search.SPILLING.items():
        weight, tiles = weight_of(*ops[quantize, rows, width])
        kept = quantized_search.launches_of(weight, tiles, columns)
        with monkeypatch.context() as patch:
            patch.setattr(quantized_search, "SPILLING", {})
            every = quantized_search.launches_of(weight, tiles, columns)
        assert set(every) - set(kept) == spilling and kept[0] == every[0]


def test_copies_of_a_weight_have_memory_of_their_own() -> None:
    scheme = scheme_of("int4", "attention.wo", 256)
    assert scheme is not None
    weight = random_weight((300, 256), scheme, CPU)
    copies = quantized_search._copies(weight, 5 * weight.n_bytes // 2)
    assert len({one.values.data_ptr() for one in copies}) == len({one.scales.data_ptr() for one in copies}) == 3
    assert all(torch.equal(one.values, weight.values) for one in copies)


def test_quantised_steps_are_compiled_ahead(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted: list[tuple[Any, ...]] = []

    class Pool:
        """Takes tasks as a pool of processes does, and runs none."""

        def __init__(self, *_: object, **__: object) -> None: ...

        def submit(self, function: Any, _target: object, args: Any, batch: int = 0, *on: bool, **more: Any) -> Any:
            submitted.append((function.__name__, batch, on, more))

        def shutdown(self, **_: object) -> None: ...

    monkeypatch.setattr(run_tests, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(run_tests, "wait", lambda tasks, timeout: (set(), set()))
    monkeypatch.setattr(run_tests, "current_target", lambda: H200)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    on_gpu = Bench(torch.device("cuda"), TOY._replace(batches=(1, 4, 16)), bench.results)
    with run_tests.compile_ahead(on_gpu, TOY.models.values(), (1, 4, 16), [(True, True)], formats=("int8", "int4")):
        pass
    quantised = [(batch, more["quantize"]) for _, batch, _, more in submitted if more]
    assert quantised == [(batch, quantize) for quantize in ("int8", "int4") for batch in (1, 16)]
    assert len(submitted) == 3 + 1 + 4
