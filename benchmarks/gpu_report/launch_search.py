"""A section of a GPU report: each launch of the launch tables, similar launches, and the library's matmul.

The launch tables of `matvec.py`, `few_tokens.py` and attention's `scratch.py` are calculated, not measured. Launches
that are faster on a GPU replace them.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllama.benchmarks.gpu_report.measurements import DTYPE, Bench, Record, Results
from fastllama.benchmarks.gpu_report.sizes import ends
from fastllama.benchmarks.suites.step_launches import fill_cache
from fastllama.kernels.attention.decode import attention_decode
from fastllama.kernels.attention.scratch import NUM_SPLITS, AttentionScratch
from fastllama.kernels.batch import RaggedBatch
from fastllama.kernels.launch.target import current_target
from fastllama.kernels.projection import few_tokens, matvec
from fastllama.kernels.rope import CacheTarget
from fastllama.model import Transformer

# Factors by which the table's sizes are multiplied, and limits of the products.
ROWS, MAX_ROWS = (1, 2, 0.5), 128
WARPS, MAX_WARPS = (1, 2, 0.5), 16
STAGES = (1, 0.5)
CHUNKS = (1, 2)
MAX_THREAD_BYTES = 512  # of weights in a thread's registers
OTHER_SPLITS = (16, 64, 128)
# Launches that spill registers on compute capability 9.0 with triton 3.6 or 3.7, with a norm or without, by the shape
# of a weight of 3.2-1B and the number of columns. They are not tried.
SPILLING = {
    (3072, 2048, 8): {
        few_tokens.Launch(16, 256, 3, 1, 2),
        few_tokens.Launch(32, 256, 3, 2, 2),
        few_tokens.Launch(32, 512, 3, 2, 1),
    },
    (3072, 2048, 16): {few_tokens.Launch(16, 256, 3, 2, 2)},
    (128256, 2048, 16): {few_tokens.Launch(128, 256, 3, 4, 1)},
    (2048, 2048, 16): {few_tokens.Launch(32, 256, 4, 4, 2)},
}
MIN_CALLS = 4  # in one graph

Launch = matvec.Launch | few_tokens.Launch


def variants(bench: Bench) -> Results:
    """Times decode attention, then every projection, of every model."""
    for name in bench.sizes.models:
        yield from _attention(bench, name)
    for name in bench.sizes.models:
        for batch in bench.sizes.batches:
            yield from _projections(bench, name, batch)


@torch.inference_mode()
def _projections(bench: Bench, name: str, batch: int) -> Iterator[Record]:
    model = bench.model(name)
    positions = RaggedBatch.of([(row, bench.sizes.contexts[0] - 1, [1]) for row in range(batch)], bench.device)
    model.cache.extend([bench.sizes.contexts[0]] * batch)
    target = CacheTarget.of(model.cache.layer(0), model.rope, positions)
    # Launches also differ in whether the norm comes before or after the weights, so it is included.
    norm = {"norm": model.norm.detach(), "eps": model.params.norm_eps}
    # (every layer's weight, tiles of rows in a program, keywords of the epilogue)
    ops: dict[str, tuple[Sequence[Tensor], int, dict[str, Any]]] = {
        "qkv": (_weights(model, "wqkv"), 2, {"append_to": target, **norm}),
        "output": (_weights(model, "wo"), 1, {}),
        "gate+up": (_weights(model, "w13"), 2, {"swiglu": True, **norm}),
        "down": (_weights(model, "w2"), 1, {}),
        "head": ([cast(Tensor, model.output).detach()], 1, norm),
    }
    for op, (weights, tiles, epilogue) in ops.items():
        x = torch.randn(batch, weights[0].shape[1], device=bench.device, dtype=DTYPE)
        launches = _launches(weights[0], tiles, batch)[: bench.sizes.other_launches + 1]
        functions: dict[str, Callable[[Tensor], object]] = {
            launch_text(launch): partial(_project, launch, epilogue, x) for launch in launches
        }
        functions["the library's matmul"] = partial(F.linear, x)
        for variant, function in functions.items():
            calls = [partial(function, weight) for weight in weights] * -(-MIN_CALLS // len(weights))
            in_table = variant == launch_text(launches[0])
            record = {"model": name, "batch": batch, "op": op, "variant": variant, "in_table": in_table}
            yield record | timed(bench, calls)


def _project(launch: Launch, epilogue: dict[str, Any], x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(launch, matvec.Launch):
        return matvec.matvec(x, weight, launch=launch, **epilogue)
    return few_tokens.few_tokens(x, weight, launch=launch, **epilogue)


def _weights(model: Transformer, attribute: str) -> Sequence[Tensor]:
    return [getattr(layer, attribute).detach() for layer in model.layers]


def _launches(weight: Tensor, tiles: int, batch: int) -> Sequence[Launch]:
    """The table's launch, then similar ones."""
    return _matvec_launches(weight, tiles) if batch == 1 else _few_tokens_launches(weight, tiles, batch)


