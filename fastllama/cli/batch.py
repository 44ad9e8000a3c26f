"""`fastllama batch`: answers a file of requests."""

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastllama.cli import standard_streams
from fastllama.cli.options import ModelOptions, cache_tokens_option, connect_processes, json_option, model_options
from fastllama.cli.speed import with_speculation
from fastllama.cli.standard_streams import write_stderr, write_stdout
from fastllama.distributed import environment

if TYPE_CHECKING:
    from fastllama.cli.batch_output import Answered

DEFAULT_MAX_SEQ_LEN = 2048
DEFAULT_ROWS = {"cpu": 16, "cuda": 64}
BUILTIN_NAME = "builtin"  # of the model in the package, in answers
INTERRUPTED = "interrupted"


@click.command()
@click.argument("in_file", metavar="IN.jsonl")
@click.argument("out_file", metavar="OUT.jsonl")
@model_options(DEFAULT_MAX_SEQ_LEN)
@click.option("--max_batch_size", type=click.IntRange(min=1), help="Answers at a time. Default: 16, 64 on a GPU.")
@cache_tokens_option
@click.option(
    "--model_parallel_size",
    type=click.IntRange(min=1),
    help="Processes that share a model. Fewer than there are make several groups, which share the lines. Default: all.",
)
@json_option("one object that sums up the run")
def batch(
    in_file: str,
    out_file: str,
    max_batch_size: int | None,
    cache_tokens: int | None,
    model_parallel_size: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer the requests in IN.jsonl, and append the answers to OUT.jsonl.

    Both have the fields of OpenAI's batch files: a line has a custom_id, the url /v1/completions or
    /v1/chat/completions, and a body. So temperature and top_p are 1, and the max_tokens of a completion 16, where a
    body has none. A request without a seed gets one from --seed and its custom_id. A line that cannot be answered gets
    a line with an error. IN.jsonl may be -, for stdin.

    The answers are in the order in which they end. Lines whose answers are in OUT.jsonl are not run again: after an
    interruption of any kind, the same command goes on.

    \b
    Examples:
      fastllama batch questions.jsonl answers.jsonl
      torchrun --nproc_per_node 8 -m fastllama batch questions.jsonl answers.jsonl --model_parallel_size 2
    """
    connect_processes(options["nproc"])
    seed: int = options["seed"]
    model = ModelOptions.pop_from(options)
    _check_input(in_file, is_shared=model.nproc > 1 or environment.is_distributed())
    from fastllama.cli.batch_output import OutputFile, check_is_file
    from fastllama.loading import choose_device

    check_is_file(out_file)
    try:
        out = OutputFile(out_file)
    except OSError as error:
        raise click.UsageError(f"{out_file} cannot be written ({error.strerror or error}).") from error
    with out:
        _check_differs(in_file, out_file)
        answered = out.begin()
        rows = max_batch_size or DEFAULT_ROWS[choose_device(model.device).type]
        sizes = {"cache_tokens": cache_tokens, "model_parallel_size": model_parallel_size}
        llm = model.build(rows, quiet=as_json, **sizes)
        name = BUILTIN_NAME if model.ckpt_dir is None else Path(model.ckpt_dir).resolve().name
        _run(llm, in_file, out_file, answered, seed, name, as_json)


def _run(llm: Any, in_file: str, out_file: str, answered: "Answered", seed: int, model: str, as_json: bool) -> None:
    from fastllama.cli.batch_run import answer_lines
    from fastllama.distributed import driver

    start = time.perf_counter()
    arguments: dict[str, Any] = {"in_file": in_file, "out_file": out_file, "answered": answered, "seed": seed}
    counts = driver.run_on_all(llm, answer_lines, **arguments, model=model, progress=not as_json)
    seconds = time.perf_counter() - start
    was_interrupted = counts.pop("interrupted")
    report = {**counts, "seconds": seconds, "tokens_per_second": counts["tokens"] / seconds}
    if as_json:
        report = with_speculation(report, llm.speculation)
        write_stdout(json.dumps(report | ({"error": INTERRUPTED} if was_interrupted else {})))
    else:
        write_stderr(_text(report) + (f"; {llm.speculation}" if llm.speculation is not None else ""))
    if was_interrupted:
        write_stderr(f"interrupted: the answers so far are in {out_file}; the same command goes on from there")
        raise KeyboardInterrupt


def _text(report: dict[str, Any]) -> str:
    """The object of --json as a line."""
    parts = [
        f"{_counted(report['requests'], 'request')} in {report['seconds']:.1f} s",
        f"{report['tokens']:,} tokens",
        f"{report['tokens_per_second']:,.1f} tokens/s",
        f"{report['cached_tokens']:,} of {report['prompt_tokens']:,} prompt tokens from the cache",
    ]
    if report["errors"]:
        parts.insert(1, _counted(report["errors"], "error"))
    if report["answered_before"]:
        parts.append(f"{report['answered_before']:,} answered before")
    return ", ".join(parts)


def _counted(count: int, name: str) -> str:
    return f"{count:,} {name}" + "s" * (count != 1)


def _check_input(path: str, is_shared: bool) -> None:
    """Raise UsageError for an IN.jsonl that cannot be read."""
    from fastllama.cli.batch_input import STDIN

    if path == STDIN:
        if is_shared:
            raise click.UsageError("several processes cannot share stdin: write the requests to a file.")
        if standard_streams.stdin_is_terminal():
            raise click.UsageError("IN.jsonl is -, and nothing is piped in.")
        return
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise click.UsageError(f"{path} cannot be read ({error.strerror or error}).") from error


def _check_differs(in_file: str, out_file: str) -> None:
    if os.path.exists(in_file) and os.path.samefile(in_file, out_file):
        raise click.UsageError("IN.jsonl and OUT.jsonl are the same file.")
