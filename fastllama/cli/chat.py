"""`fastllama chat`: a conversation, at a terminal or through a pipe."""

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import click

from fastllama.cli import standard_streams
from fastllama.cli.conversation import Conversation, Reply, TooLongError
from fastllama.cli.options import ModelOptions, connect_processes, json_option, model_options, sampling_options
from fastllama.cli.parameter_types import Text
from fastllama.cli.speed import print_speed, with_speculation
from fastllama.cli.standard_streams import write_stderr, write_stdout

DEFAULT_MAX_SEQ_LEN = 512
PROMPT = "you> "
COMMANDS = {
    "/reset": "forget the conversation (the system message stays)",
    "/exit": "leave, as Ctrl-D does",
    "/help": "show this",
}
LINE_END = re.compile("\r\n|[\n\v\f\r\x1c\x1d\x1e\x85\u2028\u2029]")  # every line end of str.splitlines


class JsonObject(click.ParamType):
    """An object in JSON."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        try:
            found = json.loads(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(f"{value!r} is not JSON ({error}).", param, ctx)
        if not isinstance(found, dict):
            self.fail(f"{value!r} is not an object in JSON.", param, ctx)
        return found


@click.command()
@model_options(DEFAULT_MAX_SEQ_LEN)
@sampling_options
@click.option("--system", type=Text(), metavar="TEXT", help="System message at the head of the conversation.")
@click.option("--chat_template", metavar="FILE", help="A chat template, its name in the folder, or llama3.")
@click.option("--template_args", type=JsonObject(), default={}, help='Variables of the template: {"date": "1 May"}')
@json_option("one object per reply")
def chat(
    as_json: bool, system: str | None, chat_template: str | None, template_args: dict[str, Any], **options: Any
) -> None:
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
    from fastllama.chat_format import NoFormat

    connect_processes(options["nproc"])
    model = ModelOptions.pop_from(options)
    llm = model.build(1, quiet=as_json, chat_template=chat_template, template_args=template_args)
    if isinstance(llm.formatter, NoFormat):
        raise ValueError(llm.formatter.reason)
    conversation = Conversation(llm, system, **options)
    interactive = standard_streams.stdin_is_terminal()
    n_tokens, seconds = 0, 0.0
    for line in _input_lines(interactive):
        if line.rstrip() in COMMANDS or (interactive and line.startswith("/")):
            if not _run_slash_command(line.rstrip(), conversation):
                break
        elif line.strip():
            start = time.perf_counter()
            n_tokens += _answer(conversation, line, interactive, as_json)
            seconds += time.perf_counter() - start
    if n_tokens and not as_json:
        print_speed(n_tokens, seconds, llm.speculation)


def _input_lines(interactive: bool) -> Iterator[str]:
    """The user's lines, until the input ends or, at a terminal, Ctrl-C."""
    if not interactive:
        yield from standard_streams.stdin_lines()
        return
    while True:
        try:
            yield standard_streams.read_terminal(PROMPT)
        except (EOFError, KeyboardInterrupt):
            write_stdout()
            return


def _run_slash_command(command: str, conversation: Conversation) -> bool:
    """Run a slash command -> whether the chat goes on."""
    if command == "/exit":
        return False
    if command == "/reset":
        conversation.reset()
        write_stderr("(the conversation starts anew)")
    elif command == "/help":
        for name, meaning in COMMANDS.items():
            write_stderr(f"{name:8}{meaning}")
    elif (name := command.split()[0]) in COMMANDS:
        write_stderr(f"{name} must be alone on its line; to send a message that begins with it, put a space first")
    else:
        known = ", ".join(COMMANDS)
        write_stderr(f"unknown command {name}: use {known}; to send a message that begins with /, put a space first")
    return True


def _answer(conversation: Conversation, message: str, interactive: bool, as_json: bool) -> int:
    """Send `message` and print the reply, on a terminal piece by piece -> the reply's number of tokens."""
    live = interactive and not as_json
    try:
        reply = conversation.send(message, show=_print_piece if live else None, interruptible=interactive)
    except Exception as error:
        if as_json:
            write_stdout(json.dumps({"error": standard_streams.one_line(error)}))
        if not isinstance(error, TooLongError):
            raise
        write_stderr(f"{error}")
        return 0
    if reply.n_forgotten:
        write_stderr(f"(the context is full: the oldest {reply.n_forgotten} messages were forgotten)")
    if as_json:
        write_stdout(json.dumps(with_speculation(_reply_object(reply), reply.speculation)))
        return reply.n_tokens
    # Through a pipe, each reply is one line.
    write_stdout("" if live else LINE_END.sub(" ", reply.text))
    if live and reply.speculation is not None:
        write_stderr(f"({reply.speculation})")
    if reply.finish_reason == "length":
        write_stderr("(cut short: --max_gen_len and --max_seq_len set the longest reply)")
    elif reply.finish_reason == "interrupted":
        write_stderr("(stopped)")
    return reply.n_tokens


def _print_piece(text: str) -> None:
    write_stdout(text, nl=False)


def _reply_object(reply: Reply) -> dict[str, Any]:
    return {"role": "assistant", "content": reply.text, "finish_reason": reply.finish_reason, "tokens": reply.n_tokens}
