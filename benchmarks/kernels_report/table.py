"""The table of what compilers make of the kernels: its rows, and what they must hold to.

Rows are plain dicts, so that they pass between the processes that compile for different GPUs.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from fastllama.benchmarks.kernels_report import dependence
from fastllama.benchmarks.kernels_report.ahead_of_time import GPUS, Gpu, Launch, recorded
from fastllama.benchmarks.kernels_report.compiled_kernel import Compiled
from fastllama.benchmarks.kernels_report.model_launches import (
    BATCHES,
    CONTEXT_TOKENS,
    MODELS,
    OTHERS_MODELS,
    PREFILL_TOKENS,
    Shape,
    decode_ops,
    prefill_ops,
    whole_step,
)
from fastllama.benchmarks.kernels_report.traffic import counted, least_bytes
from fastllama.benchmarks.kernels_report.weight_streaming import streaming
from fastllama.kernels.attention.tile import DEFAULT_SHARED_BYTES
from fastllama.kernels.launch import dependent

Row = dict[str, Any]
STREAMED = ("weight_ptr", "table_ptr", "cache_k_ptr", "cache_v_ptr")  # read from memory, not from L2
MUST_READ = {
    "_matvec_kernel": ("weight",),
    "_few_tokens_kernel": ("weight",),
    "_attention_decode_kernel": ("cache_k", "cache_v"),
    "_attention_prefill_kernel": ("cache_k", "cache_v"),
    "_embed_kernel": ("table",),
}
PROJECTIONS = {"_matvec_kernel", "_few_tokens_kernel"}
HAND_OVERS = {"_attention_decode_kernel", "_draw_kernel"}  # to the last program, by an atomic counter
MOST_STREAMED = 1.02  # of the least: each weight and each cached key is read once
WIDE_LOAD_BYTES = 16
LAYER_LAUNCHES = 5
OTHER_LAUNCHES = 4  # of a step: embed, head, two of choose
WHOLE_STEP = "step"  # the op of a row that counts a step's launches
DOTS = {"_few_tokens_kernel", "_attention_decode_kernel", "_attention_prefill_kernel"}
H200 = "sm_90"
EVERY_MODELS_GPUS = (H200, "sm_86", "sm_120")  # and what people have at home


class _OtherKernels(TorchDispatchMode):
    """Counts torch's own operations that would be a kernel on a GPU: all but allocations and views."""

    FREE = ("aten::empty", "aten::detach")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or func._schema.name.startswith(self.FREE))
        return func(*args, **(kwargs or {}))


def compiled_rows(gpu_name: str) -> Iterator[Row]:
    """Every launch of the models' decode steps and prefill chunks, compiled for one GPU."""
    gpu, models = GPUS[gpu_name], MODELS if gpu_name in EVERY_MODELS_GPUS else OTHERS_MODELS
    seen: dict[str, Compiled] = {}  # by triton's own key: the same kernel serves many launches
    for model in models:
        shape = MODELS[model]
        for tokens in (*BATCHES, PREFILL_TOKENS):
            ops = prefill_ops(shape) if tokens == PREFILL_TOKENS else decode_ops(shape, tokens)
            for name, call in ops:
                other = _OtherKernels()
                with recorded(gpu) as launches, other:
                    call()
                for launch in launches:
                    where = {"gpu": gpu_name, "model": model, "tokens": tokens, "op": name, "other": other.count}
                    compiled = seen.setdefault(launch.compiled.hash, Compiled(launch.compiled, gpu))
                    yield where | _measured(launch, compiled, gpu)
            if tokens != PREFILL_TOKENS:
                other, run = _OtherKernels(), whole_step(shape, tokens)
                with recorded(gpu) as launches, other:
                    run()
                where = {"gpu": gpu_name, "model": model, "tokens": tokens, "op": WHOLE_STEP, "other": other.count}
                yield where | {"launches": len(launches)}


def _measured(launch: Launch, compiled: Compiled, gpu: Gpu) -> Row:
    programs = 1
    for size in launch.grid:
        programs *= size
    row: Row = {
        "kernel": launch.kernel,
        "programs": programs,
        "warps": compiled.warps,
        "stages": compiled.stages,
        "registers": compiled.registers,
        "spills": compiled.spills,
        "shared": compiled.shared,
        "resident": compiled.programs_per_processor,
        "loads": {name.removesuffix("_ptr"): sorted(widths) for name, widths in compiled.loads.items()},
        "matrix": compiled.matrix_instructions,
        "barrier": compiled.barrier_before_atomics,
        "dependent": compiled.dependent,
        "waits": dependence.waits(compiled.ir),
        "faults": dependence.faults(compiled.ir) if compiled.dependent else [],
        "prefetched": sorted(dependence.prefetches(compiled.ir)),
    }
    if gpu.arch == 90 and "weight_ptr" in launch.arguments and launch.kernel in PROJECTIONS:
        row |= streaming(launch, compiled, programs)
    return row


def traffic_rows() -> Iterator[Row]:
    """Bytes that every launch of the decode steps moves, against the least."""
    for model, shape in MODELS.items():
        for tokens in BATCHES:
            for name, call in decode_ops(shape, tokens):
                with counted() as launches:
                    call()
                for launch in launches:
                    streamed = sum(launch.moved.get(argument, 0) for argument in STREAMED)
                    live = _live_bytes(shape, tokens, name)
                    yield {
                        "model": model,
                        "tokens": tokens,
                        "op": name,
                        "kernel": launch.kernel,
                        "least": least_bytes(launch, live),
                        "least_streamed": least_bytes(launch, live, STREAMED),
                        "streamed": streamed,
                        "rest": sum(launch.moved.values()) - streamed,
                    }


