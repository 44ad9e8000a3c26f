"""The model in the box: a very small Llama 3 that comes with the package, so that all runs without a download.

It is an ordinary checkpoint in Meta's layout (`checkpoint/`), loaded like any other. It tells short stories, knows a
few hundred facts, chats in the Llama 3 format and stops by itself; it is there to show that everything works, not to
be wise. `python -m fastllama.builtin.train` makes it again from nothing. What it was taught is in `data/` and in the
modules here, none of which is imported by using it.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"


def builtin_checkpoint() -> tuple[str, str]:
    """Where the built-in model is: (checkpoint folder, tokenizer file), as `Llama.build` takes them."""
    return str(CHECKPOINT), str(CHECKPOINT / "tokenizer.model")
