"""Runs `fastllama` for tests, in this process or in a new one."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastllama
from tests.support.timeouts import HANG_SECONDS

if TYPE_CHECKING:
    from click.testing import Result

ROOT = Path(fastllama.__file__).parent.parent
GREEDY = ("--temperature", "0", "--max_gen_len", "6", "--max_seq_len", "64", "--device", "cpu")
READ_TIMEOUT_S = HANG_SECONDS
CHAT = ("--temperature", "0", "--max_gen_len", "8", "--max_seq_len", "128", "--device", "cpu")


def run(*words: str, stdin: str | bytes | None = None, charset: str = "utf-8") -> "Result":
    """The command's result, in this process."""
    from click.testing import CliRunner  # GPU tests import this file on machines without click

    from fastllama.cli import main

    return CliRunner(charset=charset).invoke(main, list(words), input=stdin)


def run_process(
    *words: str, stdin: str = "", launcher: Sequence[str] = (), **options: Any
) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, *launcher, "-m", "fastllama", *words]
    return subprocess.run(
        command, input=stdin, text=True, capture_output=True, cwd=ROOT, timeout=READ_TIMEOUT_S, check=False, **options
    )


def expect_error(result: "Result", *parts: str) -> None:
    """Assert one line on stderr that contains `parts`, nothing on stdout, and exit code 2."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("no --ckpt_dir")]
    assert len(lines) == 1 and lines[0].startswith("fastllama: error: "), result.stderr
    for part in parts:
        assert part in lines[0]
