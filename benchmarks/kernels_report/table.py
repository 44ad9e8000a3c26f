"""The rows of the table of compiled kernels, and the rules that they must keep.

Rows are plain dicts, because the processes that compile for different GPUs send them as JSON.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from fastllama.args import ModelArgs
from fastllama.benchmarks.kernels_report import dependence
from fastllama.benchmarks.kernels_report.ahead_of_time import GPUS, Launch, record_launches
from fastllama.benchmarks.kernels_report.compiled_kernel import LOAD_BYTES, Compiled
from fastllama.benchmarks.kernels_report.model_launches import (
    BATCHES,
    CHECKED_TOKENS,
    COMMON_MODELS,
    CONTEXT_TOKENS,
    MODELS,
    PREFILL_TOKENS,
    PROCESSES,
    QUANTIZED,
    checked_step,
    checking_ops,
    decode_ops,
    prefill_ops,
    whole_step,
)
from fastllama.benchmarks.kernels_report.traffic import count_traffic, least_bytes
from fastllama.benchmarks.kernels_report.weight_streaming import streaming_metrics
from fastllama.kernels.attention.online_softmax import DEFAULT_SHARED_BYTES
from fastllama.kernels.launch import dependent
from fastllama.kernels.paged_cache import pages_for

Row = dict[str, Any]
STREAMED = ("weight_ptr", "table_ptr", "cache_k_ptr", "cache_v_ptr")  # read from memory, not from L2
MUST_READ = {
    "_matvec_kernel": ("weight",),
    "_few_tokens_kernel": ("weight",),
    "_quantized_matvec_kernel": ("weight", "scales"),
    "_quantized_few_tokens_kernel": ("weight", "scales"),
    "_dequantize_kernel": ("weight", "scales"),
    "_attention_decode_kernel": ("cache_k", "cache_v", "pages"),
    "_attention_prefill_kernel": ("cache_k", "cache_v", "pages"),
    "_embed_kernel": ("table",),
}
PROJECTIONS = {"_matvec_kernel", "_few_tokens_kernel", "_quantized_matvec_kernel", "_quantized_few_tokens_kernel"}
PREFETCHING = PROJECTIONS | {"_attention_decode_kernel"}
ATOMIC = {"_attention_decode_kernel", "_draw_kernel"}  # pass partial results to the last program, by an atomic counter
DOTS = {"_few_tokens_kernel", "_quantized_few_tokens_kernel", "_attention_decode_kernel", "_attention_prefill_kernel"}
MAX_STREAMED = 1.02  # of the least bytes: each weight and each cached key is read once
LAYER_LAUNCHES = 5
OTHER_LAUNCHES = 4  # of a step: embed, head, two of sampling
FP8_ARCH = 89  # the first compute capability, times ten, whose GPUs convert e4m3
WHOLE_STEP, CHECKED_STEP = WHOLE_STEPS = "step", "step that checks guesses"  # ops of rows that count its launches
CHECKED_LAUNCHES = 3  # of a step that checks looked-up guesses, beyond those of a plain one
CHECKING_MODELS = ("3.2-1B", "3-8B")
H200 = "sm_90"
ALL_MODELS_GPUS = (H200, "sm_86", "sm_120")  # the H200 and consumer GPUs


class _TorchKernelCounter(TorchDispatchMode):
    """Counts torch operations that would launch kernels on a GPU: all except allocations and views."""

    FREE = ("aten::empty", "aten::detach")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or func._schema.name.startswith(self.FREE))
        return func(*args, **(kwargs or {}))


def models_for(gpu_name: str) -> list[str]:
    """The models that are compiled for a GPU: quantised ones where all are, fp8 where the GPU converts it."""
    if gpu_name not in ALL_MODELS_GPUS:
        return [*COMMON_MODELS]
    converts = int(GPUS[gpu_name].arch) >= FP8_ARCH
    return [model for model in MODELS if converts or QUANTIZED.get(model) != "fp8"]


def compiled_rows(gpu_name: str, models: Sequence[str] = ()) -> Iterator[Row]:
    """A row for each launch of the models' decode steps and prefill chunks, compiled for one GPU.

    models: some of those that are compiled for it; all if there are none.
    """
    gpu = GPUS[gpu_name]
    seen: dict[str, Compiled] = {}  # by triton's hash: the same kernel serves many launches
    for model in models or models_for(gpu_name):
        cases = [(tokens, False) for tokens in (*BATCHES, PREFILL_TOKENS)]
        cases += [(tokens, True) for tokens in CHECKED_TOKENS if model in CHECKING_MODELS]
        for tokens, checks in cases:
            for op, call in _calls(model, tokens, checks):
                with record_launches(gpu) as launches, _TorchKernelCounter() as other:
                    call()
                row = {"gpu": gpu_name, "model": model, "tokens": tokens, "op": op, "other": other.count}
                if op in WHOLE_STEPS:
                    yield row | {"launches": len(launches)}
                    continue
                for launch in launches:
                    compiled = seen.setdefault(launch.compiled.hash, Compiled(launch.compiled, gpu))
                    yield row | _measured(launch, compiled)


def _calls(model: str, tokens: int, checks: bool) -> list[tuple[str, Callable[[], object]]]:
    """The launches of a model for so many tokens. checks: of a step that checks guesses of one row."""
    args, n_processes, quantize = MODELS[model], PROCESSES.get(model, 1), QUANTIZED.get(model)
    if checks:
        return [*checking_ops(args, tokens), (CHECKED_STEP, checked_step(args, tokens))]
    if tokens == PREFILL_TOKENS:
        return [*prefill_ops(args, n_processes, quantize)]
    step = whole_step(args, tokens, n_processes, quantize)
    return [*decode_ops(args, tokens, n_processes, quantize), (WHOLE_STEP, step)]


def _measured(launch: Launch, compiled: Compiled) -> Row:
    row: Row = {
        "kernel": launch.kernel,
        "programs": math.prod(launch.grid),
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
        "violations": dependence.violations(compiled.ir) if compiled.dependent else [],
        "prefetched": sorted(dependence.prefetches(compiled.ir)),
    }
    if compiled.gpu.arch == 90 and launch.kernel in PROJECTIONS:
        row |= streaming_metrics(launch, compiled, row["programs"])
    return row


def traffic_rows() -> Iterator[Row]:
    """A row for each launch of the models' decode steps: the bytes that it moves, and the least."""
    for model, args in MODELS.items():
        n_processes = PROCESSES.get(model, 1)
        for tokens in BATCHES:
            for op, call in decode_ops(args, tokens, n_processes, QUANTIZED.get(model)):
                with count_traffic() as launches:
                    call()
                live = _live_bytes(args.split(n_processes), tokens, op)
                for launch in launches:
                    streamed = sum(launch.moved.get(argument, 0) for argument in STREAMED)
                    yield {
                        "model": model,
                        "tokens": tokens,
                        "op": op,
                        "kernel": launch.kernel,
                        "least": least_bytes(launch, live),
                        "least_streamed": least_bytes(launch, live, STREAMED),
                        "streamed": streamed,
                        "rest": sum(launch.moved.values()) - streamed,
                    }