def _live_bytes(shape: Shape, tokens: int, op: str) -> dict[str, int]:
    """Of tensors of which an op means only a part, that part's bytes."""
    positions = tokens * (CONTEXT_TOKENS if op == "layer attention" else 1)
    cache = positions * shape.n_kv_heads * shape.head_dim * 2
    written = {"is_stop_ptr": tokens, "tokens_ptr": 8 * tokens, "logprobs_ptr": 4 * tokens} if op == "sample" else {}
    return written | {
        "table_ptr": tokens * shape.dim * 2,
        "rope_ptr": tokens * shape.head_dim * 4,
        "cache_k_ptr": cache,
        "cache_v_ptr": cache,
    }


def violations(rows: Sequence[Row]) -> list[str]:
    """What a compiled row must not be: each broken rule, with where."""
    found = []
    for row in rows:
        if row["op"] == WHOLE_STEP:
            continue
        gpu = GPUS[row["gpu"]]
        can_depend = gpu.backend == "cuda" and int(gpu.arch) >= dependent.MIN_ARCH
        is_of_step = row["tokens"] != PREFILL_TOKENS
        loads = {name: min(widths) for name, widths in row["loads"].items()}
        narrow = [name for name in STREAMED if loads.get(name.removesuffix("_ptr"), WIDE_LOAD_BYTES) < WIDE_LOAD_BYTES]
        unread = [name for name in MUST_READ.get(row["kernel"], ()) if name not in loads]
        broken = {
            f"spills {row['spills']}": row["spills"] > 0,
            f"{row['shared']} bytes of shared memory, of {gpu.shared_bytes}": row["shared"] > gpu.shared_bytes,
            f"loads {', '.join(narrow)} in less than {WIDE_LOAD_BYTES} bytes": bool(narrow),
            "loads from an address that is no argument's": "?" in loads,
            "uses no matrix instructions": row["kernel"] in DOTS and not row["matrix"],
            "has no barrier before its atomic": row["barrier"] is not (True if row["kernel"] in HAND_OVERS else None),
            f"reads no {', '.join(unread)}": bool(unread),
            f"launches {row['other']} kernels of torch": row["other"] > 0,
            "is not launched as dependent": can_depend and is_of_step and not row["dependent"],
            "waits without being launched as dependent": row["waits"] > 0 and not row["dependent"],
            ", ".join(row["faults"]): bool(row["faults"]),
            "prefetches nothing": can_depend and is_of_step and _should_prefetch(row),
            f"takes {row['shared']} bytes of shared memory, more than the plain {DEFAULT_SHARED_BYTES}": (
                row["kernel"] == "_attention_decode_kernel" and row["shared"] > DEFAULT_SHARED_BYTES
            ),
            **_held_up(row, gpu),
        }
        where = f"{row['gpu']} {row['model']} {row['op']} at {row['tokens']} tokens: {row['kernel']}"
        found += [f"{where} {what}" for what, is_broken in broken.items() if is_broken]
    return found + list(_miscounted(rows))


def _held_up(row: Row, gpu: Gpu) -> dict[str, bool]:
    """What keeps a projection from reading its weight at the full rate, on an H200."""
    if "in_flight" not in row:
        return {}
    if "chain" in row:
        # More programs than run at once, twice over: most of them have nothing to wait for.
        in_vain = row["prefetching"] == row["programs"] > 2 * row["resident"] * gpu.processors
        held = f"multiplies for {row['chain']:.0f} cycles a stage, of {row['budget']:.0f}"
        return {held: row["chain"] > row["budget"], "prefetches in programs that do not wait": in_vain}
    return {
        f"requests {row['x_early']} of x's {row['x_loads']} loads before its weights": row["x_early"] < row["x_loads"],
        "knows its norm only behind its weights": row["holds_scales"] and row["norm_first"] is False,
        "prefetches row by row": row["looped_prefetches"] > 0,
    }


def _should_prefetch(row: Row) -> bool:
    return row["kernel"] in PROJECTIONS | {"_attention_decode_kernel"} and not row["prefetched"]


def wasteful(rows: Sequence[Row]) -> list[str]:
    """Launches that read weights, embedding or cache more than once, or not wholly."""
    return [
        f"{row['model']} {row['op']} at {row['tokens']} rows reads {row['streamed']} bytes, not {row['least_streamed']}"
        for row in rows
        if not row["least_streamed"] <= row["streamed"] <= MOST_STREAMED * row["least_streamed"]
    ]


def launch_counts(rows: Sequence[Row]) -> dict[tuple[str, str, int], tuple[int, int]]:
    """(GPU, model, rows in the batch) -> (launches of a layer, of a whole step, torch's included)."""
    counts = {}
    for row in rows:
        if row["op"] == WHOLE_STEP:
            where = row["gpu"], row["model"], row["tokens"]
            same = [other for other in rows if (other["gpu"], other["model"], other["tokens"]) == where]
            layer = sum(other["op"].startswith("layer") for other in same)
            counts[where] = layer, row["launches"] + row["other"]
    return counts


def _miscounted(rows: Sequence[Row]) -> Iterator[str]:
    for (gpu, model, tokens), (layer, step) in launch_counts(rows).items():
        expected = LAYER_LAUNCHES * MODELS[model].n_layers + OTHER_LAUNCHES
        if (layer, step) != (LAYER_LAUNCHES, expected):
            yield f"{gpu} {model} at {tokens} rows takes {layer} launches a layer, {step} a step, not 5 and {expected}"
