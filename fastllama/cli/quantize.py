"""`fastllama quantize`: writes a quantised copy of a checkpoint that transformers reads."""

import json
from pathlib import Path
from typing import Any

import click

from fastllama.cli.inspect_plans import size_text
from fastllama.cli.options import adapter_option, json_option
from fastllama.cli.standard_streams import write_stdout

FORMATS = ("int8", "fp8", "int4")
GROUP_SIZES = ("128", "64", "32")
DEFAULT_GROUP_SIZE = "128"


@click.command()
@click.argument("checkpoint", metavar="CKPT")
@click.argument("out", metavar="OUT")
@click.option("--to", "target", type=click.Choice(FORMATS), required=True, help="The format of the weights.")
@click.option(
    "--group_size",
    type=click.Choice(GROUP_SIZES),
    help=f"Of int4: columns that share a scale, at most. Default: {DEFAULT_GROUP_SIZE}.",
)
@click.option("--with_output", is_flag=True, help="Quantise the vocabulary projection, too.")
@click.option("--tokenizer_path", metavar="FILE", help="Default: the tokenizer in the checkpoint.")
@adapter_option
@json_option("one object")
def quantize(
    checkpoint: str,
    out: str,
    target: str,
    group_size: str | None,
    with_output: bool,
    tokenizer_path: str | None,
    adapter: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write a quantised copy of the checkpoint CKPT to the new folder OUT.

    CKPT is a folder or a GGUF file that is not quantised. OUT is a Hugging Face folder in the format of
    compressed-tensors, which transformers reads, with tokenizer and chat template. The linear layers are
    quantised, with a scale for each row, or for each group of int4. The embedding and the vocabulary projection stay.

    \b
    Examples:
      fastllama quantize Meta-Llama-3-8B Llama-3-8B-int8 --to int8
      fastllama quantize Llama-3.2-1B-Instruct 1B-int4 --to int4 --group_size 64
    """
    if group_size is not None and target != "int4":
        raise click.UsageError(f"--group_size is for int4; {target} has a scale for each row.")
    written = _quantize(checkpoint, Path(out), _name(target, group_size), with_output, tokenizer_path, adapter)
    write_stdout(json.dumps(written) if as_json else _render(written))


def _name(target: str, group_size: str | None) -> str:
    """The name in quantization.CHOICES."""
    return target if target != "int4" or group_size in (None, DEFAULT_GROUP_SIZE) else f"int4-g{group_size}"


def _quantize(
    ckpt_dir: str, out: Path, name: str, with_output: bool, tokenizer_path: str | None, adapters: tuple[str, ...]
) -> dict[str, Any]:
    """Write the folder -> what it has, as JSON values."""
    from fastllama.checkpoint import open_checkpoint
    from fastllama.checkpoint.quantized_writer import check_is_free, write_quantized
    from fastllama.checkpoint.quantized_writer_config import model_config
    from fastllama.checkpoint.quantized_writer_files import write_other_files

    check_is_free(out)
    checkpoint = open_checkpoint(ckpt_dir, adapters)
    write_quantized(
        checkpoint,
        out,
        name,
        with_output=with_output,
        config=model_config(checkpoint),
        copy_others=lambda folder: write_other_files(checkpoint, tokenizer_path or ckpt_dir, folder),
    )
    written = open_checkpoint(out)
    return {
        "path": str(out),
        "quantized": list(written.precisions),
        "parameters": written.n_parameters,
        "files": [{"name": path.name, "bytes": size} for path, size in written.files],
        "bytes": sum(size for _, size in written.files),
        "bytes_before": sum(size for _, size in checkpoint.files),
        "bytes_by_type": dict(written.bytes_by_type),
    }


def _render(written: dict[str, Any]) -> str:
    size, before = size_text(written["bytes"]), size_text(written["bytes_before"])
    return f"{written['path']}: {', '.join(written['quantized'])}; {size}, before {before}"
