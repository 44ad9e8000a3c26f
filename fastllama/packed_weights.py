"""Packed weights: which of Meta's weights share one tensor, and how they are loaded and read back.

Weights that multiply the same input (wq, wk and wv; w1 and w3) are packed into one tensor, so that one call applies
them all. Each backend packs in its own layout.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastllama.args import EMBEDDING_NAME, IGNORED_NAMES, OUTPUT_NAME, ModelArgs
from fastllama.kernels.quantized import QuantizedWeight, Weight
from fastllama.quantization import (
    GATE_UP_NAMES,
    QKV_NAMES,
    Scheme,
    check_device,
    packed_scheme,
    scheme_of,
    scheme_of_weight,
    with_scheme,
)
from fastllama.validate import first_names

logger = logging.getLogger(__name__)

INIT_STD = 0.02
NO_WEIGHTS = "the model has no weights yet: load_state_dict or load_tensors first"

# A layer's packed weights in the order of a forward pass, and Meta's names of the weights in each.
LAYER_WEIGHTS = {
    "attention_norm": ("attention_norm.weight",),
    "wqkv": QKV_NAMES,
    "bqkv": ("attention.wq.bias", "attention.wk.bias", "attention.wv.bias"),
    "wo": ("attention.wo.weight",),
    "bo": ("attention.wo.bias",),
    "ffn_norm": ("ffn_norm.weight",),
    "w13": GATE_UP_NAMES,
    "b13": ("feed_forward.w1.bias", "feed_forward.w3.bias"),
    "w2": ("feed_forward.w2.weight",),
    "b2": ("feed_forward.w2.bias",),
}
NEVER_PACKED = {"tok_embeddings", "attention_norm", "ffn_norm", "norm"}


class PackedWeight(NamedTuple):
    """One attribute of the model or of a layer, and Meta's names of the weights packed into it."""

    owner: nn.Module
    attribute: str
    names: tuple[str, ...]

    @property
    def is_never_packed(self) -> bool:
        """Whether ops read this weight in Meta's own layout."""
        return self.attribute in NEVER_PACKED


