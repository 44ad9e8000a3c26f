"""`fastllama complete`: continues prompts."""

import json
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from fastllama.cli import standard_streams
from fastllama.cli.options import ModelOptions, connect_processes, json_option, model_options, sampling_options
from fastllama.cli.parameter_types import Text
from fastllama.cli.speed import print_speed, with_speculation
from fastllama.cli.standard_streams import write_stdout

if TYPE_CHECKING:
    from fastllama.generation import Llama

DEFAULT_MAX_SEQ_LEN = 512
MAX_QUOTED_CHARACTERS = 40  # of a prompt in an error
INTERRUPTED = "interrupted"


@dataclass
class Completion:
    """One prompt and its continuation so far. `finish_reason` is None until it is finished."""

    prompt: str
    prompt_tokens: list[int]
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # empty without --logprobs
    finish_reason: str | None = None
    n_echoed: int = 0  # how many of the first `tokens` repeat the prompt

    @property
    def n_generated(self) -> int:
        return len(self.tokens) - self.n_echoed


class Printer:
    """Prints completions as text: one as it grows, or several in order, each under a header when it is finished."""

    def __init__(self, completions: Sequence[Completion]) -> None:
        self._completions = completions
        self._printed: set[int] = set()
        self._within_line = False

    def add(self, completion: Completion, text: str) -> None:
        """Print new text of a completion, or the completions that are finished."""
        if len(self._completions) == 1:
            write_stdout(text, nl=False)
            self._within_line |= bool(text)
        elif completion.finish_reason is not None:
            self._print_finished(in_order=True)

    def finish(self, complete: bool) -> None:
        """Print what is left. After an error (`complete` is false), completions that are not finished are skipped."""
        if len(self._completions) > 1:
            self._print_finished(in_order=False)
        elif complete or self._within_line:
            write_stdout()

    def _print_finished(self, in_order: bool) -> None:
        for number, completion in enumerate(self._completions, 1):
            if completion.finish_reason is None and in_order:
                return
            if completion.finish_reason is not None and number not in self._printed:
                write_stdout(f"== {number}: {completion.prompt}\n{completion.text}\n")
                self._printed.add(number)


@click.command()
@click.argument("prompts", nargs=-1, type=Text(), metavar="[PROMPT]...")
@model_options(DEFAULT_MAX_SEQ_LEN)
@click.option("--max_batch_size", type=click.IntRange(min=1), help="Prompts at a time. Default: all.")
@sampling_options
@click.option("--echo", is_flag=True, help="Repeat the prompt before its continuation.")
@click.option("--logprobs", is_flag=True, help="With --json: each token's log-probability.")
@json_option("one object with all completions")
def complete(prompts: tuple[str, ...], as_json: bool, max_batch_size: int | None, **options: Any) -> None:
    """Continue each PROMPT.

    One prompt is printed as its tokens come; several under a header each. Without a PROMPT it is read from stdin. An
    error or Ctrl-C keeps the completions that are done; the object of --json then has an "error" beside them.

    \b
    Examples:
      fastllama complete "Once upon a time"
      echo "The sky is" | fastllama complete --temperature 0 --max_gen_len 16
    """
    if options["logprobs"] and not as_json:
        raise click.UsageError("--logprobs needs --json.")
    connect_processes(options["nproc"])
    model = ModelOptions.pop_from(options)
    texts = list(prompts) or [_read_prompt()]
    batch = max_batch_size or len(texts)
    llm = model.build(batch, quiet=as_json)
    completions = _encode_prompts(llm, texts)
    printer = None if as_json else Printer(completions)
    start = time.perf_counter()
    failure: BaseException | None = None
    try:
        with closing(_generate(llm, completions, batch, **options)) as new_texts:
            for completion, text in new_texts:
                if printer is not None:
                    printer.add(completion, text)
    except BaseException as error:
        failure = error
        raise
    finally:
        seconds = time.perf_counter() - start
        if printer is not None:
            printer.finish(complete=failure is None)
        elif not isinstance(failure, BrokenPipeError):
            report = _report(completions, seconds, options["logprobs"], failure)
            write_stdout(json.dumps(with_speculation(report, llm.speculation)))
    if not as_json:
        print_speed(sum(completion.n_generated for completion in completions), seconds, llm.speculation)


