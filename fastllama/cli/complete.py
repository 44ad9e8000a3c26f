"""`fastllama complete`: prompts in, continuations out."""

import json
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from fastllama.cli import standard_streams
from fastllama.cli.options import ModelOptions, Text, json_option, model_options, sampling_options, take_part
from fastllama.cli.speed import print_speed
from fastllama.cli.standard_streams import say

if TYPE_CHECKING:
    from fastllama.generation import Llama

DEFAULT_MAX_SEQ_LEN = 512
QUOTED = 40  # characters of a prompt in an error
INTERRUPTED = "interrupted"


@dataclass
class Completion:
    """One prompt's continuation as it grows. `logprobs` fills only where they were asked for; `echoed` tokens are the
    prompt's own, at the head of the others. `finish_reason` is None until it is done."""

    prompt: str
    prompt_tokens: list[int]
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    echoed: int = 0

    @property
    def n_generated(self) -> int:
        return len(self.tokens) - self.echoed


class Printer:
    """Prints completions for people: one as its pieces come; several in order, once done, under a header each."""

    def __init__(self, completions: Sequence[Completion]) -> None:
        self._completions = completions
        self._printed: set[int] = set()
        self._within_line = False

    def piece(self, completion: Completion, text: str) -> None:
        """What a completion has gained."""
        if len(self._completions) == 1:
            say(text, nl=False)
            self._within_line |= bool(text)
        elif completion.finish_reason is not None:
            self._several(in_order=True)

    def end(self, whole: bool) -> None:
        """Nothing more will come. Unless it is the `whole`, what is done and has waited for others is printed."""
        if len(self._completions) > 1:
            self._several(in_order=False)
        elif whole or self._within_line:
            say()

    def _several(self, in_order: bool) -> None:
        for number, completion in enumerate(self._completions, 1):
            if completion.finish_reason is None and in_order:
                return
            if completion.finish_reason is not None and number not in self._printed:
                say(f"== {number}: {completion.prompt}\n{completion.text}\n")
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
    take_part(options["nproc"])
    model = ModelOptions.take(options)
    texts = list(prompts) or [_read_prompt()]
    batch = max_batch_size or len(texts)
    llm = model.build(batch, quiet=as_json)
    completions = _encoded(llm, texts)
    printer = None if as_json else Printer(completions)
    start = time.perf_counter()
    problem: BaseException | None = None
    try:
        with closing(_generate(llm, completions, batch, **options)) as pieces:
            for completion, text in pieces:
                if printer is not None:
                    printer.piece(completion, text)
    except BaseException as error:
        problem = error
        raise
    finally:
        seconds = time.perf_counter() - start
        if printer is not None:
            printer.end(whole=problem is None)
        elif not isinstance(problem, BrokenPipeError):
            say(json.dumps(_report(completions, seconds, options["logprobs"], problem)))
    if not as_json:
        print_speed(sum(completion.n_generated for completion in completions), seconds)


def _read_prompt() -> str:
    if standard_streams.at_terminal():
        raise click.UsageError('no PROMPT: write one, as in fastllama complete "Once upon a time", or pipe one in.')
    text = standard_streams.read_all().removesuffix("\n")
    if not text:
        raise click.UsageError("no PROMPT, and nothing came from stdin.")
    return text


def _encoded(llm: "Llama", prompts: Sequence[str]) -> list[Completion]:
    """Completions to come. ValueError, which counts from 1, for a prompt that has no room."""
    completions = []
    room = llm.model.params.max_seq_len
    for number, prompt in enumerate(prompts, 1):
        tokens = llm.tokenizer.encode(prompt, bos=True, eos=False)
        if len(tokens) > room:
            which = f"prompt {number} of {len(prompts)}, " if len(prompts) > 1 else "the prompt "
            quoted = repr(prompt[:QUOTED]) + ("..." if len(prompt) > QUOTED else "")
            raise ValueError(
                f"{which}{quoted}, has {len(tokens)} tokens, more than the max_seq_len of {room}: shorten it, or raise "
                "--max_seq_len"
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
    """Fill the completions, `batch` at a time -> one and the text that it has gained, as it does."""
    length = llm.model.params.max_seq_len - 1 if max_gen_len is None else max_gen_len
    for first in range(0, len(completions), batch):
        group = completions[first : first + batch]
        prompts = [completion.prompt_tokens for completion in group]
        with closing(llm.stream(prompts, length, temperature, top_p, logprobs, echo)) as stream:
            for increment in stream:
                completion, text = group[increment.row], increment.text
                if echo and not completion.tokens:
                    # The stream repeats the prompt first, as the model saw it; people did not write what begins it.
                    text = text.removeprefix(llm.tokenizer.decode([llm.tokenizer.bos_id]))
                    completion.echoed = len(increment.tokens)
                completion.text += text
                completion.tokens += increment.tokens
                completion.logprobs += increment.logprobs or []
                completion.finish_reason = increment.finish_reason or completion.finish_reason
                yield completion, text


def _report(
    completions: Sequence[Completion], seconds: float, logprobs: bool, problem: BaseException | None
) -> dict[str, Any]:
    """What is done, and the problem that kept the others from it."""
    done = [completion for completion in completions if completion.finish_reason is not None]
    rows: list[dict[str, Any]] = []
    for completion in done:
        row: dict[str, Any] = {
            "prompt": completion.prompt,
            "text": completion.text,
            "tokens": completion.n_generated,
            "finish_reason": completion.finish_reason,
        }
        if logprobs:
            row |= {"token_ids": completion.tokens, "logprobs": completion.logprobs}
        rows.append(row)
    n_tokens = sum(completion.n_generated for completion in done)
    report = {"completions": rows, "tokens": n_tokens, "seconds": seconds, "tokens_per_second": n_tokens / seconds}
    if problem is not None:
        said = INTERRUPTED if isinstance(problem, KeyboardInterrupt) else standard_streams.one_line(problem)
        report["error"] = said
    return report
