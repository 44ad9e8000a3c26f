"""For tests of contradictory checkpoints: writes given tensors and fields, and generates with both libraries."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastllama import Llama
from fastllama.checkpoint import open_checkpoint
from tests.support.bad_checkpoints import CONFIG, PARAMS, WEIGHTS
from tests.support.checkpoints import huggingface_weights, write_tokenizer

PROMPTS = [[5, 250, 17, 300, 41], [9], [101, 3, 77, 512]]
MAX_GEN_LEN = 24
HF_WEIGHTS = huggingface_weights(PARAMS, WEIGHTS)
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LENGTH = {"original_max_position_embeddings": 16}


def answers(folder: Path) -> list[list[int]]:
    """Greedy tokens for PROMPTS, with no stop tokens."""
    tokenizer = folder if (folder / "tokenizer.model").exists() else write_tokenizer(folder)
    llm = Llama.build(str(folder), str(tokenizer), 64, len(PROMPTS), device="cpu")
    llm.tokenizer.stop_tokens = set()
    return llm.generate(PROMPTS, MAX_GEN_LEN, temperature=0)[0]


def transformers_answers(folder: Path) -> list[list[int]]:
    """Greedy tokens of transformers for PROMPTS, from the same folder."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    outputs = []
    with torch.inference_mode():
        for prompt in PROMPTS:
            tokens = model.generate(torch.tensor([prompt]), max_new_tokens=MAX_GEN_LEN, do_sample=False)
            outputs.append(tokens[0, len(prompt) :].tolist())
    return outputs


def stored(folder: Path, tensors: dict[str, Tensor], **fields: Any) -> Path:
    """Write only these tensors, and CONFIG changed by `fields`; a field given as `...` is left out."""
    config = {key: value for key, value in {**CONFIG, **fields}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    copies = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(copies, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def refused(folder: Path, message: str) -> None:
    """Assert that opening raises ValueError with exactly this message, in which {} stands for the folder."""
    with pytest.raises(ValueError, match=f"^{re.escape(message.format(folder))}$"):
        open_checkpoint(folder)


def without(*names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in HF_WEIGHTS.items() if name not in names}
