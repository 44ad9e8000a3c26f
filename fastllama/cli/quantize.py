"""`fastllama quantize`: writes a quantised copy of a checkpoint that transformers reads."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastllama.cli.inspect_plans import size_text
from fastllama.cli.options import adapter_option, json_option, threads_option
from fastllama.cli.standard_streams import write_stderr, write_stdout
from fastllama.cli.text_files import read_text

if TYPE_CHECKING:
    from fastllama.calibration import Calibration
    from fastllama.checkpoint import Checkpoint

FORMATS = ("int8", "fp8", "int4")
GROUP_SIZES = ("128", "64", "32")
DEFAULT_GROUP_SIZE = "128"
WINDOW = 512  # tokens
MAX_TOKENS = 64 * WINDOW
NO_TOKENIZER = "there is no tokenizer in {0}, so none was written: copy one into {1}, or give --tokenizer_path"


@click.command()
@click.argument("checkpoint", metavar="CKPT")
@click.argument("out", metavar="OUT")
@click.option("--to", "target", type=click.Choice(FORMATS), required=True, help="The format of the weights.")
@click.option(
    "--group_size",
    type=click.Choice(GROUP_SIZES),
    help=f"Of int4: columns that share a scale, at most. Default: {DEFAULT_GROUP_SIZE}.",
)
@click.option("--calibrate", metavar="FILE", help="Of int4: text in UTF-8 like what the model will work on.")
@click.option(
    "--max_tokens",
    type=click.IntRange(1),
    help=f"Of the calibration text. Default: {MAX_TOKENS:,}.",
)
@click.option("--device", metavar="NAME", help="Of the calibration. Default: cuda where there is one.")
@click.option("--with_output", is_flag=True, help="Quantise the vocabulary projection, too.")
@click.option("--tokenizer_path", metavar="FILE", help="Default: the tokenizer in the checkpoint.")
@adapter_option
@threads_option
@json_option("one object")
def quantize(
    checkpoint: str,
    out: str,
    target: str,
    group_size: str | None,
    calibrate: str | None,
    max_tokens: int | None,
    device: str | None,
    with_output: bool,
    tokenizer_path: str | None,
    adapter: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write a quantised copy of the checkpoint CKPT to the new folder OUT.

    CKPT is a folder or a GGUF file that is not quantised. OUT is a Hugging Face folder in the format of
    compressed-tensors, which transformers reads, with tokenizer and chat template. The linear layers are
    quantised, with a scale for each row, or for each group of int4. The embedding and the vocabulary projection stay.

    int4 loses much less with --calibrate: the text runs through the model, and the weights are rounded so that
    their products with what they meet there change least (GPTQ). Thirty thousand tokens are enough. It takes about
    a minute for each 100 million weights on two CPUs.

    \b
    Examples:
      fastllama quantize Meta-Llama-3-8B Llama-3-8B-int8 --to int8
      fastllama quantize Llama-3.2-1B-Instruct 1B-int4 --to int4 --calibrate text.txt
    """
    for option, value in (("group_size", group_size), ("calibrate", calibrate)):
        if value is not None and target != "int4":
            raise click.UsageError(f"--{option} is for int4; {target} has a scale for each row.")
    for option, needs in (("device", device), ("max_tokens", max_tokens)):
        if needs is not None and calibrate is None:
            raise click.UsageError(f"--{option} is for --calibrate, which is missing.")
    text = None if calibrate is None else read_text(calibrate, "--calibrate")
    from fastllama.checkpoint import open_checkpoint
    from fastllama.checkpoint.quantized_writer import check_is_free

    check_is_free(Path(out))
    opened = open_checkpoint(checkpoint, adapter)
    tokenizer = tokenizer_path or checkpoint
    calibration = None if text is None else _calibration(opened, tokenizer, text, max_tokens or MAX_TOKENS, device)
    name = _name(target, group_size)
    written = _quantize(opened, checkpoint, tokenizer_path, Path(out), name, with_output, calibration, as_json)
    if not written["tokenizer"]:
        write_stderr(NO_TOKENIZER.format(checkpoint, out))
    write_stdout(json.dumps(written) if as_json else _render(written))


def _name(target: str, group_size: str | None) -> str:
    """The name in quantization.CHOICES."""
    return target if target != "int4" or group_size in (None, DEFAULT_GROUP_SIZE) else f"int4-g{group_size}"


def _calibration(
    checkpoint: "Checkpoint", tokenizer_path: str, text: str, max_tokens: int, device: str | None
) -> "Calibration":
    """The text as windows of tokens, on a device."""
    from fastllama.calibration import Calibration
    from fastllama.checkpoint.vocabulary import vocabulary_mismatch
    from fastllama.loading import choose_device
    from fastllama.quality import windows_of
    from fastllama.tokenizer_open import open_tokenizer

    tokenizer = open_tokenizer(tokenizer_path, llama31=bool(checkpoint.params["use_scaled_rope"]))
    if complaint := vocabulary_mismatch(checkpoint, tokenizer_path, tokenizer.n_words):
        raise ValueError(complaint)
    try:
        windows = windows_of(tokenizer, text, WINDOW, max_tokens)
    except ValueError as error:
        raise click.UsageError(f"--calibrate: {error}.") from error
    return Calibration(checkpoint.params, windows, choose_device(device))


def _quantize(
    checkpoint: "Checkpoint",
    ckpt_dir: str,
    tokenizer_path: str | None,
    out: Path,
    name: str,
    with_output: bool,
    calibration: "Calibration | None",
    quiet: bool,
) -> dict[str, Any]:
    """Write the folder -> what it has, as JSON values."""
    from fastllama.checkpoint import open_checkpoint
    from fastllama.checkpoint.quantized_writer import write_quantized
    from fastllama.checkpoint.quantized_writer_config import model_config
    from fastllama.checkpoint.quantized_writer_files import write_other_files

    names: list[str | None] = []
    write_quantized(
        checkpoint,
        out,
        name,
        with_output=with_output,
        config=model_config(checkpoint),
        copy_others=lambda folder: names.append(write_other_files(checkpoint, ckpt_dir, tokenizer_path, folder)),
        calibration=calibration,
        progress=False if quiet else None,
    )
    written = open_checkpoint(out)
    return {
        "path": str(out),
        "quantized": list(written.precisions),
        "calibration_tokens": 0 if calibration is None else calibration.n_tokens,
        "parameters": written.n_parameters,
        "files": [{"name": path.name, "bytes": size} for path, size in written.files],
        "bytes": sum(size for _, size in written.files),
        "bytes_before": sum(size for _, size in checkpoint.files),
        "bytes_by_type": dict(written.bytes_by_type),
        "tokenizer": names[0],
    }


def _render(written: dict[str, Any]) -> str:
    size, before = size_text(written["bytes"]), size_text(written["bytes_before"])
    calibrated = f", calibrated on {written['calibration_tokens']:,} tokens" * bool(written["calibration_tokens"])
    return f"{written['path']}: {', '.join(written['quantized'])}{calibrated}; {size}, before {before}"
