"""One of the processes beside a leader (`leader.py`): builds the model that it builds, and repeats its calls."""

import os
import sys
import threading
import time
from pkgutil import resolve_name

import torch.distributed as dist

from fastllama.leader import control_group, granted, hear, hear_order
from fastllama.stream import NotFiniteError

LEADER_SAYS_SECONDS = 2


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
        if dist.is_initialized():  # the leader may have it from the group, and says it then
            time.sleep(LEADER_SAYS_SECONDS)
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
        except NotFiniteError:
            pass  # the leader has the same logits and the same error, and says it
        stream.close()
    # Not by way of the interpreter's end, which would wait for what the leader keeps of the group.
    os._exit(0)


def _end_with_the_leader() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
