"""One of the processes beside a leader (`workers.py`): builds the model that it builds, and repeats its calls."""

import os
import sys
import threading
from pkgutil import resolve_name

import torch.distributed as dist

from fastllama.workers import control_group, granted, hear, hear_order


def main() -> None:
    """Follow the leader that started this process, until it ends or closes stdin, its pipe."""
    # In a thread, because this one may be waiting for a leader that is no more.
    threading.Thread(target=_end_with_the_leader, daemon=True).start()
    follow()


def follow() -> None:
    """Run along until the leader dismisses."""
    order = hear_order()
    if order is None:
        return
    try:
        llm = resolve_name(order["build"])(**order["arguments"])
    except Exception:
        if dist.is_initialized():  # the leader has it from the group, and says it
            threading.Event().wait()
        raise
    control = control_group()
    while (call := hear(control)) is not None:
        if "function" in call:
            resolve_name(call["function"])(llm, **call["arguments"])
            continue
        llm.tokenizer.stop_tokens = set(call["stop_tokens"])
        stream = llm.stream(*call["arguments"], **call["keywords"])
        try:
            while count := granted(control):
                if not all(next(stream, None) is not None for _ in range(count)):
                    break
        except ValueError:
            pass  # the leader has the same error, and says it
        stream.close()
    # Not by way of the interpreter's end, which would wait for what the leader keeps of the group.
    os._exit(0)


def _end_with_the_leader() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