def _matvec_launches(weight: Tensor, tiles: int) -> list[matvec.Launch]:
    table_launch = matvec.choose_launch(weight, tiles)
    if table_launch is None:
        raise ValueError(f"rows of {weight.shape[1]} elements are too long for matvec")
    in_features = weight.shape[1]
    found = [table_launch, table_launch._replace(x_first=False)]
    for more_rows in ROWS:
        for more_warps in WARPS:
            rows, warps = int(table_launch.rows * more_rows), int(table_launch.warps * more_warps)
            if not (1 <= rows <= MAX_ROWS and 1 <= warps <= MAX_WARPS):
                continue
            chunk = int(table_launch.chunk * more_warps)
            chunk = chunk if chunk and in_features % chunk == 0 else table_launch.chunk
            if rows * tiles * in_features * weight.itemsize <= MAX_THREAD_BYTES * 32 * warps:
                found.append(matvec.Launch(rows, chunk, warps))
    return list(dict.fromkeys(found))


def _few_tokens_launches(weight: Tensor, tiles: int, batch: int) -> list[few_tokens.Launch]:
    target = current_target()
    columns = 8 if batch <= 8 else 16
    table_launch = few_tokens.choose_launch(weight, tiles, columns, target)
    found = [table_launch]
    # First the same stage with one accumulator, whose matrix instructions all wait for each other.
    for accumulators in dict.fromkeys((1, table_launch.accumulators)):
        stage_chunk = table_launch.chunk * table_launch.accumulators // accumulators
        for more_rows, more_chunk, more_stages in product(ROWS, CHUNKS, STAGES):
            rows, chunk = int(table_launch.rows * more_rows), stage_chunk * more_chunk
            stages = max(2, int(table_launch.stages * more_stages))
            shared = stages * accumulators * (rows * tiles + columns) * chunk * weight.itemsize
            fits = shared <= target.shared_bytes - few_tokens.SHARED_BYTES_SPARE
            if 16 <= rows <= MAX_ROWS and accumulators * chunk <= weight.shape[1] and fits:
                warps = max(1, min(4, rows // 16 * (columns // 8)))
                found.append(few_tokens.Launch(rows, chunk, stages, warps, accumulators))
    spilling = SPILLING.get((*weight.shape, columns), set())
    return [launch for launch in dict.fromkeys(found) if launch not in spilling]


def launch_text(launch: NamedTuple) -> str:
    """A launch's fields."""
    return ", ".join(f"{name} {value}" for name, value in launch._asdict().items())


@torch.inference_mode()
def _attention(bench: Bench, name: str) -> Iterator[Record]:
    model, sizes = bench.model(name), bench.sizes
    args = model.params
    for batch in ends(sizes.batches):
        for context in sizes.contexts:
            fill_cache(model, batch, context)
            positions = torch.full((batch,), context - 1, device=bench.device)
            q = torch.randn(batch, args.n_heads, args.head_dim, device=bench.device, dtype=DTYPE)
            # Two pairs of tiles in flight take more than 48 KB of shared memory.
            other_cases = [(NUM_SPLITS, 2), *((splits, 1) for splits in OTHER_SPLITS)][: sizes.other_launches]
            for splits, pairs in ((NUM_SPLITS, 1), *other_cases):
                scratch = AttentionScratch.of(
                    batch, args.n_kv_heads, args.n_heads, args.head_dim, bench.device, num_splits=splits
                )
                calls = [
                    partial(attention_decode, q, model.cache.layer(layer), positions, scratch, pairs)
                    for layer in range(model.n_layers)
                ]
                case = {"model": name, "batch": batch, "op": f"attention over {context}"}
                variant, in_table = f"slots {splits}, pairs {pairs}", (splits, pairs) == (NUM_SPLITS, 1)
                yield case | {"variant": variant, "in_table": in_table} | timed(bench, calls)


def timed(bench: Bench, calls: Sequence[Callable[[], object]]) -> Record:
    """The time of one call, or its error: not every launch fits every GPU."""
    try:
        return {"microseconds": bench.microseconds(calls)}
    except Exception as error:
        if bench.device.type == "cuda":
            torch.cuda.synchronize()  # raises if the GPU's context is broken, which ends the section
        return {"microseconds": None, "error": f"{type(error).__name__}: {error}"[:200]}
