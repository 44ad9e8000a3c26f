"""A section of a GPU report: other launches of projections with quantised weights than those of the launch tables.

Those of `quantized_matvec.py` and `quantized_launch.py` are calculated, not measured. Every weight is projected by the
kernel that decodes it: one token of int4 by `quantized_few_tokens`, of others by `quantized_matvec`.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastllama.args import OUTPUT_NAME, ModelArgs
from fastllama.benchmarks.gpu_report.launch_search import MIN_CALLS, launch_text, timed
from fastllama.benchmarks.gpu_report.measurements import DTYPE, Bench, Record, Results
from fastllama.benchmarks.gpu_report.quantized_models import FORMATS
from fastllama.benchmarks.gpu_report.quantized_weights import random_weight, supported_formats
from fastllama.kernels.launch.sizes import ceil_div
from fastllama.kernels.launch.target import current_target
from fastllama.kernels.paged_cache import LayerCache
from fastllama.kernels.projection import matvec
from fastllama.kernels.projection.few_tokens import MIN_COLUMNS, SHARED_BYTES_SPARE
from fastllama.kernels.projection.packing import WORD_BYTES, FusedWeight
from fastllama.kernels.projection.quantized_few_tokens import quantized_few_tokens
from fastllama.kernels.projection.quantized_launch import Launch as FewTokens
from fastllama.kernels.projection.quantized_launch import choose_launch as choose_few_tokens
from fastllama.kernels.projection.quantized_matvec import choose_launch as choose_matvec
from fastllama.kernels.projection.quantized_matvec import is_best, quantized_matvec
from fastllama.kernels.rope import CacheTarget
from fastllama.quantization import scheme_of

# Factors by which the table's sizes are multiplied, and limits of the products.
ROWS, MAX_ROWS = (1, 2, 0.5), 64
WARPS, MAX_WARPS = (1, 2, 0.5), 16
MAX_THREAD_BYTES = 256  # of weights in a thread's registers
# Of (rows, unroll, stages, warps) with few tokens. With half the warps the compiler spills registers, so that more
# programs fit on a multiprocessor.
CHANGES = (
    (2, 1, 1, 1),
    (0.5, 1, 1, 1),
    (1, 2, 1, 1),
    (1, 0.5, 1, 1),
    (1, 1, 0.5, 1),
    (1, 1, 2, 1),
    (1, 1, 1, 2),
    (0.5, 2, 1, 1),
    (2, 0.5, 1, 1),
)
MIN_ROWS = 16  # of a matrix instruction's left operand
# Launches with few tokens that spill registers on compute capability 9.0 with triton 3.6 or 3.7, by the format, the
# shape of a weight and the number of columns. They are not tried.
SPILLING: dict[tuple[str, int, int, int], set[FewTokens]] = {
    ("int4", 6144, 4096, 8): {FewTokens(16, 64, 1, 3, 4)},
    ("int4", 6144, 4096, 16): {FewTokens(32, 64, 1, 3, 4), FewTokens(32, 64, 2, 3, 4)},
    ("int4", 28672, 4096, 16): {
        FewTokens(64, 64, 1, 3, 4),
        FewTokens(32, 64, 2, 3, 4),
        FewTokens(32, 64, 1, 3, 8),
    },
    ("int4", 16384, 2048, 16): {FewTokens(64, 64, 1, 3, 4), FewTokens(32, 64, 2, 3, 4)},
    ("fp8", 28672, 4096, 16): {FewTokens(64, 64, 1, 3, 4)},
    ("fp8", 16384, 2048, 16): {FewTokens(64, 64, 1, 4, 4)},
    ("fp8", 128256, 4096, 16): {FewTokens(32, 64, 1, 3, 4)},
    ("fp8", 128256, 2048, 16): {FewTokens(32, 64, 1, 3, 4)},
}

Launch = matvec.Launch | FewTokens


class Op(NamedTuple):
    """A projection of a model."""

    name: str  # of its weight, Meta's
    shape: tuple[int, int]
    tiles: int  # of rows in a program
    epilogue: dict[str, Any]


def ops_of(args: ModelArgs, batch: int, positions: int, device: torch.device) -> dict[str, Op]:
    """The projections of a decode step, with norms and a cache of this many positions."""
    kv_width = args.n_kv_heads * args.head_dim
    cache = LayerCache.of(batch, positions, args.n_kv_heads, args.head_dim, DTYPE, device)
    rope = torch.zeros(cache.length, args.head_dim // 2, 2, device=device)
    rows = torch.arange(batch, device=device)
    target = CacheTarget(cache, rope, torch.full_like(rows, positions - 1), rows)
    norm = {"norm": torch.ones(args.dim, device=device, dtype=DTYPE), "eps": args.norm_eps}
    heads, hidden = args.n_heads * args.head_dim, args.hidden_dim
    return {
        "qkv": Op("attention.wq", (heads + 2 * kv_width, args.dim), 2, {"append_to": target, **norm}),
        "output": Op("attention.wo", (args.dim, heads), 1, {}),
        "gate+up": Op("feed_forward.w1", (2 * hidden, args.dim), 2, {"swiglu": True, **norm}),
        "down": Op("feed_forward.w2", (args.dim, hidden), 1, {}),
        "head": Op(OUTPUT_NAME, (args.vocab_size, args.dim), 1, norm),
    }


@torch.inference_mode()
def quantized_variants(bench: Bench) -> Results:
    """Times every projection of every model in every format, with each number of tokens."""
    sizes, device = bench.sizes, bench.device
    formats = supported_formats(device, FORMATS)
    for batch, (name, args) in product(sizes.batches, sizes.models.items()):  # the time may end before the last
        ops = ops_of(args, batch, sizes.contexts[0], device)
        for quantize, (op, case) in product(formats, ops.items()):
            scheme = scheme_of(quantize, case.name, case.shape[1])
            assert scheme is not None
            if scheme.format != quantize:  # int4's head, which is that of int8
                continue
            copies = _copies(random_weight(case.shape, scheme, device), sizes.rotated_bytes)
            x = torch.randn(batch, case.shape[1], device=device, dtype=DTYPE)
            record = {"model": name, "batch": batch, "op": op, "quantize": quantize}
            for of_launch in _timed(bench, x, copies, case):
                yield record | of_launch
            del copies


def _copies(weight: FusedWeight, n_bytes: int) -> list[FusedWeight]:
    """A weight and copies of it, of this many bytes in all or more."""
    count = ceil_div(n_bytes, weight.n_bytes) - 1
    copies = (replace(weight, values=weight.values.clone(), scales=weight.scales.clone()) for _ in range(count))
    return [weight, *copies]


def _timed(bench: Bench, x: Tensor, weights: list[FusedWeight], case: Op) -> Iterator[Record]:
    launches = launches_of(weights[0], case.tiles, x.shape[0])[: bench.sizes.other_launches + 1]
    for launch in launches:
        calls = [partial(project, launch, x, weight, case.epilogue) for weight in weights]
        calls *= ceil_div(MIN_CALLS, len(calls))
        yield {"variant": launch_text(launch), "in_table": launch == launches[0]} | timed(bench, calls)


def project(launch: Launch, x: Tensor, weight: FusedWeight, epilogue: dict[str, Any]) -> Tensor:
    """One call of the kernel that a launch is for."""
    if isinstance(launch, matvec.Launch):
        return quantized_matvec(x, weight, launch=launch, **epilogue)
    return quantized_few_tokens(x, weight, launch=launch, **epilogue)


def launches_of(weight: FusedWeight, tiles: int, batch: int) -> list[Launch]:
    """The table's launch, then similar ones, none of which spills registers."""
    if batch == 1 and is_best(weight, tiles, DTYPE):
        return list(dict.fromkeys(_matvec_launches(weight, tiles)))
    columns = MIN_COLUMNS if batch <= MIN_COLUMNS else 2 * MIN_COLUMNS
    found = dict.fromkeys(_few_tokens_launches(weight, tiles, columns))
    spilling = SPILLING.get((weight.format, *weight.shape, columns), set())
    return [launch for launch in found if launch not in spilling]