class PackedModule(nn.Module):
    """The base class of a model with packed weights. The model sets `params` to `layers` before it calls a method."""

    params: ModelArgs  # of the complete model
    share: ModelArgs  # of this process's part
    ops: ModuleType  # the backend
    device: torch.device
    dtype: torch.dtype
    quantize: str | None  # how weights are quantised when they are loaded: a name of quantization.CHOICES
    layers: nn.ModuleList
    tok_embeddings: Tensor
    norm: Tensor
    output: Weight

    def packed_weights(self) -> Iterator[PackedWeight]:
        """Every packed weight of this model, in the order of a forward pass."""
        shapes = self.share.shapes
        return (weight for weight in self._possible_weights() if weight.names[0] in shapes)

    @property
    def schemes(self) -> dict[str, Scheme]:
        """How the weights of this process are quantised, by name."""
        found: dict[str, Scheme] = {}
        for weight in self.packed_weights():
            value = getattr(weight.owner, weight.attribute)
            if isinstance(value, QuantizedWeight):
                found |= dict.fromkeys(weight.names, scheme_of_weight(value))
        return found

    def _possible_weights(self) -> Iterator[PackedWeight]:
        """The packed weights of a model with all biases."""
        yield PackedWeight(self, "tok_embeddings", (EMBEDDING_NAME,))
        for index, layer in enumerate(self.layers):
            for attribute, names in LAYER_WEIGHTS.items():
                yield PackedWeight(layer, attribute, tuple(f"layers.{index}.{name}" for name in names))
        yield PackedWeight(self, "norm", ("norm.weight",))
        yield PackedWeight(self, "output", (OUTPUT_NAME,))

    def _register_weights(self) -> None:
        """Register every packed weight as a parameter without a value. A bias that the model lacks stays None."""
        for weight in self._possible_weights():
            weight.owner.register_parameter(weight.attribute, None)

    def _load(self, tensors: Iterable[tuple[str, Weight]]) -> None:
        """Pack and set all weights, given by Meta's names in any order. See `Transformer.load_tensors`."""
        ignored = IGNORED_NAMES | ({OUTPUT_NAME} if self.params.tied_output else set())
        expected = {name: shape for name, shape in self.share.shapes.items() if name not in ignored}
        packed_by_name = {name: weight for weight in self.packed_weights() for name in weight.names}
        waiting: dict[str, Weight] = {}  # until all parts of a packed weight have arrived
        dequantized: list[str] = []
        for name, tensor in tensors:
            if name in ignored:
                continue
            if name not in expected:
                raise ValueError(f"weight {name!r} is not in this model, or is given twice: see ModelArgs.shapes")
            if tuple(tensor.shape) != expected[name]:
                raise ValueError(f"weight {name!r} must have shape {expected[name]}, got {tuple(tensor.shape)}")
            waiting[name] = tensor
            del expected[name], tensor  # so that the parts of at most one packed weight are in memory twice
            weight = packed_by_name[name]
            if all(part in waiting for part in weight.names):
                dequantized += self._set_weight(weight, [waiting.pop(part) for part in weight.names])
        if dequantized:
            logger.warning(
                "weights that are applied together are not quantised alike, so those of them that are quantised are "
                "dequantised: %s; quantize= makes them alike",
                first_names(dequantized),
            )
        if expected:
            raise ValueError(f"{len(expected)} weights are missing: {first_names(expected)}")
        if self.params.tied_output:  # one copy in memory if the backend packs nothing
            embedding = self.tok_embeddings.detach()
            scheme = scheme_of(self.quantize, OUTPUT_NAME, embedding.shape[1])
            output = with_scheme(OUTPUT_NAME, embedding, scheme, self.device) if scheme else embedding
            assign(self, "output", self.ops.pack(output))

    def _set_weight(self, weight: PackedWeight, parts: list[Weight]) -> list[str]:
        """Give the parts one scheme, move, pack and set them -> the names of those that were dequantised."""
        named = list(zip(weight.names, parts, strict=True))
        stored = [scheme_of_weight(part) if isinstance(part, QuantizedWeight) else None for part in parts]
        scheme = packed_scheme(weight.names[0], parts[0].shape[-1], self.quantize, stored)
        if scheme is not None:
            check_device(scheme, self.device)
            alike = [with_scheme(name, part, scheme, self.device) for name, part in named]
            assign(weight.owner, weight.attribute, self.ops.pack(*alike))
            return []
        dense = [
            part.to(self.device).dequantized(self.dtype) if isinstance(part, QuantizedWeight) else part.detach()
            for part in parts
        ]
        if len(dense) == 1:  # as it is, it would share memory with the caller or with a mapped file
            dense = [self.ops.allocate(tuple(dense[0].shape), self.dtype, self.device).copy_(dense[0])]
        moved = [part.to(self.device, self.dtype) for part in dense]
        assign(weight.owner, weight.attribute, moved[0] if weight.is_never_packed else self.ops.pack(*moved))
        return [name for name, part in named if isinstance(part, QuantizedWeight)]

    def _unpacked_weights(self) -> Iterator[tuple[str, Weight]]:
        """(Meta's name, weight in Meta's shape). Raises ValueError if no weights are loaded."""
        shapes = self.share.shapes
        for weight in self.packed_weights():
            packed = getattr(weight.owner, weight.attribute)
            if packed is None:
                raise ValueError(NO_WEIGHTS)
            if weight.names == (OUTPUT_NAME,) and self.params.tied_output:
                packed = self.tok_embeddings  # of which the output may be a quantised copy
            packed = packed if isinstance(packed, QuantizedWeight) else packed.detach()
            rows = [shapes[name][0] for name in weight.names]
            parts = (packed,) if weight.is_never_packed else self.ops.unpack(packed, rows)
            yield from zip(weight.names, parts, strict=True)

    def _random_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, shape in self.share.shapes.items():
            weight = torch.empty(shape, device=self.device, dtype=self.dtype)
            yield name, weight.fill_(1) if name.endswith("norm.weight") else weight.normal_(0, INIT_STD)


def assign(owner: nn.Module, attribute: str, value: Weight) -> None:
    """Set a packed weight: a tensor as a parameter, a quantised weight as it is."""
    delattr(owner, attribute)
    if isinstance(value, Tensor):
        owner.register_parameter(attribute, nn.Parameter(value, requires_grad=False))
    else:
        setattr(owner, attribute, value)


class LoadedKeys(NamedTuple):
    """The names that `load_state_dict(strict=False)` did not find or did not use, in torch's format."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def check_state_dict(
    weights: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    ignored: AbstractSet[str],
    *,
    tied_output: bool,
    strict: bool,
) -> LoadedKeys:
    """The missing and unexpected names in a state dict for a model with weights of these shapes.

    Raises ValueError, listing them, for weights of another shape and, if `strict`, for missing and unexpected names;
    and if the output is tied but output.weight differs from the embedding.
    """
    missing = [name for name in shapes if name not in weights]
    if tied_output and OUTPUT_NAME in missing:
        missing.remove(OUTPUT_NAME)
    unexpected = [name for name in weights if name not in shapes and name not in ignored]
    misshaped = [
        f"{name} {tuple(weights[name].shape)} instead of {shape}"
        for name, shape in shapes.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    problems = {
        "missing": missing if strict else [],
        "unexpected": unexpected if strict else [],
        "misshaped": misshaped,
    }
    if any(problems.values()):
        listed = "; ".join(f"{problem}: {first_names(names)}" for problem, names in problems.items() if names)
        raise ValueError(f"the state dict does not fit this model: {listed}")
    tied = [weights.get(name) for name in (OUTPUT_NAME, EMBEDDING_NAME)]
    if tied_output and tied[0] is not None and (tied[1] is None or not torch.equal(tied[0], tied[1])):
        raise ValueError("output.weight differs from tok_embeddings.weight, but the model has tied_output=True")
    return LoadedKeys(missing, unexpected)