def _live_bytes(args: ModelArgs, tokens: int, op: str) -> dict[str, int]:
    """The bytes that an op uses of each argument that it does not use completely."""
    positions = tokens * (CONTEXT_TOKENS if op == "layer attention" else 1)
    cache = positions * args.n_kv_heads * args.head_dim * 2
    written = {"is_stop_ptr": tokens, "tokens_ptr": 8 * tokens, "logprobs_ptr": 4 * tokens} if op == "sample" else {}
    pages = tokens * (pages_for(CONTEXT_TOKENS) if op == "layer attention" else 1)
    return written | {
        "pages_ptr": 4 * pages,
        "table_ptr": tokens * args.dim * 2,
        "rope_ptr": tokens * args.head_dim * 4,
        "cache_k_ptr": cache,
        "cache_v_ptr": cache,
    }


def violations(rows: Sequence[Row]) -> list[str]:
    """Each rule that a compiled row breaks, with the launch that breaks it."""
    found = [
        f"{row['gpu']} {row['model']} {row['op']} at {row['tokens']} tokens: {row['kernel']} {what}"
        for row in rows
        if row["op"] not in WHOLE_STEPS
        for what, is_broken in _rules(row).items()
        if is_broken
    ]
    return found + list(_miscounted(rows))


def _rules(row: Row) -> dict[str, bool]:
    """Each rule's message, and whether a launch breaks the rule."""
    gpu, kernel = GPUS[row["gpu"]], row["kernel"]
    should_depend = gpu.backend == "cuda" and int(gpu.arch) >= dependent.MIN_ARCH and row["tokens"] != PREFILL_TOKENS
    narrow = [name for name in STREAMED if min(row["loads"].get(name.removesuffix("_ptr"), [LOAD_BYTES])) < LOAD_BYTES]
    unread = [name for name in MUST_READ.get(kernel, ()) if name not in row["loads"]]
    return {
        f"spills {row['spills']}": row["spills"] > 0,
        f"{row['shared']} bytes of shared memory, of {gpu.shared_bytes}": row["shared"] > gpu.shared_bytes,
        f"loads {', '.join(narrow)} in less than {LOAD_BYTES} bytes": bool(narrow),
        "loads from an address that is no argument's": "?" in row["loads"],
        "uses no matrix instructions": kernel in DOTS and not row["matrix"],
        "has no barrier before its atomic": row["barrier"] is not (True if kernel in ATOMIC else None),
        f"reads no {', '.join(unread)}": bool(unread),
        f"launches {row['other']} kernels of torch": row["other"] > 0,
        "is not launched as dependent": should_depend and not row["dependent"],
        "waits without being launched as dependent": row["waits"] > 0 and not row["dependent"],
        ", ".join(row["violations"]): bool(row["violations"]),
        "prefetches nothing": should_depend and kernel in PREFETCHING and not row["prefetched"],
        f"takes {row['shared']} bytes of shared memory, more than the default {DEFAULT_SHARED_BYTES}": (
            row["op"] == "layer attention" and row["shared"] > DEFAULT_SHARED_BYTES
        ),
        **_streaming_rules(row),
    }


