"""A section of a GPU report: projections with quantised weights, by each kernel that can compute them.

Questions: do int8, fp8 and int4 take the time of their bytes; what do conversions by assembly gain over plain ones; and
is one token of int4 better projected by the matrix units, as the count of instructions says?
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastllama.benchmarks.gpu_report.measurements import DTYPE, Bench, Record, Results
from fastllama.benchmarks.gpu_report.sizes import ends
from fastllama.benchmarks.statistics import GIGA, MICRO
from fastllama.kernels import fused
from fastllama.kernels.projection.packing import FusedWeight, checked
from fastllama.kernels.projection.quantized_few_tokens import quantized_few_tokens
from fastllama.kernels.projection.quantized_matvec import is_best, quantized_matvec
from fastllama.quantization import Scheme, converts_fp8, quantized, scheme_of

FORMATS = ("int8", "fp8", "int4", "int4-g32")
COPIES = 8  # of a weight, so that none stays in L2
ROWS_QUANTISED = 256  # the others repeat them


@torch.inference_mode()
def quantized_weights(bench: Bench) -> Results:
    """Times gate+up, with the norm and SwiGLU, and down, of every model, with one and with most tokens."""
    for model, args in bench.sizes.models.items():
        for batch in ends(bench.sizes.batches):
            for quantize in supported_formats(bench.device):
                norm = torch.ones(args.dim, device=bench.device, dtype=DTYPE)
                swiglu = {"norm": norm, "eps": args.norm_eps, "swiglu": True}
                shapes: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
                    "gate+up": ((2 * args.hidden_dim, args.dim), swiglu),
                    "down": ((args.dim, args.hidden_dim), {}),
                }
                for op, (shape, epilogue) in shapes.items():
                    case = {"model": model, "batch": batch, "op": op, "quantize": quantize}
                    for record in _timed(bench, batch, quantize, shape, epilogue):
                        yield case | record


def _timed(
    bench: Bench, batch: int, quantize: str, shape: tuple[int, int], epilogue: dict[str, Any]
) -> Iterator[Record]:
    scheme = scheme_of(quantize, "layers.0", shape[1])
    assert scheme is not None
    weights = [random_weight(shape, scheme, bench.device) for _ in range(COPIES)]
    x = torch.randn(batch, shape[1], device=bench.device, dtype=DTYPE)
    chosen = "matvec" if batch == 1 and is_best(weights[0], 2 if epilogue else 1, DTYPE) else "few tokens"
    for variant, kernel in _variants(batch).items():
        microseconds = bench.microseconds([partial(kernel, x, weight, **epilogue) for weight in weights])
        yield {
            "variant": variant,
            "chosen": variant == chosen,
            "microseconds": microseconds,
            "gb_per_second": weights[0].n_bytes / microseconds * MICRO / GIGA,
        }


def _variants(batch: int) -> dict[str, Callable[..., Tensor]]:
    if batch > 1:
        return {"few tokens": quantized_few_tokens}
    plain = partial(quantized_matvec, plain=True)
    return {"matvec": quantized_matvec, "matvec, plain conversion": plain, "few tokens": quantized_few_tokens}


def random_weight(shape: Sequence[int], scheme: Scheme, device: torch.device) -> FusedWeight:
    """A weight of this shape, packed, whose rows repeat a few random ones."""
    rows, width = shape
    few = quantized(torch.randn(min(rows, ROWS_QUANTISED), width, device=device) / width**0.5, scheme)
    parts = [few] * (rows // few.shape[0]) + [few.rows(0, rows % few.shape[0])]
    return checked(fused.pack(*(part for part in parts if part.shape[0])))  # type: ignore[arg-type]


def supported_formats(device: torch.device, formats: Sequence[str] = FORMATS) -> list[str]:
    """Those formats that the device converts."""
    return [quantize for quantize in formats if quantize != "fp8" or converts_fp8(device)]
