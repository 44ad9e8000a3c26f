"""Writes LoRA adapters as PEFT saves them, and merges them in float64, without using code of fastllama.

write_adapter(folder, random_factors(params, ["q_proj"], r=4, seed=0), r=4, lora_alpha=8)
exact = merged(params, weights, [(factors, 2.0)])   # float64, in Meta's names
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.checkpoints import Params, Weights, huggingface_weights

# (A, B) by the module's name in transformers: "model.layers.0.self_attn.q_proj".
Factors = dict[str, tuple[Tensor, Tensor]]

EMBEDDING = "model.embed_tokens"
OUTPUT = "lm_head"
PREFIX = "base_model.model."


def module_shapes(params: Params, weights: Weights) -> dict[str, tuple[int, int]]:
    """(rows, columns) of every matrix, by the module's name."""
    theirs = huggingface_weights(params, weights)
    return {name.removesuffix(".weight"): tuple(w.shape) for name, w in theirs.items() if w.dim() == 2}  # type: ignore[misc]


def random_factors(
    params: Params, weights: Weights, targets: Sequence[str], seed: int, ranks: Mapping[str, int] | int = 4
) -> Factors:
    """Factors for the modules whose names end with one of `targets`. `ranks`: of all, or by target."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for module, (rows, columns) in module_shapes(params, weights).items():
        target = next((target for target in targets if f".{module}".endswith(f".{target}")), None)
        if target is None:
            continue
        rank = ranks if isinstance(ranks, int) else ranks[target]
        into, out = (rows, columns) if module == EMBEDDING else (columns, rows)
        a = torch.randn(rank, into, generator=generator) / 8
        factors[module] = a, torch.randn(out, rank, generator=generator) / 8
    return factors


def factor_tensors(factors: Factors, prefix: str = PREFIX, adapter: str = "") -> dict[str, Tensor]:
    """The tensors as PEFT names them. `adapter`: the adapter's name, which files written by hand may contain."""
    middle = f".{adapter}" if adapter else ""
    tensors = {}
    for module, pair in factors.items():
        for side, factor in zip("AB", pair, strict=True):
            kind, end = ("lora_embedding_", "") if module == EMBEDDING else ("lora_", ".weight")
            tensors[f"{prefix}{module}.{kind}{side}{middle}{end}"] = factor.contiguous()
    return tensors


def write_adapter(folder: Path, tensors: dict[str, Tensor] | Factors, **config: Any) -> Path:
    """Write adapter_model.safetensors and adapter_config.json; a field of `config` given as `...` is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    named: dict[str, Any] = tensors if all(isinstance(t, Tensor) for t in tensors.values()) else {}
    save_file(named or factor_tensors(tensors), folder / "adapter_model.safetensors")  # type: ignore[arg-type]
    fields = {
        "peft_type": "LORA",
        "base_model_name_or_path": "some/base",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": None,
        "lora_dropout": 0.1,
        "bias": "none",
        "task_type": "CAUSAL_LM",
        **config,
    }
    stated = {key: value for key, value in fields.items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(stated))
    return folder


def merged(
    params: Params, weights: Weights, adapters: Sequence[tuple[Factors, Mapping[str, float] | float]]
) -> Weights:
    """W + scale · B·A of all adapters in float64, in Meta's names and row order. Scales: of all modules, or of each."""
    exact = {name: weight.double() for name, weight in huggingface_weights(params, weights).items()}
    for factors, scales in adapters:
        for module, (a, b) in factors.items():
            update = (scales if isinstance(scales, float) else scales[module]) * (b.double() @ a.double())
            exact[f"{module}.weight"] = exact[f"{module}.weight"] + (update.T if module == EMBEDDING else update)
    # The weights' row numbers, in transformers' order, tell where each of its rows is in Meta's.
    numbers = {
        name: torch.arange(len(w), dtype=torch.float64).view(-1, *[1] * (w.dim() - 1)).expand(w.shape)
        for name, w in weights.items()
    }
    order = huggingface_weights(params, numbers)
    result = {}
    for (name, _), theirs in zip(weights.items(), order, strict=True):
        rows = order[theirs].reshape(len(order[theirs]), -1)[:, 0].long()
        result[name] = torch.empty_like(exact[theirs])
        result[name][rows] = exact[theirs]
    return result
