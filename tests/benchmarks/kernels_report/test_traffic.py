"""The bytes that launches move, counted by argument and scaled exactly from a sample."""

import math

import pytest
import torch
import triton
import triton.language as tl

from fastllama.benchmarks.kernels_report.table import excess_traffic
from fastllama.benchmarks.kernels_report.traffic import ALL_PROGRAMS, count_traffic, least_bytes, sample
from fastllama.kernels.launch import interpreter

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")


@triton.jit
def _scale_kernel(x_ptr, weight_ptr, y_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < N
    tl.store(y_ptr + at, tl.load(x_ptr) * tl.load(weight_ptr + at, mask=live, other=0.0), mask=live)


@pytest.mark.parametrize("programs", [3, 251])
def test_bytes_are_counted_by_argument(programs: int) -> None:
    """All programs run, or a sample of them. Half of the last program is past the end."""
    interpreter.patch()
    block = 16
    length = programs * block - block // 2
    x, weight, y = torch.ones(1), torch.ones(length), torch.zeros(length)
    with count_traffic() as launches:
        _scale_kernel[(programs,)](x, weight, y, length, BLOCK=block)
    (launch,) = launches
    assert launch.moved == {"x_ptr": 4 * programs, "weight_ptr": 4 * length, "y_ptr": 4 * length}
    assert least_bytes(launch, {}) == 4 + 8 * length
    assert least_bytes(launch, {"weight_ptr": 12}, ["weight_ptr"]) == 12


@pytest.mark.parametrize("grid", [(1,), (ALL_PROGRAMS,), (1000,), (33, 8), (1008,), (36, 1)])
def test_a_sample_represents_all_programs(grid: tuple[int, ...]) -> None:
    chosen = sample(grid, {"BLOCKS": 63} if grid == (1008,) else {})
    assert sum(weight for _, weight in chosen) == pytest.approx(math.prod(grid))
    assert len(chosen) <= ALL_PROGRAMS and len({place for place, _ in chosen}) == len(chosen)


def test_excess_traffic_is_named() -> None:
    def row(streamed: int) -> dict[str, object]:
        return {"model": "3-8B", "op": "head", "tokens": 4, "streamed": streamed, "least_streamed": 1000}

    assert excess_traffic([row(1000), row(1010)]) == []
    assert [message.split(" rows ")[1] for message in excess_traffic([row(999), row(2000)])] == [
        "reads 999 bytes, not 1000",
        "reads 2000 bytes, not 1000",
    ]


def test_after_the_block_launches_run_completely() -> None:
    interpreter.patch()
    with count_traffic():
        pass
    y = torch.zeros(100 * 16)
    _scale_kernel[(100,)](torch.ones(1), torch.ones(100 * 16), y, 100 * 16, BLOCK=16)
    assert torch.equal(y, torch.ones(100 * 16))
