"""Meta's Llama 3 interface, fast: build, generate, stream, complete, chat.

The names load when they are first used, so that what needs no model (`fastllama --help`) does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastllama.args import ModelArgs
    from fastllama.builtin import builtin_checkpoint
    from fastllama.generation import ChatPrediction, CompletionPrediction, Llama
    from fastllama.model import Transformer
    from fastllama.stream import Increment
    from fastllama.tokenizer import ChatFormat, Dialog, Message, Tokenizer

__version__ = "0.1.0"

__all__ = [
    "ChatFormat",
    "ChatPrediction",
    "CompletionPrediction",
    "Dialog",
    "Increment",
    "Llama",
    "Message",
    "ModelArgs",
    "Tokenizer",
    "Transformer",
    "builtin_checkpoint",
]

_HOMES = {
    "args": ("ModelArgs",),
    "builtin": ("builtin_checkpoint",),
    "generation": ("ChatPrediction", "CompletionPrediction", "Llama"),
    "model": ("Transformer",),
    "stream": ("Increment",),
    "tokenizer": ("ChatFormat", "Dialog", "Message", "Tokenizer"),
}


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"fastllama.{module}"), name)
    if (
        name in _HOMES
    ):  # `import fastllama` alone makes fastllama.generation and its like reachable, as Meta's package does
        return importlib.import_module(f"fastllama.{name}")
    raise AttributeError(f"module 'fastllama' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_HOMES, "__version__"])
