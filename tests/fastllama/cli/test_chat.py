"""`fastllama chat`, through a pipe and at a terminal."""

import json
import os
import pty
import select
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from fastllama import Llama
from fastllama.cli import chat as chat_command
from fastllama.cli.conversation import Conversation, Reply
from tests.support.command_line import CHAT, READ_TIMEOUT_S, ROOT, run


def test_chat_answers_each_line_of_a_pipe_on_one_line(checkpoint: str) -> None:
    llm = Llama.build(checkpoint, checkpoint, 512, 1, device="cpu")
    dialog: list[Any] = [{"role": "system", "content": "be good"}]
    expected = []
    for line in ("hello", "and then?"):
        dialog.append({"role": "user", "content": line})
        answer = llm.chat_completion([dialog], temperature=0, max_gen_len=8)[0]["generation"]
        dialog.append(answer)
        expected.append(" ".join(answer["content"].split("\n")))
    words = ("chat", "--system", "be good", "--ckpt_dir", checkpoint, *CHAT, "--max_seq_len", "512")
    result = run(*words, stdin="hello\n\n  \nand then?\n")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.split("\n")[:-1] == expected


def test_chat_json_is_one_object_per_reply(checkpoint: str) -> None:
    result = run("chat", "--ckpt_dir", checkpoint, *CHAT, "--json", stdin="hello\n" + "x" * 400 + "\nagain")
    first, second, third = (json.loads(line) for line in result.stdout.splitlines())
    assert first["role"] == third["role"] == "assistant" and first["tokens"] == 8
    assert first["finish_reason"] == "length" and isinstance(first["content"], str)
    assert "raise --max_seq_len" in second["error"]
    assert result.exit_code == 0


def test_chat_runs_slash_commands(checkpoint: str) -> None:
    lines = ["hello", "/reset ", "hello", "/help", "/exit\r", "never asked"]
    words = ("chat", "--ckpt_dir", checkpoint, *CHAT, "--max_seq_len", "512")
    remembered = run(*words, stdin="hello\nhello\n").stdout.splitlines()
    assert len(set(remembered)) == 2
    result = run(*words, stdin="\n".join(lines))
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [remembered[0]] * 2
    assert all(name in result.stderr for name in ("/reset", "/exit", "/help"))


@pytest.mark.parametrize("message", ["/etc/hosts", "/exit now", "/RESET", " /exit", "/", "/help!"])
def test_through_a_pipe_any_other_line_with_a_slash_is_a_message(checkpoint: str, message: str) -> None:
    words = ("chat", "--ckpt_dir", checkpoint, *CHAT, "--max_seq_len", "512", "--json")
    result = run(*words, stdin=f"{message}\n/reset\nhello\n")
    assert result.exit_code == 0 and "unknown command" not in result.stderr
    assert [json.loads(line)["role"] for line in result.stdout.splitlines()] == ["assistant"] * 2


def test_chat_goes_on_after_a_message_that_is_too_long(checkpoint: str) -> None:
    fresh = run("chat", "--ckpt_dir", checkpoint, *CHAT, stdin="hello\n")
    result = run("chat", "--ckpt_dir", checkpoint, *CHAT, stdin="x" * 400 + "\nhello\n")
    assert result.exit_code == 0
    assert "context" in result.stderr and "raise --max_seq_len" in result.stderr
    assert result.stdout == fresh.stdout


def test_chat_forgets_the_oldest_messages_with_a_notice(checkpoint: str) -> None:
    result = run("chat", "--ckpt_dir", checkpoint, *CHAT, stdin="hello hello\n" * 5)
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == 5
    assert "the oldest 2 messages were forgotten" in result.stderr


def test_a_reply_through_a_pipe_is_one_line(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = "a\nb\rc\r\nd\x0be\x0cf\x1cg\x1dh\x1ei\x85j\u2028k\u2029l"
    monkeypatch.setattr(Conversation, "send", lambda *arguments, **keywords: Reply(ends, 3, "stop", 0))
    plain = run("chat", "--ckpt_dir", checkpoint, *CHAT, stdin="hello\n").stdout
    assert plain == "a b c d e f g h i j k l\n"
    (line,) = run("chat", "--ckpt_dir", checkpoint, *CHAT, "--json", stdin="hello\n").stdout.splitlines()
    assert json.loads(line)["content"] == ends


def test_chat_json_reports_the_error_that_ends_it(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def send(*arguments: Any, **keywords: Any) -> Reply:
        raise ValueError("the logits are\nnot finite")

    monkeypatch.setattr(Conversation, "send", send)
    result = run("chat", "--ckpt_dir", checkpoint, *CHAT, "--json", stdin="hello\nhello\n")
    assert result.exit_code == 2 and json.loads(result.stdout) == {"error": "the logits are not finite"}
    assert result.stderr == "fastllama: error: the logits are not finite\n"


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_ctrl_d_and_ctrl_c_at_the_prompt_end_the_chat(
    monkeypatch: pytest.MonkeyPatch, end: type[BaseException]
) -> None:
    answers: Iterator[str] = iter(["hello", "again"])

    def type_line(prompt: str) -> str:
        assert prompt == "you> "
        for line in answers:
            return line
        raise end

    monkeypatch.setattr("builtins.input", type_line)
    assert list(chat_command._input_lines(interactive=True)) == ["hello", "again"]


class Terminal:
    """A chat process with its own terminal."""

    def __init__(self, *words: str) -> None:
        self.pid, self.handle = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.execv(sys.executable, [sys.executable, "-m", "fastllama", "chat", *words])

    def read_until(self, text: str) -> str:
        found = ""
        deadline = time.monotonic() + READ_TIMEOUT_S
        while text not in found:
            ready, _, _ = select.select([self.handle], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                pytest.fail(f"no {text!r} in {found!r}")
            found += os.read(self.handle, 4096).decode(errors="replace")
        return found

    def write(self, text: str) -> None:
        os.write(self.handle, text.encode())

    def exit_code(self) -> int:
        try:
            while os.read(self.handle, 4096):
                continue
        except OSError:  # Linux reports the end of a terminal as an error
            pass
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.handle)


@pytest.fixture
def terminal(checkpoint: str) -> Iterator[Terminal]:
    chat = Terminal("--ckpt_dir", checkpoint, *CHAT)
    yield chat
    chat.close()


def test_chat_at_a_terminal_prompts_and_ends_at_ctrl_d(terminal: Terminal) -> None:
    terminal.read_until("you> ")
    terminal.write("hello\n")
    terminal.read_until("you> ")
    terminal.write("/nonsense\n")
    assert "unknown command" in terminal.read_until("you> ")
    terminal.write("/exit now\n")
    assert "/exit must be alone on its line" in terminal.read_until("you> ")
    terminal.write("\x04")
    assert terminal.exit_code() == 0
