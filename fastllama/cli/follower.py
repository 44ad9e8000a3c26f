"""One of the processes that `--nproc` starts beside the command: builds the model, and repeats the leader's calls."""

import json
import os
import sys
import threading
from typing import Any

from fastllama.cli.workers import control_group, hear, hear_whether


def main() -> None:
    """Follow until stdin, the leader's pipe, is closed."""
    arguments = json.loads(sys.stdin.readline() or "null")
    if arguments is None:
        return
    # In a thread, because this one may be waiting for a leader that is no more.
    threading.Thread(target=_end_with_the_leader, daemon=True).start()
    follow(arguments)


def follow(arguments: dict[str, Any]) -> None:
    """Build what `arguments`, Llama.build's, describe, then run along."""
    import torch.distributed as dist

    from fastllama.generation import Llama

    try:
        llm = Llama.build(**arguments)
    except Exception:
        if dist.is_initialized():  # the leader has it from the group, and says it
            threading.Event().wait()
        raise
    control = control_group()
    while True:
        call = hear(control)
        stream = llm.stream(*call["arguments"], **call["keywords"])
        try:
            while hear_whether(control):
                if next(stream, None) is None:
                    break
        except ValueError:
            pass  # the leader has the same error, and says it
        stream.close()


def _end_with_the_leader() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
