"""`fastllama inspect`: describes a checkpoint, and the memory and speed to expect, from its headers."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from fastllama.cli.inspect_plans import (
    AS_STORED,
    Planner,
    machine_section,
    precision_plans,
    precisions_section,
    process_plan,
    process_plan_text,
    size_text,
    speculation_section,
)
from fastllama.cli.inspect_tokenizer import describe_tokenizer, tokenizer_section
from fastllama.cli.options import (
    DTYPES,
    LONGEST_SEQUENCE,
    adapter_option,
    cache_tokens_option,
    checkpoint_and_tokenizer,
    json_option,
    quantize_option,
    threads_option,
)
from fastllama.cli.parameter_types import Choice, Integers
from fastllama.cli.standard_streams import write_stdout

if TYPE_CHECKING:
    from fastllama.memory_plan import MemoryPlan
    from fastllama.quantization import Scheme

# Copies of the keys of speed_of_light.DATA_SHEETS, which imports torch. A test compares them.
GPUS = ("A100", "H100", "H200", "B200")
DEFAULT_MAX_SEQ_LEN = 2048
DEFAULT_MAX_BATCH_SIZE = 1
SIZES = ("max_seq_len", "max_batch_size", "cache_tokens")  # of the cache, not of the model


@click.command()
@click.argument("checkpoint", required=False, metavar="[CKPT]")
@click.option("--ckpt_dir", metavar="PATH", help="The same as CKPT.")
@click.option("--tokenizer_path", metavar="FILE", help="Default: the tokenizer in the checkpoint.")
@adapter_option
@click.option(
    "--max_seq_len",
    type=click.IntRange(1, LONGEST_SEQUENCE),
    default=DEFAULT_MAX_SEQ_LEN,
    show_default=True,
    help="To plan for.",
)
@click.option(
    "--max_batch_size",
    type=click.IntRange(min=1),
    default=DEFAULT_MAX_BATCH_SIZE,
    show_default=True,
    help="To plan for.",
)
@cache_tokens_option
@click.option("--dtype", type=Choice(DTYPES), help="To plan for. Default: the one stored.")
@quantize_option
@click.option(
    "--nproc",
    type=Integers(),
    default="1,2,4,8",
    show_default=True,
    help="Numbers of processes, one on each GPU, to plan for.",
)
@click.option("--gpu", type=Choice(GPUS), default="H100", show_default=True, help="Whose data sheet sets the limit.")
@threads_option
@json_option("one object")
def inspect(
    checkpoint: str | None,
    ckpt_dir: str | None,
    tokenizer_path: str | None,
    adapter: tuple[str, ...],
    max_seq_len: int,
    max_batch_size: int,
    cache_tokens: int | None,
    dtype: str | None,
    quantize: str | None,
    nproc: tuple[int, ...],
    gpu: str,
    as_json: bool,
) -> None:
    """Describe the checkpoint CKPT, a folder or a GGUF file.

    The output is its architecture, files, memory and tokenizer, and what several GPUs bring. Cache tokens are those
    that fit of all rows together, up to --max_seq_len for each.

    No weight is read, but for those that several files must agree on. The tokens a second are a limit: what reading
    the weights and the cache, and exchanging sums, takes at least by the GPU's data sheet. The speed-up
    of guesses is computed likewise, with a gap between launches. Neither is measured.

    \b
    Examples:
      fastllama inspect Meta-Llama-3-8B
      fastllama inspect Meta-Llama-3-8B --max_batch_size 8 --max_seq_len 8192 --dtype bfloat16
      fastllama inspect Meta-Llama-3-70B --nproc 2,4,8 --gpu H200
      fastllama inspect Meta-Llama-3-8B --max_batch_size 64 --max_seq_len 8192 --cache_tokens 100000
    """
    if checkpoint is not None and ckpt_dir is not None:
        raise click.UsageError("CKPT and --ckpt_dir are the same: give one of them.")
    folder, tokenizer_file = checkpoint_and_tokenizer(checkpoint or ckpt_dir, tokenizer_path, quiet=as_json)
    shape = {"max_batch_size": max_batch_size, "max_seq_len": max_seq_len, "cache_tokens": cache_tokens}
    precision = {"dtype": dtype, "quantize": quantize}
    description = describe(folder, tokenizer_file, shape, **precision, adapters=adapter, nproc=nproc, gpu=gpu)
    write_stdout(json.dumps(description) if as_json else render(description))


def describe(
    ckpt_dir: str,
    tokenizer_path: str,
    shape: Mapping[str, Any],
    *,
    dtype: str | None,
    quantize: str | None,
    nproc: Sequence[int],
    gpu: str,
    adapters: Sequence[str] = (),
) -> dict[str, Any]:
    """Describe a checkpoint without reading its weights -> JSON values; sizes in bytes.

    shape: ModelArgs' sizes of the cache, by name.
    """
    import torch

    from fastllama.args import ROPE_FIELDS, ModelArgs
    from fastllama.checkpoint import open_checkpoint
    from fastllama.checkpoint.base import dtype_name
    from fastllama.memory_plan import most_cache_tokens, plan_memory
    from fastllama.quantization import model_schemes

    checkpoint = open_checkpoint(ckpt_dir, adapters)
    args = ModelArgs(**checkpoint.params, **shape)
    planned: torch.dtype = checkpoint.dtype if dtype is None else getattr(torch, dtype)

    def plan_of(n: int, choice: str | None) -> "MemoryPlan":
        sizes = args, planned, args.max_batch_size, args.max_seq_len
        return plan_memory(*sizes, n_processes=n, quantize=choice, stored=checkpoint.schemes(n))

    def tokens_in(memory: int, n: int) -> int:
        return most_cache_tokens(args, planned, memory, n_processes=n, quantize=quantize, stored=checkpoint.schemes(n))

    def schemes_of(n: int) -> "Mapping[str, Scheme]":
        return model_schemes(quantize, args.split(n), checkpoint.schemes(n))

    kept = AS_STORED if checkpoint.precisions else dtype_name(planned)
    precision = {"dtype": dtype_name(planned), "quantize": quantize, "precision": quantize or kept}
    plan = plan_of(1, quantize)
    planner = Planner(args, planned, gpu, partial(plan_of, choice=quantize), schemes_of, tokens_in)
    # Fields that only other rope types read have no effect.
    without_effect = {name for names in ROPE_FIELDS.values() for name in names}.difference(ROPE_FIELDS[args.rope_type])
    hidden = without_effect.union(SIZES)
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "architecture": {name: value for name, value in vars(args).items() if name not in hidden},
        "parameters": checkpoint.n_parameters,
        "stored_dtype": next(iter(checkpoint.bytes_by_type), dtype_name(checkpoint.dtype)),
        "bytes_by_type": dict(checkpoint.bytes_by_type),
        "quantized": list(checkpoint.precisions),
        "files": [{"name": path.name, "bytes": size} for path, size in checkpoint.files],
        "adapters": [str(path) for path in checkpoint.adapters],
        "passed_over": [{"path": os.path.relpath(path, ckpt_dir), "why": why} for path, why in checkpoint.passed_over],
        "memory": {**precision, **shape, **asdict(plan), "total": plan.total},
        "precisions": precision_plans(kept, plan_of),
        "this_machine": _describe_machine(tokens_in),
        "gpu": gpu,
        "processes": [process_plan(planner, n) for n in dict.fromkeys(nproc)],
        "tokenizer": describe_tokenizer(tokenizer_path, checkpoint, named=tokenizer_path != ckpt_dir),
    }


def _describe_machine(tokens_in: Callable[[int, int], int]) -> dict[str, Any]:
    """What runs a model here by default. tokens_in: the cache tokens that fit in some memory."""
    from fastllama import memory_plan, threads
    from fastllama.kernels import select
    from fastllama.loading import choose_device

    device = choose_device(None)
    try:
        free = memory_plan.free_memory(device)
    except ValueError:  # a launcher's variables are invalid, and nothing is launched
        free = None
    return {
        "device": str(device),
        "backend": select.backend(None, device).__name__.rpartition(".")[2],
        "instruction_set": select.instruction_set(None, device),
        "threads": threads.available(),
        "free_memory": free,
        "cache_tokens": None if free is None else tokens_in(free, 1),
    }


def render(description: dict[str, Any]) -> str:
    """The result of `describe` as text."""
    memory, tokenizer = description["memory"], description["tokenizer"]
    files, passed_over = description["files"], description["passed_over"]
    total = sum(file["bytes"] for file in files)
    shape = f"{memory['max_batch_size']} rows of {memory['max_seq_len']} tokens"
    shape += f", {memory['cache_tokens']} together," if memory["cache_tokens"] else ""
    shape += f" in {memory['dtype']}"
    shape += f", weights: {memory['precision']}" if memory["precision"] != memory["dtype"] else ""
    sections = [
        (
            "checkpoint",
            [
                ("path", description["path"]),
                ("format", description["format"]),
                *([("quantised", ", ".join(description["quantized"]))] if description["quantized"] else []),
            ],
        ),
        (
            "architecture",
            [
                ("parameters", f"{description['parameters']:,}"),
                *(
                    (name, _field_text(value))
                    for name, value in description["architecture"].items()
                    if value is not None
                ),
            ],
        ),
        (
            f"files: {len(files)}, {size_text(total)}, stored in {_stored_text(description)}",
            [(file["name"], size_text(file["bytes"])) for file in files],
        ),
        *([("adapters", [("merged", path) for path in description["adapters"]])] if description["adapters"] else []),
        *([("passed over", [(one["path"], one["why"]) for one in passed_over])] if passed_over else []),
        (
            f"memory for {shape}",
            [(name, size_text(memory[name])) for name in ("weights", "cache", "workspace", "total")],
        ),
        precisions_section(description["precisions"]),
        machine_section(description["this_machine"]),
        (
            f"on several {description['gpu']}: memory each, most tokens/s, share of the exchange, cache tokens",
            [(str(one["n"]), process_plan_text(one)) for one in description["processes"]],
        ),
        *speculation_section(description["gpu"], description["processes"]),
        tokenizer_section(tokenizer, description["architecture"]["vocab_size"])
        if tokenizer
        else ("tokenizer: none in the checkpoint", []),
    ]
    return "\n\n".join("\n".join([title, *_aligned(rows)]) for title, rows in sections)


def _field_text(value: object) -> str:
    """A field's value; of many numbers, how many and their range."""
    if isinstance(value, list | tuple):
        return f"{len(value)} from {min(value):g} to {max(value):g}"
    return str(value)


def _stored_text(description: dict[str, Any]) -> str:
    """The dtype of the weights; of quantised ones, every type or precision with its share of the bytes."""
    sizes = description["bytes_by_type"]
    total = sum(sizes.values())
    return ", ".join(f"{name} ({size / total:.1%})" for name, size in sizes.items()) or description["stored_dtype"]


def _aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max((len(name) for name, _ in rows), default=0)
    return [f"  {name:{width}}  {value}" for name, value in rows]
