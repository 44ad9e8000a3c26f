"""Compiles kernels for an H200 and prints the checks' results as JSON. Each kernel except `sound` breaks the rule of
dependent launches in one way.
"""

import json

import torch
import triton
import triton.language as tl

from fastllama.benchmarks.kernels_report import dependence
from fastllama.benchmarks.kernels_report.ahead_of_time import GPUS, record_launches
from fastllama.benchmarks.kernels_report.compiled_kernel import Compiled
from fastllama.kernels.launch.dependent import prefetch_block, wait_for_inputs

BLOCK = 1024


@triton.jit
def sound(x_ptr, weight_ptr, positions_ptr, pages_ptr, y_ptr, N, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + at)
    first = tl.minimum(tl.maximum(tl.load(positions_ptr), 0), N)
    prefetch_block(weight_ptr + first * BLOCK, 1, 2 * BLOCK)
    page = tl.minimum(tl.maximum(tl.load(pages_ptr), 0), N - 1)
    prefetch_block(weight_ptr + page.to(tl.int64) * BLOCK, 1, 2 * BLOCK)
    wait_for_inputs(True)
    tl.store(y_ptr + at, tl.load(x_ptr + at + tl.load(positions_ptr) + tl.load(pages_ptr)) + weight)


@triton.jit
def early_input(x_ptr, weight_ptr, positions_ptr, pages_ptr, y_ptr, N, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at) + tl.load(weight_ptr + at)
    wait_for_inputs(True)
    tl.store(y_ptr + at, x)


@triton.jit
def early_store(x_ptr, weight_ptr, positions_ptr, pages_ptr, y_ptr, N, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(weight_ptr + at))
    wait_for_inputs(True)


@triton.jit
def early_atomic(x_ptr, weight_ptr, positions_ptr, pages_ptr, y_ptr, N, BLOCK: tl.constexpr):
    tl.atomic_add(positions_ptr, 1)
    wait_for_inputs(True)
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at))


@triton.jit
def early_trigger(x_ptr, weight_ptr, positions_ptr, pages_ptr, y_ptr, N, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    tl.store(y_ptr + at, tl.load(x_ptr + at))


@triton.jit
def early_position(x_ptr, weight_ptr, positions_ptr, pages_ptr, y_ptr, N, BLOCK: tl.constexpr):
    """A number that was loaded before the wait decides what is loaded after it."""
    at = tl.arange(0, BLOCK)
    position = tl.load(positions_ptr)
    wait_for_inputs(True)
    tl.store(y_ptr + at, tl.load(x_ptr + at + position))


@triton.jit
def early_page(x_ptr, weight_ptr, positions_ptr, pages_ptr, y_ptr, N, BLOCK: tl.constexpr):
    """A page that was found before the wait is read after it."""
    at = tl.arange(0, BLOCK)
    page = tl.load(pages_ptr)
    prefetch_block(weight_ptr + page.to(tl.int64) * BLOCK, 1, 2 * BLOCK)
    wait_for_inputs(True)
    tl.store(y_ptr + at, tl.load(x_ptr + page.to(tl.int64) * BLOCK + at))


@triton.jit
def wait_in_loop(x_ptr, weight_ptr, positions_ptr, pages_ptr, y_ptr, N, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in tl.range(0, N, BLOCK, num_stages=3):
        weight = tl.load(weight_ptr + begin + at)
        wait_for_inputs(True)
        total += weight.to(tl.float32) * tl.load(x_ptr + begin + at).to(tl.float32)
    tl.store(y_ptr + at, total.to(tl.bfloat16))


@triton.jit
def wait_in_branch(x_ptr, weight_ptr, positions_ptr, pages_ptr, y_ptr, N, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    if tl.program_id(0) < N:
        wait_for_inputs(True)
        tl.store(y_ptr + at, tl.load(x_ptr + at))


@triton.jit
def no_wait(x_ptr, weight_ptr, positions_ptr, pages_ptr, y_ptr, N, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at))


@triton.jit
def two_waits(x_ptr, weight_ptr, positions_ptr, pages_ptr, y_ptr, N, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    wait_for_inputs(True)
    x = tl.load(x_ptr + at)
    wait_for_inputs(True)
    tl.store(y_ptr + at, x)


@triton.jit
def no_trigger(x_ptr, weight_ptr, positions_ptr, pages_ptr, y_ptr, N, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.extra.cuda.gdc_wait()
    tl.store(y_ptr + at, tl.load(x_ptr + at))


@triton.jit
def prefetched_input(x_ptr, weight_ptr, positions_ptr, pages_ptr, y_ptr, N, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    prefetch_block(x_ptr, 1, 2 * BLOCK)
    wait_for_inputs(True)
    tl.store(y_ptr + at, tl.load(x_ptr + at))


KERNELS = [value for value in vars().values() if getattr(value, "__module__", "") == __name__]


def main() -> None:
    gpu = GPUS["sm_90"]
    x, y = torch.empty(1 << 16, dtype=torch.bfloat16), torch.empty(1 << 16, dtype=torch.bfloat16)
    positions, pages = torch.empty(16, dtype=torch.int64), torch.empty(16, dtype=torch.int32)
    found = {}
    for kernel in KERNELS:
        with record_launches(gpu) as launches:
            kernel[(4,)](x, y, positions, pages, x, 4096, BLOCK=BLOCK, launch_pdl=True)
        (launch,) = launches
        compiled = Compiled(launch.compiled, gpu)
        found[launch.kernel] = {
            "dependent": compiled.dependent,
            "violations": dependence.violations(compiled.ir),
            "prefetched": sorted(dependence.prefetches(compiled.ir)),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
