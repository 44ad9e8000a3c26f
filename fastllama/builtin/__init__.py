"""The built-in model: a very small Llama 3 that comes with the package, so everything runs without a download.

It is an ordinary checkpoint in Meta's layout (`checkpoint/`), loaded like any other. It tells short stories, knows a
few hundred facts, chats in the Llama 3 format and stops by itself. It shows that everything works; its answers are
simple. `python -m fastllama.builtin.train` trains it from nothing, on text from `data/` and the other modules of this
package. Using the model imports none of these modules.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"


def builtin_checkpoint() -> tuple[str, str]:
    """(checkpoint folder, tokenizer file) of the built-in model, as `Llama.build` takes them."""
    return str(CHECKPOINT), str(CHECKPOINT / "tokenizer.model")
