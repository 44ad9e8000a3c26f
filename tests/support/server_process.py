"""Runs `fastllama serve` in a process of its own, on a free port.

with serving("--max_seq_len", "1024", FASTLLAMA_API_KEY="key") as (server, process):
    httpx.get(f"{server['url']}/health")
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from tests.support.command_line import ROOT

OPTIONS = ("--json", "--port", "0", "--device", "cpu")


@contextlib.contextmanager
def serving(*words: str, **environment: str) -> Iterator[tuple[dict[str, Any], "subprocess.Popen[str]"]]:
    """A server in a process: what it prints first, and the process, which is killed at the end if it still runs.

    words: more options. environment: more variables.
    """
    command = [sys.executable, "-W", "error", "-m", "fastllama", "serve", *OPTIONS, *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env=env) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            line = process.stdout.readline()
            assert line, process.stderr.read()
            yield json.loads(line), process
        finally:
            process.kill()
