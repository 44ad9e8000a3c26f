"""`fastllama chat`: a conversation, on a terminal or through a pipe."""

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import click

from fastllama.cli.chat_loop import Conversation, Reply, TooLongError
from fastllama.cli.options import ModelOptions, json_option, model_options, sampling_options
from fastllama.cli.speed import print_speed

DEFAULT_MAX_SEQ_LEN = 512
PROMPT = "you> "
COMMANDS = {
    "/reset": "forget the conversation (the system message stays)",
    "/exit": "leave, as Ctrl-D does",
    "/help": "show this",
}


@click.command()
@model_options(DEFAULT_MAX_SEQ_LEN)
@sampling_options
@click.option("--system", metavar="TEXT", help="System message at the head of the conversation.")
@json_option("one object per reply")
def chat(as_json: bool, system: str | None, **options: Any) -> None:
    """Talk with the model.

    On a terminal, replies are printed as their tokens come; Ctrl-C stops a reply, and at the prompt it leaves. From a
    pipe, each input line that is not blank is a message, and gets its reply on one line. Lines that begin with a slash
    are commands: /reset, /exit, /help. When the conversation outgrows --max_seq_len, its oldest turns are forgotten.

    \b
    Examples:
      fastllama chat --system "Answer briefly."
      echo "What is the capital of France?" | fastllama chat --temperature 0
    """
    model = ModelOptions.take(options)
    llm = model.build(1, quiet=as_json)
    conversation = Conversation(llm, system, **options)
    interactive = sys.stdin.isatty()
    n_tokens, seconds = 0, 0.0
    for line in _lines(interactive):
        if line.startswith("/"):
            if not _obey(line.strip(), conversation):
                break
        elif line.strip():
            start = time.perf_counter()
            n_tokens += _answer(conversation, line, interactive, as_json)
            seconds += time.perf_counter() - start
    if n_tokens and not as_json:
        print_speed(n_tokens, seconds)


def _lines(interactive: bool) -> Iterator[str]:
    """What the user says, line by line, until they have no more to say."""
    if not interactive:
        for line in sys.stdin:
            yield line.removesuffix("\n")
        return
    _enable_line_editing()
    while True:
        try:
            yield input(PROMPT)
        except (EOFError, KeyboardInterrupt):
            click.echo()
            return


def _enable_line_editing() -> None:
    # Importing it is what gives input() a history and cursor keys; not every Python has it.
    try:
        import readline  # noqa: F401
    except ImportError:
        return


def _obey(command: str, conversation: Conversation) -> bool:
    """Carry out a slash command; False when it is the one that leaves."""
    if command == "/exit":
        return False
    if command == "/reset":
        conversation.reset()
        click.echo("(the conversation starts anew)", err=True)
    elif command == "/help":
        for name, meaning in COMMANDS.items():
            click.echo(f"{name:8}{meaning}", err=True)
    else:
        click.echo(f"unknown command {command.split()[0]}: there are {', '.join(COMMANDS)}", err=True)
    return True


def _answer(conversation: Conversation, message: str, interactive: bool, as_json: bool) -> int:
    """Say `message` and print the reply, on a terminal as it comes -> the reply's number of tokens."""
    live = interactive and not as_json
    try:
        reply = conversation.say(message, show=_show if live else None, interruptible=interactive)
    except TooLongError as error:
        click.echo(f"{error}", err=True)
        if as_json:
            click.echo(json.dumps({"error": str(error)}))
        return 0
    if reply.turns_forgotten:
        click.echo(f"(out of room: the oldest {reply.turns_forgotten} messages were forgotten)", err=True)
    if as_json:
        click.echo(json.dumps(_report(reply)))
        return reply.n_tokens
    # A reader of a pipe tells replies apart by their lines, so a reply keeps to one.
    click.echo("" if live else " ".join(reply.text.split("\n")))
    if reply.finish_reason == "length":
        click.echo("(cut short: no room for more; --max_gen_len and --max_seq_len set how much)", err=True)
    elif reply.finish_reason == "interrupted":
        click.echo("(stopped)", err=True)
    return reply.n_tokens


def _show(text: str) -> None:
    click.echo(text, nl=False)


def _report(reply: Reply) -> dict[str, Any]:
    return {"role": "assistant", "content": reply.text, "finish_reason": reply.finish_reason, "tokens": reply.n_tokens}
