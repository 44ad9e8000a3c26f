"""`fastllama quality`: perplexity on a text, and the difference that quantisation makes."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastllama.cli.options import (
    checkpoint_and_tokenizer,
    checkpoint_options,
    device_options,
    json_option,
    quantize_option,
    threads_option,
)
from fastllama.cli.standard_streams import write_stdout

if TYPE_CHECKING:
    from fastllama.generation import Llama
    from fastllama.quality import Quality

DEFAULT_WINDOW = 512
HELD_OUT = "60 short stories, which the built-in model has not seen"


@click.command()
@checkpoint_options
@device_options
@quantize_option
@threads_option
@click.option(
    "--against",
    metavar="PATH",
    help="Checkpoint to compare with. Default: with --quantize, the same one unquantised. `none`: only perplexity.",
)
@click.option("--text", "text_file", metavar="FILE", help=f"Text in UTF-8. Default: {HELD_OUT}.")
@click.option(
    "--window", type=click.IntRange(2), default=DEFAULT_WINDOW, show_default=True, help="Tokens of an independent part."
)
@click.option("--max_tokens", type=click.IntRange(2), help="Of the text. Default: all.")
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
    for each token: 0 for equal predictions.

    \b
    Examples:
      fastllama quality --quantize int4
      fastllama quality --ckpt_dir Llama-3.2-1B --quantize int8 --text wiki.test.raw
      fastllama quality --ckpt_dir Llama-3.2-1B-int4 --against Llama-3.2-1B --json
    """
    from fastllama.generation import Llama
    from fastllama.quality import measure_quality, windows_of

    text = _read_text(text_file)
    folder, tokenizer = checkpoint_and_tokenizer(ckpt_dir, tokenizer_path, quiet=as_json)
    sizes: dict[str, Any] = {"max_seq_len": window, "max_batch_size": 1, "cuda_graphs": False, **options}
    llm = Llama.build(folder, tokenizer, quantize=quantize, **sizes)
    reference = _reference(folder, tokenizer, quantize, against, sizes)
    measured = measure_quality(
        llm, windows_of(llm.tokenizer, text, window, max_tokens), reference, False if as_json else None
    )
    if as_json:
        described = {"text": text_file, "window": window, "quantize": quantize, "against": against, **asdict(measured)}
        write_stdout(json.dumps(described))
    else:
        write_stdout(render(measured, text_file or HELD_OUT, window, quantize))


def _read_text(path: str | None) -> str:
    if path is None:
        from fastllama.builtin.held_out import held_out_text

        return held_out_text()
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise click.UsageError(f"--text {path}: cannot be read ({error.strerror or error}).") from error
    except UnicodeDecodeError as error:
        raise click.UsageError(f"--text {path}: expected text in UTF-8 ({error}).") from error


def _reference(
    folder: str, tokenizer: str, quantize: str | None, against: str | None, sizes: dict[str, Any]
) -> "Llama | None":
    """The model to compare with, if any."""
    from fastllama.generation import Llama

    if against == "none" or (against is None and quantize is None):
        return None
    return Llama.build(folder, tokenizer, **sizes) if against is None else Llama.build(against, None, **sizes)


def render(measured: "Quality", text: str, window: int, quantize: str | None) -> str:
    """The result as text."""
    rows = [
        ("text", text),
        ("tokens", f"{measured.n_tokens:,} in windows of {window}"),
        ("perplexity", f"{measured.perplexity:.4f}"),
    ]
    if quantize is not None:
        rows.insert(0, ("quantize", quantize))
    if (difference := measured.difference) is not None:
        change = measured.perplexity / difference.reference_perplexity - 1
        rows += [
            ("of the reference", f"{difference.reference_perplexity:.4f} ({change:+.2%})"),
            ("divergence", f"{difference.mean_divergence:.2e} on average, {difference.large_divergence:.2e} at 99%"),
            ("same top token", f"{difference.same_top:.2%}"),
        ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)
