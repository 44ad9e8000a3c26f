"""A worker: a process that builds the driver's model (`driver.py`) and repeats the driver's calls."""

import os
import sys
import threading
import time
from pkgutil import resolve_name

import torch.distributed as dist

from fastllama.distributed.driver import (
    control_group,
    receive_build_command,
    receive_command,
    receive_increment_count,
)
from fastllama.stream import NotFiniteError

DRIVER_REPORT_SECONDS = 2


def main() -> None:
    """Run a worker that the driver started. It also exits when the driver ends, which closes its stdin pipe."""
    # In a thread, because the main thread may be blocked in a collective with a driver that has crashed.
    threading.Thread(target=_exit_with_driver, daemon=True).start()
    run_worker()


def run_worker() -> None:
    """Build the driver's model and run its commands until the shutdown command."""
    build_command = receive_build_command()
    if build_command is None:
        return
    try:
        llm = resolve_name(build_command["build"])(**build_command["arguments"])
    except Exception:
        if dist.is_initialized():  # the driver may get this error through the group, and then reports it
            time.sleep(DRIVER_REPORT_SECONDS)
        raise
    control = control_group()
    while (command := receive_command(control)) is not None:
        if "function" in command:
            resolve_name(command["function"])(llm, **command["arguments"])
            continue
        llm.tokenizer.stop_tokens = set(command["stop_tokens"])
        stream = llm.stream(*command["arguments"], **command["keywords"])
        try:
            while count := receive_increment_count(control):
                if not all(next(stream, None) is not None for _ in range(count)):
                    break
        except NotFiniteError:
            pass  # the driver has the same logits, and so raises the same error
        stream.close()
    # A normal exit would wait for the driver to release the group.
    os._exit(0)


def _exit_with_driver() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
