"""`python -m docs.refusals`: writes docs/refusals.md, with the messages that the cases of the tests get."""

import re
from collections.abc import Mapping
from pathlib import Path

import click

from fastllama.benchmarks.result_file import write_text
from tests.support.refusals import adapters, chats, configurations, files, gguf_models, quantized, tokenizers
from tests.support.refusals.case import Refusal

PAGE = Path(__file__).resolve().with_suffix(".md")
BEGIN = """# What is refused

Checkpoints, tokenizers, templates and adapters that are whole, and that fastllama does not take, each with its message.
[What loads](checkpoints.md) is another page. Damaged and contradictory files are also refused, and are not listed here.

Every error is a `ValueError`, or an `AssertionError` (marked *) where a folder holds no checkpoint or no tokenizer, or
the tokenizer does not fit the checkpoint, as in Meta's `Llama.build`. It is raised before any memory is allocated for
weights, except under [Chat](#chat) and for the values of scales. In the messages, `model` is the path of the checkpoint
and `adapter` that of the adapter.

`make docs` writes this page: `tests/fastllama/test_refusals.py` makes every case and compares its message.
"""
# (title, what to do that the messages do not say, cases)
SECTIONS = [
    ("Files", "", files.CASES),
    (
        "Models",
        "Run models of other kinds with transformers or llama.cpp.",
        configurations.CASES,
    ),
    (
        "Quantised checkpoints",
        "Download the original weights, and let `quantize=` or `--quantize` round them while they are read.",
        quantized.CASES,
    ),
    ("GGUF", "", gguf_models.CASES),
    ("Adapters", "Where a message says to merge an adapter, do so and load the result alone.", adapters.CASES),
    ("Tokenizers", "", tokenizers.CASES),
    (
        "Chat",
        "The model loads and completes texts; only chatting is refused, or a `chat_template` that was chosen. Give "
        "another template as `chat_template=`.",
        chats.CASES,
    ),
]


def cases() -> dict[str, Refusal]:
    """Every case, by its section and what it is."""
    return {f"{title}: {case.what}": case for title, _, listed in SECTIONS for case in listed}


def page(messages: Mapping[str, str]) -> str:
    """The page with these messages of `cases`."""
    parts = [BEGIN]
    for title, advice, listed in SECTIONS:
        parts += [f"## {title}\n", *([f"{advice}\n"] if advice else []), "| what you have | message |\n|---|---|"]
        for case in listed:
            mark = "" if case.error is ValueError else "\\*"
            parts.append(f"| {case.what}{mark} | {_code(messages[f'{title}: {case.what}'])} |")
        parts.append("")
    return "\n".join(parts)


def read_messages(text: str) -> dict[str, str]:
    """The messages in a page's text."""
    found, title = {}, ""
    for line in text.splitlines():
        title = line.removeprefix("## ") if line.startswith("## ") else title
        if match := re.fullmatch(r"\| (.+?)(?:\\\*)? \| (`+) ?(.*?) ?\2 \|", line):
            found[f"{title}: {match[1]}"] = match[3].replace("\\|", "|")
    return found


def _code(message: str) -> str:
    """A message as Markdown's code in a cell of a table."""
    text = message.replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


@click.command(epilog="Example: python -m docs.refusals --check")
@click.option("--check", is_flag=True, help="Change nothing; fail where docs/refusals.md has other messages.")
def main(check: bool) -> None:
    """Write the messages of all refusals into docs/refusals.md."""
    made = page({name: str(case.refused()) for name, case in cases().items()})
    kept = PAGE.read_text(encoding="utf-8") if PAGE.exists() else None
    if made == kept:
        return
    if check:
        raise click.ClickException(f"{PAGE.name} is not what the code raises: run `make docs`")
    write_text(made, PAGE)
    click.echo(f"wrote {PAGE.name}", err=True)


if __name__ == "__main__":
    main()