def _streaming_rules(row: Row) -> dict[str, bool]:
    """The rules of a projection on an H200: it can read its weight at the full rate."""
    if "in_flight" not in row:
        return {}
    if "chain" in row:
        # If there are more than twice as many programs as run at once, most have nothing to wait for.
        wasted = row["prefetching"] == row["programs"] > 2 * row["resident"] * GPUS[row["gpu"]].processors
        slow = f"multiplies for {row['chain']:.0f} cycles a stage, more than {row['budget']:.0f}"
        return {slow: row["chain"] > row["budget"], "prefetches in programs that do not wait": wasted}
    return {
        f"requests {row['x_early']} of x's {row['x_loads']} loads before its weights": row["x_early"] < row["x_loads"],
        "computes its norm only after its weights": row["holds_scales"] and row["norm_first"] is False,
        "prefetches row by row": row["looped_prefetches"] > 0,
    }


def excess_traffic(rows: Sequence[Row]) -> list[str]:
    """Launches that read weights, embedding or cache more than once, or incompletely."""
    return [
        f"{row['model']} {row['op']} at {row['tokens']} rows reads {row['streamed']} bytes, not {row['least_streamed']}"
        for row in rows
        if not row["least_streamed"] <= row["streamed"] <= MAX_STREAMED * row["least_streamed"]
    ]


def launch_counts(rows: Sequence[Row]) -> dict[tuple[str, str, int], tuple[int, int]]:
    """(GPU, model, rows in the batch) -> (launches of a layer, launches of a step including torch's own)."""
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
    for row in rows:
        if row["op"] == CHECKED_STEP:
            expected = LAYER_LAUNCHES * MODELS[row["model"]].n_layers + OTHER_LAUNCHES + CHECKED_LAUNCHES
            if row["launches"] + row["other"] != expected:
                found = f"{row['launches']} launches and {row['other']} of torch's"
                yield f"{row['gpu']} {row['model']} checks {row['tokens'] - 1} guesses in {found}, not {expected}"
