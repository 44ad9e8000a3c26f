"""Runs a function in several processes, with the environment variables that torchrun sets.

    results = run_processes(4, tmp_path, "tests.support.parallel_cases:on_gpus", {"folder": "..."})

The result is what `on_gpus(arguments)` returned in each process, by rank. An error in a process fails the test.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch

from tests.support.timeouts import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[2]


def run_processes(
    size: int, folder: Path, function: str, arguments: dict[str, Any], **environment: str
) -> list[dict[str, Any]]:
    """Run the function "module:name" in `size` processes -> its results by rank."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    # This process serves the store. Port 0 takes a free port.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torchrun = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    torchrun |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(size):
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), **torchrun, **environment}
        strict = () if torch.cuda.is_available() else ("-W", "error")  # NCCL has warnings of its own
        command = [sys.executable, *strict, "-m", "tests.support.processes", function, json.dumps(arguments)]
        with (folder / f"out.{rank}").open("w") as out, (folder / f"err.{rank}").open("w") as err:
            env = {**os.environ, **variables}
            processes.append(subprocess.Popen(command, stdout=out, stderr=err, env=env, cwd=ROOT))
    try:
        codes = [process.wait(HANG_SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    errors = [(folder / f"err.{rank}").read_text() for rank in range(size)]
    assert not any(codes), "\n".join(error for code, error in zip(codes, errors, strict=True) if code)
    return [json.loads((folder / f"out.{rank}").read_text().splitlines()[-1]) for rank in range(size)]


if __name__ == "__main__":
    print(json.dumps(resolve_name(sys.argv[1])(json.loads(sys.argv[2]))))
