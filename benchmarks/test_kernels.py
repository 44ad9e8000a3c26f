"""`pytest benchmarks`: the kernels suite's ops on pytest-benchmark, a group each, whose output is checked first.

For comparing runs with pytest-benchmark's own tools (`--benchmark-autosave`, `--benchmark-compare`). On CUDA at the
sizes of llama3.2-1b, replayed from a graph; on a CPU at those of the built-in model, by the backend that serves there.
One time is of all the copies that take turns; `--benchmark-json` has their number.
"""

from functools import cache, partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastllama.benchmarks.ceilings import MatmulProbe, ReadProbe
from fastllama.benchmarks.models import ModelSource
from fastllama.benchmarks.runner import OURS
from fastllama.benchmarks.suites.kernels import COMPILED, LIBRARY, REFERENCE, Bench, checked, each, ways
from fastllama.benchmarks.suites.op_cases import Op, ops_of
from fastllama.benchmarks.timing import replayed, synchronize
from fastllama.kernels import reference, select

BATCHES = (1, 4)
CONTEXT = 512
ROUNDS = 10
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODEL, DTYPE = ("llama3.2-1b", torch.bfloat16) if DEVICE.type == "cuda" else ("builtin", torch.float32)
ARGS = ModelSource.named(MODEL).args(max(BATCHES), CONTEXT)
OPS = {(batch, op.name): op for batch in BATCHES for op in ops_of(ARGS, DEVICE, DTYPE, batch, CONTEXT)}


@cache
def bench() -> Bench:
    backend = "reference" if select.backend(None, DEVICE) is reference else "fused"
    return Bench(ARGS, DEVICE, DTYPE, backend, ROUNDS, ReadProbe(DEVICE), MatmulProbe(DEVICE, DTYPE))


@pytest.mark.parametrize("way", [OURS, REFERENCE, COMPILED, LIBRARY])
@pytest.mark.parametrize(
    ("batch", "op"),
    [(batch, op) for (batch, _), op in OPS.items()],
    ids=lambda value: getattr(value, "name", f"B{value}"),
)
@torch.inference_mode()
def test_op(benchmark: BenchmarkFixture, batch: int, op: Op, way: str) -> None:
    inputs = bench().copies(op)
    found = ways(op, bench(), inputs, batch)
    if way not in found:
        pytest.skip(f"{way} is what {OURS} is here: its backend for {DEVICE.type}")
    run = replayed(partial(each, checked(op, inputs, found[way])), DEVICE)

    def run_to_end() -> None:
        run()
        synchronize(DEVICE)

    benchmark.group = f"{op.name}, batch {batch}, {MODEL}"
    benchmark.extra_info |= {"copies": len(inputs), "bytes": op.work.bytes, "flops": op.work.flops}
    benchmark.pedantic(run_to_end, setup=bench().flush, rounds=ROUNDS, warmup_rounds=1)
