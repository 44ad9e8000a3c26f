"""A fast implementation of Meta's Llama 3 interface, from build and generate to an engine of requests.

Public names are imported at first use, so that `fastllama --help` does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastllama.args import ModelArgs
    from fastllama.builtin import builtin_checkpoint
    from fastllama.engine import Engine, Grammar, Result, SamplingParams
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
    "Engine",
    "Grammar",
    "Increment",
    "Llama",
    "Message",
    "ModelArgs",
    "Result",
    "SamplingParams",
    "Tokenizer",
    "Transformer",
    "builtin_checkpoint",
]

_PUBLIC_NAMES = {
    "args": ("ModelArgs",),
    "builtin": ("builtin_checkpoint",),
    "engine": ("Engine", "Grammar", "Result", "SamplingParams"),
    "generation": ("ChatPrediction", "CompletionPrediction", "Llama"),
    "model": ("Transformer",),
    "stream": ("Increment",),
    "tokenizer": ("ChatFormat", "Dialog", "Message", "Tokenizer"),
}


def __getattr__(name: str) -> object:
    for module, names in _PUBLIC_NAMES.items():
        if name in names:
            return getattr(importlib.import_module(f"fastllama.{module}"), name)
    # As in Meta's package, `import fastllama` alone makes fastllama.generation and its other modules available.
    if name in _PUBLIC_NAMES:
        return importlib.import_module(f"fastllama.{name}")
    raise AttributeError(f"module 'fastllama' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_PUBLIC_NAMES, "__version__"])
