"""`fastllama quality`: perplexity on a text, and the difference that quantisation makes."""

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import click

from fastllama.cli.inspect_plans import AS_STORED
from fastllama.cli.options import (
    LONGEST_SEQUENCE,
    checkpoint_and_tokenizer,
    checkpoint_options,
    device_options,
    json_option,
    quantize_option,
    threads_option,
)
from fastllama.cli.standard_streams import write_stdout
from fastllama.cli.text_files import read_text

DEFAULT_WINDOW = 512
LONGEST_NUMBER = 1e6  # of a perplexity that is written in full
HELD_OUT = "60 short stories, which the built-in model has not seen"


class Side(NamedTuple):
    """One of the models that are compared."""

    ckpt_dir: str
    tokenizer_path: str
    quantize: str | None


@click.command()
@checkpoint_options
@device_options
@quantize_option
@threads_option
@click.option(
    "--against",
    metavar="PATH",
    help="Checkpoint to compare with. Default: with --quantize, the same one with its weights as stored. "
    "`none`: only perplexity.",
)
@click.option("--text", "text_file", metavar="FILE", help=f"Text in UTF-8. Default: {HELD_OUT}.")
@click.option(
    "--window",
    type=click.IntRange(2, LONGEST_SEQUENCE),
    default=DEFAULT_WINDOW,
    show_default=True,
    help="Tokens of an independent part.",
)
@click.option("--max_tokens", type=click.IntRange(1), help="Of the text. Default: all.")
@json_option("one object")
def quality(
    ckpt_dir: str | None,
    tokenizer_path: str | None,
    quantize: str | None,
    against: str | None,
    text_file: str | None,
    window: int,
    max_tokens: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure a model's perplexity on a text, and how far its predictions are from those of another.

    The divergence is Kullback and Leibler's, of the predictions from those of the checkpoint to compare with, in nats
    for each token: 0 for equal predictions. Both must cut the text into the same tokens; a checkpoint without a
    tokenizer gets the other's.

    \b
    Examples:
      fastllama quality --quantize int4
      fastllama quality --ckpt_dir Llama-3.2-1B --quantize int8 --text wiki.test.raw
      fastllama quality --ckpt_dir Llama-3.2-1B-int4 --against Llama-3.2-1B --json
    """
    from fastllama.checkpoint import open_checkpoint
    from fastllama.checkpoint.base import dtype_name
    from fastllama.generation import Llama
    from fastllama.quality import measure_quality

    text = _read_text(text_file)
    ours = Side(*checkpoint_and_tokenizer(ckpt_dir, tokenizer_path, quiet=as_json), quantize)
    sides = [ours, *_reference(ours, against)]
    paths = [{"path": side.ckpt_dir, "quantized": list(open_checkpoint(side.ckpt_dir).precisions)} for side in sides]
    windows = _windows(sides, text, window, max_tokens)
    sizes: dict[str, Any] = {"max_seq_len": window, "max_batch_size": 1, "cuda_graphs": False, **options}
    with _errors_name_window():
        llms = [Llama.build(side.ckpt_dir, side.tokenizer_path, quantize=side.quantize, **sizes) for side in sides]
    llm, reference = llms[0], llms[1] if len(llms) > 1 else None
    measured = measure_quality(llm, windows, reference, False if as_json else None)
    described = {
        "text": text_file,
        "window": window,
        **paths[0],
        "dtype": dtype_name(llm.model.dtype),
        "quantize": quantize,
        "against": paths[1] if len(paths) > 1 else None,
        **_without_infinity(asdict(measured)),
    }
    write_stdout(json.dumps(described, allow_nan=False) if as_json else render(described))


def _read_text(path: str | None) -> str:
    if path is None:
        from fastllama.builtin.held_out import held_out_text

        return held_out_text()
    return read_text(path, "--text")


def _reference(ours: Side, against: str | None) -> list[Side]:
    """The model to compare with, if any. Without a tokenizer of its own it has ours."""
    from fastllama.tokenizer_open import open_tokenizer

    if against == "none" or (against is None and ours.quantize is None):
        return []
    if against is None:
        return [ours._replace(quantize=None)]
    try:
        open_tokenizer(against)
    except AssertionError:  # there is none
        return [Side(against, ours.tokenizer_path, None)]
    return [Side(against, against, None)]


def _windows(sides: list[Side], text: str, window: int, max_tokens: int | None) -> list[list[int]]:
    """The windows of the text, the same ones by every side's tokenizer."""
    from fastllama.quality import check_same_windows, windows_of
    from fastllama.tokenizer_open import open_tokenizer

    paths = dict.fromkeys(side.tokenizer_path for side in sides)
    windows, *others = [windows_of(open_tokenizer(path), text, window, max_tokens) for path in paths]
    for other in others:
        check_same_windows(windows, other)
    return windows


@contextlib.contextmanager
def _errors_name_window() -> Iterator[None]:
    """A block whose errors name --window where they would name max_seq_len, which it sets."""
    try:
        yield
    except (AssertionError, ValueError) as error:
        if "max_seq_len" not in str(error):
            raise
        raise click.UsageError(str(error).replace("max_seq_len", "--window")) from error


def _without_infinity(values: dict[str, Any]) -> dict[str, Any]:
    """The values for JSON, which has no infinity: null."""
    return {
        name: _without_infinity(value) if isinstance(value, dict) else None if value == math.inf else value
        for name, value in values.items()
    }


def render(described: dict[str, Any]) -> str:
    """The object of --json as text."""
    perplexity, against = described["perplexity"], described["against"]
    rows = [
        ("weights", described["quantize"] or _stored_text(described, described["dtype"])),
        ("text", described["text"] or HELD_OUT),
        ("tokens", f"{described['n_tokens']:,} in windows of {described['window']}"),
        ("perplexity", _perplexity_text(perplexity)),
    ]
    if against is not None:
        difference = described["difference"]
        path = "the same checkpoint" if against["path"] == described["path"] else against["path"]
        reference = difference["reference_perplexity"]
        is_readable = max(perplexity or math.inf, reference or math.inf) < LONGEST_NUMBER
        change = f" ({perplexity / reference - 1:+.2%})" if is_readable else ""
        divergences = difference["mean_divergence"], difference["large_divergence"]
        rows += [
            ("against", f"{path}, {_stored_text(against, described['dtype'])}"),
            ("of the reference", _perplexity_text(reference) + change),
            ("divergence", "{:.2e} on average, {:.2e} at 99%".format(*divergences)),
            ("same top token", f"{difference['same_top']:.2%}"),
        ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def _stored_text(checkpoint: dict[str, Any], dtype: str) -> str:
    """What the weights are without --quantize."""
    return f"{AS_STORED}: {', '.join(checkpoint['quantized'])}" if checkpoint["quantized"] else dtype


def _perplexity_text(perplexity: float | None) -> str:
    if perplexity is None:
        return "infinite"
    return f"{perplexity:.4f}" if perplexity < LONGEST_NUMBER else f"{perplexity:.2e}"
