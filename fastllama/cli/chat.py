"""`fastllama chat`: a conversation, on a terminal or through a pipe."""

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import click

from fastllama.cli import standard_streams
from fastllama.cli.chat_loop import Conversation, Reply, TooLongError
from fastllama.cli.options import ModelOptions, Text, json_option, model_options, sampling_options, take_part
from fastllama.cli.speed import print_speed
from fastllama.cli.standard_streams import note, say

DEFAULT_MAX_SEQ_LEN = 512
PROMPT = "you> "
COMMANDS = {
    "/reset": "forget the conversation (the system message stays)",
    "/exit": "leave, as Ctrl-D does",
    "/help": "show this",
}
LINE_END = re.compile("\r\n|[\n\v\f\r\x1c\x1d\x1e\x85\u2028\u2029]")  # wherever str.splitlines cuts


@click.command()
@model_options(DEFAULT_MAX_SEQ_LEN)
@sampling_options
@click.option("--system", type=Text(), metavar="TEXT", help="System message at the head of the conversation.")
@json_option("one object per reply")
def chat(as_json: bool, system: str | None, **options: Any) -> None:
    """Talk with the model.

    On a terminal, replies are printed as their tokens come; Ctrl-C stops a reply, and at the prompt it leaves. From a
    pipe, each input line that is not blank is a message, and gets its reply on one line. The lines /reset, /exit and
    /help are commands, which are not answered; any other line of a pipe that begins with a slash is a message. When the
    conversation outgrows --max_seq_len, its oldest turns are forgotten.

    \b
    Examples:
      fastllama chat --system "Answer briefly."
      echo "What is the capital of France?" | fastllama chat --temperature 0
    """
    take_part(options["nproc"])
    model = ModelOptions.take(options)
    llm = model.build(1, quiet=as_json)
    conversation = Conversation(llm, system, **options)
    interactive = standard_streams.at_terminal()
    n_tokens, seconds = 0, 0.0
    for line in _lines(interactive):
        if line.rstrip() in COMMANDS or (interactive and line.startswith("/")):
            if not _obey(line.rstrip(), conversation):
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
        yield from standard_streams.lines()
        return
    while True:
        try:
            yield standard_streams.read_terminal(PROMPT)
        except (EOFError, KeyboardInterrupt):
            say()
            return


def _obey(command: str, conversation: Conversation) -> bool:
    """Carry out a slash command; False when it is the one that leaves."""
    if command == "/exit":
        return False
    if command == "/reset":
        conversation.reset()
        note("(the conversation starts anew)")
    elif command == "/help":
        for name, meaning in COMMANDS.items():
            note(f"{name:8}{meaning}")
    elif (name := command.split()[0]) in COMMANDS:
        note(f"{name} stands alone on its line; a message that begins with it needs a space before it")
    else:
        there_are = f"there are {', '.join(COMMANDS)}"
        note(f"unknown command {name}: {there_are}; a message that begins with a slash needs a space before it")
    return True


def _answer(conversation: Conversation, message: str, interactive: bool, as_json: bool) -> int:
    """Say `message` and print the reply, on a terminal as it comes -> the reply's number of tokens."""
    live = interactive and not as_json
    try:
        reply = conversation.say(message, show=_show if live else None, interruptible=interactive)
    except Exception as error:
        if as_json:
            say(json.dumps({"error": standard_streams.one_line(error)}))
        if not isinstance(error, TooLongError):
            raise
        note(f"{error}")
        return 0
    if reply.turns_forgotten:
        note(f"(out of room: the oldest {reply.turns_forgotten} messages were forgotten)")
    if as_json:
        say(json.dumps(_report(reply)))
        return reply.n_tokens
    # A reader of a pipe tells replies apart by their lines, so a reply keeps to one.
    say("" if live else LINE_END.sub(" ", reply.text))
    if reply.finish_reason == "length":
        note("(cut short: no room for more; --max_gen_len and --max_seq_len set how much)")
    elif reply.finish_reason == "interrupted":
        note("(stopped)")
    return reply.n_tokens


def _show(text: str) -> None:
    say(text, nl=False)


def _report(reply: Reply) -> dict[str, Any]:
    return {"role": "assistant", "content": reply.text, "finish_reason": reply.finish_reason, "tokens": reply.n_tokens}
