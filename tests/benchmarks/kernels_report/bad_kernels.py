"""Compiles kernels, most of them with one fault, for the given GPU, and prints their properties as JSON."""

import json
import sys
from typing import Any

import torch
import triton
import triton.language as tl

from fastllama.benchmarks.kernels_report.ahead_of_time import GPUS, record_launches
from fastllama.benchmarks.kernels_report.compiled_kernel import Compiled


@triton.jit
def wide(x_ptr, weight_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at) + tl.load(weight_ptr + at))


@triton.jit
def narrow(x_ptr, weight_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at) + tl.load(weight_ptr + 3 * at))


@triton.jit
def gather(index_ptr, weight_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(weight_ptr + tl.load(index_ptr + at)))


@triton.jit
def dot(x_ptr, weight_ptr, y_ptr, N, BLOCK: tl.constexpr):
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for begin in range(0, N, BLOCK):
        total = tl.dot(tl.load(x_ptr + i * 256 + begin + j), tl.load(weight_ptr + (begin + i) * 256 + j), total)
    tl.store(y_ptr + i * BLOCK + j, total.to(tl.bfloat16))


@triton.jit
def spilling(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """It holds more values than a thread has registers."""
    at = tl.arange(0, BLOCK)
    held = ()
    for k in tl.static_range(12):
        held = held + (tl.load(x_ptr + k * BLOCK + at).to(tl.float32),)
    total = tl.sum(held[0], 0)
    for k in tl.static_range(12):
        total = tl.sum(held[k] * total, 0)
    for k in tl.static_range(12):
        tl.store(y_ptr + k * BLOCK + at, (held[k] * total).to(tl.bfloat16))


@triton.jit
def pass_results(x_ptr, y_ptr, counter_ptr, GUARDED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at))
    if GUARDED:
        tl.debug_barrier()
    done = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    if done == 7:
        tl.store(counter_ptr, 0)


def main(gpu_name: str) -> None:
    gpu = GPUS[gpu_name]
    x, y = torch.empty(1 << 20, dtype=torch.bfloat16), torch.empty(1 << 20, dtype=torch.bfloat16)
    index, counter = torch.empty(4096, dtype=torch.int64), torch.empty(1, dtype=torch.int32)
    block = 8 * 4 * gpu.warp_size  # one 16-byte load a thread, with four warps
    with record_launches(gpu) as launches:
        wide[(1,)](x, y, x, BLOCK=block)
        narrow[(1,)](x, y, x, BLOCK=block)
        gather[(1,)](index, x, y, BLOCK=block)
        dot[(1,)](x, y, y, 256, BLOCK=64, num_stages=3)
        spilling[(1,)](x, y, BLOCK=8192 * gpu.warp_size // 32)
        pass_results[(1,)](x, y, counter, GUARDED=True, BLOCK=block)
        pass_results[(1,)](x, y, counter, GUARDED=False, BLOCK=block)
    names = [launch.kernel for launch in launches[:-1]] + ["pass_results_unguarded"]
    print(json.dumps({name: read(launch.compiled, gpu_name) for name, launch in zip(names, launches, strict=True)}))


def read(kernel: Any, gpu_name: str) -> dict[str, Any]:
    compiled = Compiled(kernel, GPUS[gpu_name])
    return {
        "registers": compiled.registers,
        "spills": compiled.spills,
        "shared": compiled.shared,
        "resident": compiled.programs_per_processor,
        "loads": compiled.loads,
        "matrix": compiled.matrix_instructions,
        "barrier": compiled.barrier_before_atomics,
    }


if __name__ == "__main__":
    main(sys.argv[1])
