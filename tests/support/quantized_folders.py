"""Writes quantised Hugging Face folders: through the package compressed-tensors, and as GPTQ's and AWQ's programs do.

parts, expected = gptq_parts(weight, group_size=32, seed=0)
write_folder(folder, {"quant_method": "gptq", ...}, {module: parts})
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.checkpoints import (
    Params,
    huggingface_weights,
    random_weights,
    tiny_params,
    write_huggingface,
    write_tokenizer,
)

# Columns of whole groups of 128 in one and two processes, and rows of the output that 8 processes cut within a word.
PARAMS: Params = tiny_params(dim=256, hidden_dim=512, n_kv_heads=4, vocab_size=584)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Parts = dict[str, Tensor]


def write_folder(
    folder: Path, quantization: dict[str, Any], parts: dict[str, Parts], params: Params = PARAMS, **config: Any
) -> Path:
    """Random weights in bfloat16, with the modules in `parts` replaced by these tensors, by transformers' names."""
    write_huggingface(folder, params, random_weights(params, seed=5), dtype=torch.bfloat16)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for module, named in parts.items():
        del tensors[f"{module}.weight"]
        tensors |= {f"{module}.{name}": tensor.contiguous() for name, tensor in named.items()}
    save_file(tensors, path)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"quantization_config": quantization} | config))
    return folder


def write_int4(folder: Path) -> Path:
    """A model of which one matrix has int4 in groups of 64, as GPTQ's programs store it, with its tokenizer."""
    name = "model.layers.0.mlp.down_proj"
    rows, columns = linear_weights()[name].shape
    quantization = {"quant_method": "gptq", "bits": 4, "desc_act": False, "sym": False, "group_size": 64}
    write_folder(folder, quantization, {name: gptq_parts((rows, columns), 64, seed=0)[0]})
    write_tokenizer(folder, n_ranks=PARAMS["vocab_size"] - 256)
    return folder


def linear_weights(params: Params = PARAMS) -> dict[str, Tensor]:
    """The matrices but for the embedding, by transformers' names of the modules, in float32."""
    weights = huggingface_weights(params, random_weights(params, seed=5))
    return {
        name.removesuffix(".weight"): weight
        for name, weight in weights.items()
        if weight.ndim == 2 and "embed" not in name
    }


def packed(q: Tensor, axis: int, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Numbers from 0 to 15 in 32-bit words along an axis: bits 4n to 4n + 3 of a word have its number order[n]."""
    words = q.to(torch.int64).unflatten(axis, (-1, 8)).movedim(axis + 1, -1)
    shifted = sum(words[..., number] << 4 * place for place, number in enumerate(order))
    assert isinstance(shifted, Tensor)
    return torch.where(shifted >= 2**31, shifted - 2**32, shifted).to(torch.int32)


def random_int4(shape: tuple[int, int], group_size: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, zeros, scales, the weight): numbers (OUT, IN), zeros and scales (OUT, G)."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    q = torch.randint(0, 16, shape, generator=generator)
    zeros = torch.randint(0, 16, (rows, columns // group_size), generator=generator)
    scales = (torch.rand(zeros.shape, generator=generator) * 0.02 + 0.001).half()
    wide = [one.repeat_interleave(group_size, 1) for one in (zeros, scales)]
    return q, zeros, scales, (q - wide[0]).float() * wide[1].float()


def gptq_parts(shape: tuple[int, int], group_size: int, seed: int, version: int = 1) -> tuple[Parts, Tensor]:
    """A module as GPTQ's programs store it, and its weight."""
    q, zeros, scales, weight = random_int4(shape, group_size, seed)
    stored = (zeros - 1) % 16 if version == 1 else zeros
    parts = {
        "qweight": packed(q.T, 0),
        "qzeros": packed(stored.T, 1),
        "scales": scales.T,
        "g_idx": (torch.arange(shape[1]) // group_size).to(torch.int32),
    }
    return parts, weight


def awq_parts(shape: tuple[int, int], group_size: int, seed: int) -> tuple[Parts, Tensor]:
    """A module as AWQ's programs store it, and its weight."""
    q, zeros, scales, weight = random_int4(shape, group_size, seed)
    parts = {"qweight": packed(q.T, 1, AWQ_ORDER), "qzeros": packed(zeros.T, 1, AWQ_ORDER), "scales": scales.T}
    return parts, weight
