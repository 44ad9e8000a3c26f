"""`fastllama bench`: how fast, against what the machine allows and against other implementations."""

import json
from typing import TYPE_CHECKING, Any

import click

from fastllama.cli.options import Integers, Names, checkpoint_options, device_options, json_option

if TYPE_CHECKING:
    from fastllama.benchmarks.models import ModelSource
    from fastllama.benchmarks.suite import Plan

# Told here as well as in benchmarks/, which imports torch; a test holds the two together.
SUITES = ("decode", "prefill", "generate", "load", "memory")
MODELS = ("builtin", "random-176m", "llama3-8b", "llama3-70b", "llama3.1-8b", "llama3.2-1b", "llama3.2-3b")
PEERS = ("reference", "transformers", "transformers-compiled", "none")
EXIT_INTERRUPTED = 130


@click.command()
@click.option("--suite", "suites", type=Names(*SUITES), default="decode", show_default=True, help="What to measure.")
@click.option(
    "--model", type=click.Choice(MODELS), metavar="NAME", help=f"One of {', '.join(MODELS)}. Default: builtin."
)
@checkpoint_options
@click.option("--batch", "batches", type=Integers(), default="1,4", show_default=True, help="Rows decoded together.")
@click.option(
    "--context",
    "contexts",
    type=Integers(),
    default="32,512",
    show_default=True,
    help="Tokens in each prompt; in generate, in the longest.",
)
@click.option("--steps", type=click.IntRange(min=2), default=32, show_default=True, help="Tokens decoded per row.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Repetitions of each case.")
@click.option("--peers", type=Names(*PEERS), default="reference", show_default=True, help="Whom to compare with.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: torch's.")
@device_options
@click.option("--output", type=click.Path(dir_okay=False), help="Result file (JSON), written after every case.")
@json_option("the result file's object as the last line")
def bench(as_json: bool, output: str | None, threads: int | None, **options: Any) -> int:
    """Measure speed and memory.

    Outputs are compared with the peers' first; where they disagree, a peer's time is not taken. Ctrl-C keeps what was
    measured. docs/benchmarking.md tells how to read it.

    \b
    Examples:
      fastllama bench --suite decode,prefill,generate --peers reference,transformers
      fastllama bench --model random-176m --batch 1,4 --output result.json --json
    """
    import torch

    from fastllama.benchmarks import suite

    if threads is not None:
        torch.set_num_threads(threads)
    result = suite.run(_plan(**options), lambda text: click.echo(text, err=True), output)
    click.echo(json.dumps(result.to_json(), allow_nan=False) if as_json else suite.report(result))
    return EXIT_INTERRUPTED if result.interrupted else 0


def _plan(
    *,
    model: str | None,
    ckpt_dir: str | None,
    tokenizer_path: str | None,
    device: str | None,
    dtype: str | None,
    peers: tuple[str, ...],
    **sizes: Any,
) -> "Plan":
    from fastllama.benchmarks.suite import Plan
    from fastllama.loading import choose_device, choose_dtype

    chosen = choose_device(device)
    return Plan(
        source=_source(model, ckpt_dir, tokenizer_path),
        device=chosen,
        dtype=choose_dtype(dtype, chosen),
        peers=[name for name in peers if name != "none"],
        **sizes,
    )


def _source(model: str | None, ckpt_dir: str | None, tokenizer_path: str | None) -> "ModelSource":
    from fastllama.benchmarks.models import ModelSource

    if ckpt_dir is not None:
        if model is not None:
            raise click.UsageError("--model and --ckpt_dir exclude each other.")
        return ModelSource.folder(ckpt_dir, tokenizer_path)
    if tokenizer_path is not None:
        raise click.UsageError("--tokenizer_path needs --ckpt_dir.")
    return ModelSource.named(model or "builtin")
