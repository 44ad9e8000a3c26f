"""`pytest benchmarks`: the kernels suite's ops in pytest-benchmark, one group for each op. Outputs are checked first.

pytest-benchmark's tools can compare runs (`--benchmark-autosave`, `--benchmark-compare`). The sizes are those of
llama3.2-1b on CUDA, replayed from a graph, and those of the built-in model on a CPU, with the default backend. A time
includes all copies of the inputs; `--benchmark-json` has their number.
"""

from functools import cache, partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastllama.benchmarks.ceilings import Probes
from fastllama.benchmarks.models import ModelSource, ModelSpec
from fastllama.benchmarks.runners import OURS
from fastllama.benchmarks.suites.kernels import (
    COMPILED,
    LIBRARY,
    REFERENCE,
    Bench,
    call_all,
    implementations,
    verified_calls,
)
from fastllama.benchmarks.suites.op_cases import Op, ops_of
from fastllama.benchmarks.timing import replayed, synchronize

BATCHES = (1, 4)
CONTEXT = 512
ROUNDS = 10
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAME, DTYPE = ("llama3.2-1b", torch.bfloat16) if DEVICE.type == "cuda" else ("builtin", torch.float32)
MODEL = ModelSpec(ModelSource.named(NAME), DEVICE, DTYPE, max(BATCHES), CONTEXT)
OPS = [(batch, op) for batch in BATCHES for op in ops_of(MODEL, batch, CONTEXT)]


@cache
def bench() -> Bench:
    return Bench(MODEL, ROUNDS, Probes(DEVICE, DTYPE))


@pytest.mark.parametrize("implementation", [OURS, REFERENCE, COMPILED, LIBRARY])
@pytest.mark.parametrize(("batch", "op"), OPS, ids=lambda value: getattr(value, "name", f"B{value}"))
@torch.inference_mode()
def test_op(benchmark: BenchmarkFixture, batch: int, op: Op, implementation: str) -> None:
    inputs = bench().copies(op)
    found = implementations(op, bench(), inputs)
    if implementation not in found:
        pytest.skip(f"{OURS} runs the {implementation} backend on {DEVICE.type}")
    run = replayed(partial(call_all, verified_calls(op, inputs, found[implementation])), DEVICE)

    def run_to_end() -> None:
        run()
        synchronize(DEVICE)

    benchmark.group = f"{op.name}, batch {batch}, {NAME}"
    benchmark.extra_info |= {"copies": len(inputs), "bytes": op.work.bytes, "flops": op.work.flops}
    benchmark.pedantic(run_to_end, setup=bench().flush, rounds=ROUNDS, warmup_rounds=1)
