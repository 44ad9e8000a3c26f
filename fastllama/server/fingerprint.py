"""The `system_fingerprint` of answers: a name for what decides about the answers to a request with a seed."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict

import torch
from torch import Tensor

import fastllama
from fastllama.engine.facts import Model
from fastllama.kernels.quantized import QuantizedWeight, Weight

FINGERPRINT_BYTES = 5
SAMPLED_ELEMENTS = 64  # of each tensor: fine-tuning changes nearly all elements, and reading all takes long
LIMITS = ("max_batch_size", "max_seq_len")  # of the cache: they decide about no answer


def fingerprint(llm: Model) -> str:
    """The name of this version, the model's shape and weights, their precision, the backend and the kind of device.

    In several processes the weights are those of this one's part.
    """
    model = llm.model
    shape = {name: value for name, value in asdict(model.params).items() if name not in LIMITS}
    facts = [fastllama.__version__, shape, model.ops.__name__, model.device.type]
    digest = hashlib.blake2b(json.dumps(facts, default=str).encode(), digest_size=FINGERPRINT_BYTES)
    for packed in model.packed_weights():
        weight = getattr(packed.owner, packed.attribute)
        digest.update(f"{packed.names} {getattr(weight, 'format', '')}".encode())
        for tensor in _tensors(weight):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + _sample(tensor))
    return f"fp_{digest.hexdigest()}"


def _tensors(weight: Weight) -> Iterator[Tensor]:
    parts = (weight.values, weight.scales, weight.offsets) if isinstance(weight, QuantizedWeight) else (weight,)
    return (part.detach() for part in parts if part is not None)


def _sample(tensor: Tensor) -> bytes:
    """Elements at the same distance from each other, as they are in memory."""
    n_elements = tensor.numel()
    positions = torch.arange(min(SAMPLED_ELEMENTS, n_elements), device=tensor.device)
    # Reading by coordinates copies no more than these elements, however the tensor lies in memory.
    found = tensor[torch.unravel_index(positions * n_elements // max(1, len(positions)), tensor.shape)]
    return bytes(found.contiguous().view(torch.uint8).cpu().numpy())
