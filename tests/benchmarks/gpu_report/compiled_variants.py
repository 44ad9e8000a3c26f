"""Compiles launches that the GPU report tries with quantised weights, and prints those that spill or do not fit.

Arguments: a GPU, a model, a format, a number of tokens, and the ops, by default all. Prints JSON: the number of
launches, and the bad ones.
"""

import json
import sys

import torch

from fastllama.benchmarks.gpu_report.measurements import DTYPE
from fastllama.benchmarks.gpu_report.quantized_search import launches_of, ops_of, project
from fastllama.benchmarks.kernels_report.ahead_of_time import GPUS, record_launches
from fastllama.benchmarks.kernels_report.compiled_kernel import Compiled
from fastllama.benchmarks.kernels_report.model_launches import MODELS, lazy_weight
from fastllama.kernels.projection.packing import checked

POSITIONS = 128


def main(gpu_name: str, model: str, quantize: str, tokens: str, *ops: str) -> None:
    gpu, batch, n_launches, bad = GPUS[gpu_name], int(tokens), 0, []
    for op, case in ops_of(MODELS[model], batch, POSITIONS, torch.device("cpu")).items():
        weight = checked(lazy_weight(case.name, case.shape, quantize))  # type: ignore[arg-type]
        if weight.format != quantize or (ops and op not in ops):
            continue
        x = torch.zeros(batch, case.shape[1], dtype=DTYPE)
        with record_launches(gpu) as launches:
            tried = launches_of(weight, case.tiles, batch)
            for launch in tried:
                project(launch, x, weight, case.epilogue)
        n_launches += len(tried)
        for launch, recorded in zip(tried, launches, strict=True):
            compiled = Compiled(recorded.compiled, gpu)
            if compiled.spills or compiled.shared > gpu.shared_bytes:
                bad.append([op, launch, compiled.spills, compiled.shared])
    print(json.dumps({"launches": n_launches, "bad": bad}))


if __name__ == "__main__":
    main(*sys.argv[1:])
