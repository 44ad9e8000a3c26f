"""The program: help, one-line errors and exit codes."""

import json
import os
import subprocess
import sys

import click
import pytest
import torch

import fastllama
from fastllama import Llama
from fastllama.cli import main, program
from tests.support.command_line import GREEDY, ROOT, expect_error, run, run_process


@pytest.mark.parametrize("command", ["complete", "chat", "inspect", "quantize", "quality", "bench"])
def test_every_commands_help_has_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"fastllama {command}" in result.stdout and "Example" in result.stdout and "--json" in result.stdout


def test_help_and_version_import_no_torch() -> None:
    code = (
        "import sys\nfrom fastllama.cli import main\n"
        "for words in (['--help'], ['complete', '--help'], ['bench', '--help'], ['--version']):\n"
        "    try:\n        main(words)\n    except SystemExit as end:\n        assert end.code == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"fastllama {fastllama.__version__}" in done.stdout


def test_usage_errors_are_one_line() -> None:
    expect_error(run("frobnicate"), "No such command 'frobnicate'")
    expect_error(run("complete", "--no_such_option"), "--no_such_option")
    assert run().exit_code == 2


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("--temperature", "-1"), "--temperature"),
        (("--temperature", "nan"), "--temperature"),
        (("--temperature", "warm"), "--temperature"),
        (("--top_p", "inf"), "--top_p"),
        (("--top-p", "-0.5"), "--top_p"),
        (("--max_gen_len", "-1"), "--max_gen_len"),
        (("--max_seq_len", "0"), "--max_seq_len"),
        (("--max_seq_len", "131073"), "--max_seq_len"),
        (("--max_batch_size", "0"), "--max_batch_size"),
        (("--seed", "-1"), "--seed"),
        (("--dtype", "int8"), "--dtype"),
        (("--backend", "metal"), "--backend"),
    ],
)
def test_errors_of_invalid_values_name_the_option(words: tuple[str, ...], name: str) -> None:
    expect_error(run("complete", "x", *words), name)


def test_choices_are_shown_as_they_are_written() -> None:
    for command in (main, *main.commands.values()):
        context = click.Context(command, info_name="x", **main.context_settings)
        for one in command.params:
            if isinstance(one.type, click.Choice):
                assert one.type.get_metavar(one, context) == f"[{'|'.join(one.type.choices)}]"
    expect_error(run("bench", "--model", "x"), "'random-176m'")


@pytest.mark.parametrize("typed", ["int4-g64", "int4_g64"])
def test_choices_are_typed_with_hyphens_or_underscores(typed: str) -> None:
    found = json.loads(run("inspect", "--quantize", typed, "--json").stdout)
    assert found["memory"]["quantize"] == "int4-g64"


@pytest.mark.parametrize(
    "error",
    [
        ValueError("two\nlines"),
        AssertionError("two\nlines"),
        FileNotFoundError(2, "two\nlines", "f"),
        MemoryError("two\nlines"),
        torch.OutOfMemoryError("two\nlines"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: two\nlines"),
    ],
)
def test_expected_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(Llama, "build", fail)
    expect_error(run("complete", "x", "--json"), "two")


def test_an_error_without_a_message_shows_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Llama, "build", fail)
    expect_error(run("complete", "x", "--ckpt_dir", "x"), "MemoryError")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(Llama, "build", fail)
    result = run("complete", "x", "--ckpt_dir", "x")
    assert isinstance(result.exception, KeyError)


def test_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Llama, "build", interrupt)
    assert run("complete", "x", "--ckpt_dir", "x").exit_code == program.EXIT_INTERRUPTED


def test_main_raises_without_standalone_mode(checkpoint: str) -> None:
    with pytest.raises(click.UsageError):
        main(["complete", "--nope"], standalone_mode=False)


def test_process_errors_without_a_traceback() -> None:
    done = run_process("complete", "x", "--ckpt_dir", "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fastllama: error: ") and done.stderr.count("\n") == 1


def test_process_is_quiet_after_a_broken_pipe(checkpoint: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "fastllama", "complete", "hello", "--ckpt_dir", checkpoint, *GREEDY]
    with open(writer, "wb") as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, cwd=ROOT, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
