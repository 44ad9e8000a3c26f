"""Runs a function in several processes that gloo connects, as torchrun would start them, for tests of parallelism.

    results = run_processes(4, tmp_path, "tests.support.parallel_cases:generations", {"folders": [...]})

gives what `generations(arguments)` returned in each process, by rank. One that raises fails the test with its error.
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
    """What the function, "module:name", returned in each of `size` processes."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    # The store is this process's, on a port of its own choosing, so that none is taken twice.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torchrun = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    torchrun |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(size):
        mine = {"RANK": str(rank), "LOCAL_RANK": str(rank), **torchrun, **environment}
        strict = () if torch.cuda.is_available() else ("-W", "error")  # what NCCL and its kin warn of is theirs
        command = [sys.executable, *strict, "-m", "tests.support.processes", function, json.dumps(arguments)]
        with (folder / f"out.{rank}").open("w") as out, (folder / f"err.{rank}").open("w") as err:
            env = {**os.environ, **mine}
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