def _matvec_launches(weight: FusedWeight, tiles: int) -> Iterator[matvec.Launch]:
    table_launch = choose_matvec(weight, tiles)
    assert table_launch is not None, "is_best says that there is one"
    yield table_launch
    words = weight.words.shape[1]
    for more_rows, more_warps in product(ROWS, WARPS):
        rows, warps = int(table_launch.rows * more_rows), int(table_launch.warps * more_warps)
        if 1 <= rows <= MAX_ROWS and 1 <= warps <= MAX_WARPS:
            chunk = int(table_launch.chunk * more_warps)
            chunk = chunk if chunk and words % chunk == 0 else table_launch.chunk
            if rows * tiles * words * WORD_BYTES <= MAX_THREAD_BYTES * 32 * warps:
                yield matvec.Launch(rows, chunk, warps)


def _few_tokens_launches(weight: FusedWeight, tiles: int, columns: int) -> Iterator[FewTokens]:
    target = current_target()
    table_launch = choose_few_tokens(weight, tiles, columns, DTYPE.itemsize, target)
    yield table_launch
    x_bytes = columns * DTYPE.itemsize * (2 if weight.format == "int4" else 1)  # for each byte of a row
    for more_rows, more_unroll, more_stages, more_warps in CHANGES:
        rows, unroll = int(table_launch.rows * more_rows), int(table_launch.unroll * more_unroll)
        stages, warps = int(table_launch.stages * more_stages), int(table_launch.warps * more_warps)
        shared = stages * unroll * warps * table_launch.chunk * (rows * tiles + x_bytes)
        fits = shared <= target.shared_bytes - SHARED_BYTES_SPARE
        if MIN_ROWS <= rows <= MAX_ROWS and unroll and stages >= 2 and warps and fits:
            yield FewTokens(rows, table_launch.chunk, unroll, stages, warps)
