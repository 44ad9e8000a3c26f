"""Compiles the kernels that time instructions for the given GPU, and prints their loops as JSON."""

import json
import sys
from collections import Counter
from typing import Any

import torch

from fastllama.benchmarks.gpu_report.instruction_rates import ASSEMBLY, CHAINS, WARPS, run_chains
from fastllama.benchmarks.kernels_report.ahead_of_time import GPUS, record_launches
from fastllama.benchmarks.kernels_report.compiled_kernel import Compiled


def main(gpu_name: str) -> None:
    gpu = GPUS[gpu_name]
    values = torch.zeros(CHAINS * WARPS * gpu.warp_size, dtype=torch.int32)
    found = {}
    for instruction in ASSEMBLY:
        with record_launches(gpu) as launches:
            run_chains(instruction, values, values[:1], 1000)
        found[instruction] = read(Compiled(launches[0].compiled, gpu))
    print(json.dumps(found))


def read(compiled: Compiled) -> dict[str, Any]:
    begin, end = compiled.sass.loops()[0]
    clocks = [index for index, text in enumerate(compiled.instructions) if "SR_CLOCK" in text]
    return {
        "loop": Counter(text.split()[0] for text in compiled.instructions[begin : end + 1]),
        "registers": compiled.registers,
        "spills": compiled.spills,
        "clocks": ["before" if index < begin else "after" if index > end else "in the loop" for index in clocks],
    }


if __name__ == "__main__":
    main(sys.argv[1])
