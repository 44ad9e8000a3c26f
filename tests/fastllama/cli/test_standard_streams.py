"""Undecodable input, encodings that lack characters, and streams that are closed, full or broken."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from fastllama.cli import main, standard_streams
from tests.support.command_line import CHAT, GREEDY, ROOT, run

UNDECODABLE_NOTICE = "the input is not all utf-8: what cannot be read became U+FFFD"
UNENCODABLE_NOTICE = (
    "stdout is {}, which lacks some of the characters: they became escapes (PYTHONIOENCODING=utf-8 shows them)"
)


@pytest.mark.parametrize("as_json", [(), ("--json",)], ids=["plain", "json"])
def test_chat_answers_lines_with_undecodable_bytes(checkpoint: str, as_json: tuple[str, ...]) -> None:
    words = ("chat", "--ckpt_dir", checkpoint, *CHAT, "--max_seq_len", "512", *as_json)
    result = run(*words, stdin=b"hello\ncaf\xe9 \xff\r\n\xed\xb0\x80\0\nla\rst\xe2\x80")
    expected = run(*words, stdin="hello\ncaf\ufffd \ufffd\n\ufffd\ufffd\ufffd\0\nla\rst\ufffd")
    assert result.exit_code == 0 and result.stdout == expected.stdout and len(result.stdout.split("\n")) == 5
    assert result.stderr.splitlines().count(UNDECODABLE_NOTICE) == 1 and UNDECODABLE_NOTICE not in expected.stderr


def test_complete_replaces_undecodable_bytes_of_a_pipe_and_of_arguments(checkpoint: str) -> None:
    words = ("--ckpt_dir", checkpoint, *GREEDY, "--json")
    piped = run("complete", *words, stdin=b"\xff\xc3\xa9\r\nb\xe9\n")
    given = run("complete", "\udcff\udcc3\udca9\nb\udce9", "\ud800", "c", *words)
    assert [one.stderr for one in (piped, given)] == [UNDECODABLE_NOTICE + "\n"] * 2
    (first,) = json.loads(piped.stdout)["completions"]
    assert first["prompt"] == "\ufffdé\nb\ufffd"
    second, third, fourth = json.loads(given.stdout)["completions"]
    assert second == first and (third["prompt"], fourth["prompt"]) == ("\ufffd", "c")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_sets_the_encoding(checkpoint: str, encoding: str) -> None:
    words = ("--ckpt_dir", checkpoint, *GREEDY, "--json")
    (row,) = json.loads(run("complete", *words, stdin="é\r\n\u2028ü\n".encode(encoding)).stdout)["completions"]
    assert row["prompt"] == "é\n\u2028ü"
    chats = [run("chat", *words, stdin=stdin) for stdin in ("é\n\nü\r\n".encode(encoding), "é\nü")]
    assert chats[0].stdout == chats[1].stdout and chats[0].stderr == chats[1].stderr


def test_characters_that_stdout_lacks_become_escapes(checkpoint: str) -> None:
    words = ("--ckpt_dir", checkpoint, *GREEDY, "--echo")
    for prompts in (["é\u2014"], ["é\u2014", "ü"]):
        result = run("complete", *prompts, *words, charset="ascii")
        assert result.exit_code == 0 and result.stdout_bytes.isascii() and "\\xe9\\u2014" in result.stdout
        assert result.stderr.splitlines().count(UNENCODABLE_NOTICE.format("ascii")) == 1
    shown = run("complete", "é", *words, charset="latin-1")
    assert b"\xe9" in shown.stdout_bytes
    assert run("complete", "é\u2014", *words, "--json", charset="ascii").stderr == ""


def test_a_system_message_may_have_undecodable_bytes(checkpoint: str) -> None:
    words = ("chat", "--ckpt_dir", checkpoint, *CHAT)
    found, expected = (run(*words, "--system", text, stdin="hello") for text in ("b\udcff", "b\ufffd"))
    assert found.stdout == expected.stdout and found.stderr.startswith(UNDECODABLE_NOTICE + "\n")


@pytest.mark.parametrize("command", ["complete", "chat"])
def test_a_missing_stdin_is_empty(checkpoint: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SystemExit) as end:
        main([command, "--ckpt_dir", checkpoint, *GREEDY])
    out, err = capsys.readouterr()
    assert sys.stdin is None and out == ""
    if command == "chat":
        assert (end.value.code, err) == (0, "")
    else:
        assert (end.value.code, err) == (2, "fastllama: error: no PROMPT, and nothing came from stdin.\n")


def test_a_stdin_that_cannot_be_read_is_named(checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb", closefd=False) as out, open(os.devnull) as null:
        os.dup2(out.fileno(), null.fileno())
        monkeypatch.setattr(sys, "stdin", null)
        with pytest.raises(SystemExit) as end:
            main(["complete", "--ckpt_dir", checkpoint, *GREEDY])
    os.close(writer)
    assert end.value.code == 2
    assert capsys.readouterr().err == "fastllama: error: stdin cannot be read: Bad file descriptor\n"


def in_shell(command: str, unbuffered: str = "") -> "subprocess.CompletedProcess[str]":
    """Run `command` in a shell, for its redirections; an empty PYTHONUNBUFFERED is Python's default."""
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONUNBUFFERED": unbuffered}
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_help_works_with_a_closed_stream(closed: str) -> None:
    done = in_shell(f"$PYTHON -m fastllama --help {closed}")
    assert (done.returncode, done.stderr) == (0, "")
    assert ("complete" in done.stdout) is (closed != ">&-")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_full_stdout_is_a_one_line_error() -> None:
    for unbuffered, reason in (("", "stdout cannot be written: No"), ("1", "[Errno 28] No")):
        done = in_shell("$PYTHON -m fastllama chat --help >/dev/full", unbuffered)
        assert (done.returncode, done.stderr) == (2, f"fastllama: error: {reason} space left on device\n")
    done = in_shell("$PYTHON -m fastllama --version 2>/dev/full")
    assert done.returncode == 0 and done.stdout.startswith("fastllama ")


def test_a_command_without_any_stream_runs(checkpoint: str) -> None:
    """Files that it opens do not get the descriptors of the closed streams."""
    done = in_shell(f"$PYTHON -m fastllama complete hello --ckpt_dir {checkpoint} {' '.join(GREEDY)} <&- >&- 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_message_that_stderr_cannot_take_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as broken:
        monkeypatch.setattr(sys, "stderr", broken)
        standard_streams.write_stderr("something")
        assert isinstance(standard_streams.flush_or_discard(broken), BrokenPipeError)