def _read_prompt() -> str:
    if standard_streams.stdin_is_terminal():
        raise click.UsageError('no PROMPT: write one, as in fastllama complete "Once upon a time", or pipe one in.')
    text = standard_streams.read_stdin().removesuffix("\n")
    if not text:
        raise click.UsageError("no PROMPT, and nothing came from stdin.")
    return text


def _encode_prompts(llm: "Llama", prompts: Sequence[str]) -> list[Completion]:
    """An empty completion for each prompt. ValueError, with its number from 1, for one longer than max_seq_len."""
    completions = []
    max_seq_len = llm.model.params.max_seq_len
    for number, prompt in enumerate(prompts, 1):
        tokens = llm.tokenizer.encode(prompt, bos=True, eos=False)
        if len(tokens) > max_seq_len:
            label = f"prompt {number} of {len(prompts)}, " if len(prompts) > 1 else "the prompt "
            quoted = repr(prompt[:MAX_QUOTED_CHARACTERS]) + ("..." if len(prompt) > MAX_QUOTED_CHARACTERS else "")
            raise ValueError(
                f"{label}{quoted}, has {len(tokens)} tokens, more than the max_seq_len of {max_seq_len}: shorten it, "
                "or raise --max_seq_len"
            )
        completions.append(Completion(prompt, tokens))
    return completions


def _generate(
    llm: "Llama",
    completions: Sequence[Completion],
    batch: int,
    *,
    temperature: float,
    top_p: float,
    max_gen_len: int | None,
    echo: bool,
    logprobs: bool,
) -> Generator[tuple[Completion, str]]:
    """Generate the completions, `batch` at a time -> a completion and its new text, for each increment."""
    length = llm.model.params.max_seq_len - 1 if max_gen_len is None else max_gen_len
    begin = llm.tokenizer.encode("", bos=True, eos=False)
    space = " " if begin and llm.tokenizer.strips_space else ""
    for first in range(0, len(completions), batch):
        group = completions[first : first + batch]
        prompts = [completion.prompt_tokens for completion in group]
        with closing(llm.stream(prompts, length, temperature, top_p, logprobs, echo)) as stream:
            for increment in stream:
                completion, text = group[increment.row], increment.text
                if echo and not completion.tokens:
                    # The echoed prompt begins with tokens that the user did not write, such as BOS.
                    text = text.removeprefix(llm.tokenizer.decode(begin)).removeprefix(space)
                    completion.n_echoed = len(increment.tokens)
                completion.text += text
                completion.tokens += increment.tokens
                completion.logprobs += increment.logprobs or []
                completion.finish_reason = increment.finish_reason or completion.finish_reason
                yield completion, text


def _report(
    completions: Sequence[Completion], seconds: float, logprobs: bool, error: BaseException | None
) -> dict[str, Any]:
    """The object of --json: the finished completions, and the error that ended the run, if any."""
    finished = [completion for completion in completions if completion.finish_reason is not None]
    rows: list[dict[str, Any]] = []
    for completion in finished:
        row: dict[str, Any] = {
            "prompt": completion.prompt,
            "text": completion.text,
            "tokens": completion.n_generated,
            "finish_reason": completion.finish_reason,
        }
        if logprobs:
            row |= {"token_ids": completion.tokens, "logprobs": completion.logprobs}
        rows.append(row)
    n_tokens = sum(completion.n_generated for completion in finished)
    report = {"completions": rows, "tokens": n_tokens, "seconds": seconds, "tokens_per_second": n_tokens / seconds}
    if error is not None:
        is_interrupt = isinstance(error, KeyboardInterrupt)
        report["error"] = INTERRUPTED if is_interrupt else standard_streams.one_line(error)
    return report
