"""The kernel that times instructions: what they compute, and what the compiler makes of its loop."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama.benchmarks.gpu_report import instruction_rates as module
from fastllama.benchmarks.gpu_report.instruction_rates import (
    ASSEMBLY,
    CHAINS,
    FMA,
    OTHER,
    UNROLL,
    WARPS,
    instruction_rates,
    run_chains,
)
from fastllama.benchmarks.gpu_report.measurements import Bench
from fastllama.benchmarks.gpu_report.sizes import TOY
from fastllama.benchmarks.kernels_report.ahead_of_time import compiling_environment

ROOT = Path(__file__).resolve().parents[3]
# The machine instruction of each.
OPCODES = {
    FMA: "FFMA",
    "dp4a.s32.s32": "IDP.4A.S8.S8",
    "dp4a.u32.s32": "IDP.4A.U8.S8",
    "cvt.rn.f32.s8": "I2F.S8",
    "cvt.rn.f32.s32": "I2FP.F32.S32",
    "cvt.f32.f16": "HADD2.F32",
    "cvt.rn.f16x2.e4m3x2": "F2FP.F16.E4M3.UNPACK_B",
    "prmt": "PRMT",
}
BYTES = 4096


def bytes_of(values: Tensor, dtype: torch.dtype = torch.int8) -> Tensor:
    return values.view(dtype).view(-1, 4)


def dp4a(values: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    products = bytes_of(values, dtype).int() * bytes_of(other).int()
    return values + products.sum(-1).int()


def e4m3_pairs(values: Tensor, other: Tensor) -> Tensor:
    return bytes_of(values, torch.uint8)[:, :2].contiguous().view(torch.float8_e4m3fn).half().view(torch.int32)[:, 0]


EXPECTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    FMA: lambda v, o: torch.addcmul(o.view(torch.float32), v.view(torch.float32), o.view(torch.float32)).view(
        torch.int32
    ),
    "dp4a.s32.s32": lambda v, o: dp4a(v, o, torch.int8),
    "dp4a.u32.s32": lambda v, o: dp4a(v, o, torch.uint8),
    "cvt.rn.f32.s8": lambda v, o: bytes_of(v)[:, 0].float().view(torch.int32),
    "cvt.rn.f32.s32": lambda v, o: v.float().view(torch.int32),
    "cvt.f32.f16": lambda v, o: v.view(torch.float16).view(-1, 2)[:, 1].float().view(torch.int32),
    "cvt.rn.f16x2.e4m3x2": e4m3_pairs,
    "prmt": lambda v, o: bytes_of(v)[:, [1, 0, 3, 2]].contiguous().view(torch.int32)[:, 0],
}
FLOATS = {FMA, "cvt.f32.f16"}


def random_values(instruction: str, device: torch.device) -> Tensor:
    """Any bits where an instruction takes integers; finite numbers where it takes floats."""
    generator = torch.Generator().manual_seed(1)
    if instruction == FMA:
        values = torch.randn(BYTES // 4, generator=generator).view(torch.int32)
    elif instruction == "cvt.f32.f16":
        values = torch.randn(BYTES // 2, generator=generator).half().view(torch.int32)
    else:
        values = torch.randint(-(2**31), 2**31, (BYTES // 4,), generator=generator).int()
    if "e4m3" in instruction:  # without NaN
        values &= 0x7E7E7E7E
    return values.to(device)


@pytest.mark.parametrize("plain", [False, True], ids=["assembly", "plain"])
@pytest.mark.parametrize("instruction", ASSEMBLY)
def test_each_instruction_computes_what_its_name_says(instruction: str, plain: bool, device: torch.device) -> None:
    values, other = random_values(instruction, device), torch.tensor([OTHER], dtype=torch.int32, device=device)
    results, clocks = run_chains(instruction, values, other, 1, unroll=1, plain=plain)
    expected = EXPECTED[instruction](values, other)
    for result in results:
        if instruction in FLOATS:
            torch.testing.assert_close(result.view(torch.float32), expected.view(torch.float32), rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(result, expected)
    assert (clocks > 0).all() if device.type == "cuda" and not plain else (clocks == 0).all()


def test_a_chain_takes_its_own_results(device: torch.device) -> None:
    values, other = random_values("prmt", device), torch.tensor([OTHER], dtype=torch.int32, device=device)
    for loops, swapped in ((1, 1), (2, 0)):
        results, _ = run_chains("prmt", values, other, loops, unroll=3)
        assert torch.equal(results[0], EXPECTED["prmt"](values, other) if swapped else values)


@pytest.fixture(scope="module")
def loops(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The loop of each kernel for an H200, by instruction. Another process compiles them: this one interprets."""
    environment = compiling_environment(str(tmp_path_factory.mktemp("triton")))
    command = [sys.executable, "-m", "tests.benchmarks.gpu_report.compiled_chains", "sm_90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("instruction", ASSEMBLY)
def test_a_loop_has_all_its_instructions_and_few_others(instruction: str, loops: dict[str, Any]) -> None:
    compiled = loops[instruction]
    opcodes: dict[str, int] = compiled["loop"]
    assert opcodes[OPCODES[instruction]] == CHAINS * UNROLL
    assert sum(opcodes.values()) <= 1.05 * CHAINS * UNROLL, opcodes
    assert compiled["spills"] == 0 and compiled["registers"] <= 64
    assert compiled["clocks"] == ["before", "after"]


def test_rates_are_reported_beside_that_of_fma(device: torch.device, tmp_path: Path) -> None:
    bench = Bench(device, TOY, tmp_path)
    records = [record for record in instruction_rates(bench) if isinstance(record, dict)]
    assert [record["case"] for record in records] == [FMA, *list(ASSEMBLY)[1:]]
    assert records[0]["ratio_to_fma"] == 1 and all(record["ratio_to_fma"] > 0 for record in records)
    known = [record["per_clock"] is not None and record["clock_mhz"] is not None for record in records]
    assert known == [device.type == "cuda"] * len(records)


def test_instructions_per_clock_are_those_of_a_multiprocessor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program's instructions, by its clocks and by the time of the launch."""
    times = iter(10.0 if name == FMA else 20.0 for name in ASSEMBLY)
    bench = Bench(torch.device("cpu"), TOY, tmp_path)
    monkeypatch.setattr(bench, "microseconds", lambda calls: next(times))
    clocks = torch.tensor([2047, 2048, 4096])
    monkeypatch.setattr(module, "run_chains", lambda *_: (clocks, clocks))
    first, second, *_ = (record for record in instruction_rates(bench) if isinstance(record, dict))
    executed = CHAINS * WARPS * 32 * UNROLL * TOY.instruction_loops
    assert first["per_clock"] == executed / 2048 and first["clock_mhz"] == pytest.approx(204.8)
    assert first["giga_per_second"] == pytest.approx(executed / 10e-6 / 1e9)
    assert second["ratio_to_fma"] == 0.5


def test_older_gpus_convert_no_fp8_and_others_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(torch.device("cuda"), TOY, tmp_path)
    monkeypatch.setattr(module, "uses_assembly", lambda target: False)
    assert list(instruction_rates(bench)) == [{"not_run": "these are NVIDIA's instructions"}]
    ones = torch.ones(8)
    for name, value in {"uses_assembly": lambda target: True, "run_chains": lambda *_: (ones, ones)}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(bench, "microseconds", lambda calls: 1.0)
    monkeypatch.setattr(torch, "rand", lambda *shape, device: torch.zeros(*shape))
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: ones)
    for capability, left_out in (((8, 0), 1), ((9, 0), 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert len(list(instruction_rates(bench))) == len(ASSEMBLY) - left_out
