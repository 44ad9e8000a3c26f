"""One of the processes beside a leader (`leader.py`): builds the model that it builds, and repeats its calls."""

import os
import sys
import threading
import time
from pkgutil import resolve_name

import torch.distributed as dist

from fastllama.distributed.driver import allowed_increments, control_group, receive_build_command, receive_command
from fastllama.stream import NotFiniteError

DRIVER_REPORTS_SECONDS = 2


def main() -> None:
    """Follow the leader that started this process, until it ends or closes stdin, its pipe."""
    # In a thread, because this one may be waiting for a leader that is no more.
    threading.Thread(target=_exit_with_the_driver, daemon=True).start()
    run_worker()


def run_worker() -> None:
    """Run along until the leader dismisses."""
    order = receive_build_command()
    if order is None:
        return
    try:
        llm = resolve_name(order["build"])(**order["arguments"])
    except Exception:
        if dist.is_initialized():  # the leader may have it from the group, and says it then
            time.sleep(DRIVER_REPORTS_SECONDS)
        raise
    control = control_group()
    while (call := receive_command(control)) is not None:
        if "function" in call:
            resolve_name(call["function"])(llm, **call["arguments"])
            continue
        llm.tokenizer.stop_tokens = set(call["stop_tokens"])
        stream = llm.stream(*call["arguments"], **call["keywords"])
        try:
            while count := allowed_increments(control):
                if not all(next(stream, None) is not None for _ in range(count)):
                    break
        except NotFiniteError:
            pass  # the leader has the same logits and the same error, and says it
        stream.close()
    # Not by way of the interpreter's end, which would wait for what the leader keeps of the group.
    os._exit(0)


def _exit_with_the_driver() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
