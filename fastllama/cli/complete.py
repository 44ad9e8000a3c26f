"""`fastllama complete`: prompts in, continuations out."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from fastllama.cli.options import ModelOptions, json_option, model_options, sampling_options
from fastllama.cli.speed import print_speed

if TYPE_CHECKING:
    from fastllama.generation import Llama

DEFAULT_MAX_SEQ_LEN = 512


@dataclass
class Completion:
    """One prompt's continuation as it grows. `logprobs` fills only where they were asked for; `echoed` tokens are the
    prompt's own, at the head of the others."""

    prompt: str
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    echoed: int = 0

    @property
    def n_generated(self) -> int:
        return len(self.tokens) - self.echoed


@click.command()
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@model_options(DEFAULT_MAX_SEQ_LEN)
@click.option("--max_batch_size", type=click.IntRange(min=1), help="Prompts at a time. Default: all.")
@sampling_options
@click.option("--echo", is_flag=True, help="Repeat the prompt before its continuation.")
@click.option("--logprobs", is_flag=True, help="With --json: each token's log-probability.")
@json_option("one object with all completions")
def complete(prompts: tuple[str, ...], as_json: bool, max_batch_size: int | None, **options: Any) -> None:
    """Continue each PROMPT.

    One prompt is printed as its tokens come; several under a header each. Without a PROMPT it is read from stdin.

    \b
    Examples:
      fastllama complete "Once upon a time"
      echo "The sky is" | fastllama complete --temperature 0 --max_gen_len 16
    """
    if options["logprobs"] and not as_json:
        raise click.UsageError("--logprobs needs --json.")
    model = ModelOptions.take(options)
    texts = list(prompts) or [_read_prompt()]
    llm = model.build(max_batch_size or len(texts), quiet=as_json)
    start = time.perf_counter()
    completions = _generate(llm, texts, max_batch_size or len(texts), live=len(texts) == 1 and not as_json, **options)
    seconds = time.perf_counter() - start
    n_tokens = sum(completion.n_generated for completion in completions)
    if as_json:
        click.echo(json.dumps(_report(completions, n_tokens, seconds, options["logprobs"])))
        return
    if len(completions) > 1:
        for number, completion in enumerate(completions, 1):
            click.echo(f"== {number}: {completion.prompt}\n{completion.text}\n")
    print_speed(n_tokens, seconds)


def _read_prompt() -> str:
    if sys.stdin.isatty():
        raise click.UsageError('no PROMPT: write one, as in fastllama complete "Once upon a time", or pipe one in.')
    text = sys.stdin.read().removesuffix("\n")
    if not text:
        raise click.UsageError("no PROMPT, and nothing came from stdin.")
    return text


def _generate(
    llm: "Llama",
    prompts: Sequence[str],
    batch: int,
    *,
    live: bool,
    temperature: float,
    top_p: float,
    max_gen_len: int | None,
    echo: bool,
    logprobs: bool,
) -> list[Completion]:
    """Complete `prompts`, `batch` at a time; `live` prints text as it comes."""
    length = llm.model.params.max_seq_len - 1 if max_gen_len is None else max_gen_len
    completions = [Completion(prompt) for prompt in prompts]
    for first in range(0, len(prompts), batch):
        group = completions[first : first + batch]
        tokens = [llm.tokenizer.encode(completion.prompt, bos=True, eos=False) for completion in group]
        for increment in llm.stream(tokens, length, temperature, top_p, logprobs, echo):
            completion, text = group[increment.row], increment.text
            if echo and not completion.tokens:
                # The stream repeats the prompt first, as the model saw it; people did not write what begins every text.
                text = text.removeprefix(llm.tokenizer.decode([llm.tokenizer.bos_id]))
                completion.echoed = len(increment.tokens)
            completion.text += text
            completion.tokens += increment.tokens
            completion.logprobs += increment.logprobs or []
            completion.finish_reason = increment.finish_reason or completion.finish_reason
            if live:
                click.echo(text, nl=False)
    if live:
        click.echo()
    return completions


def _report(completions: Sequence[Completion], n_tokens: int, seconds: float, logprobs: bool) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for completion in completions:
        row: dict[str, Any] = {
            "prompt": completion.prompt,
            "text": completion.text,
            "tokens": completion.n_generated,
            "finish_reason": completion.finish_reason,
        }
        if logprobs:
            row |= {"token_ids": completion.tokens, "logprobs": completion.logprobs}
        rows.append(row)
    return {"completions": rows, "tokens": n_tokens, "seconds": seconds, "tokens_per_second": n_tokens / seconds}
