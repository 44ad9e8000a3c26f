"""Which of Meta's weights stand together: the slots of a model.

Weights that read the same input are packed into one slot, so that one call applies them all.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import nn

# A layer's slots, in the order of a forward pass, and Meta's names of what each holds.
LAYER_WEIGHTS = {
    "attention_norm": ("attention_norm",),
    "wqkv": ("attention.wq", "attention.wk", "attention.wv"),
    "wo": ("attention.wo",),
    "ffn_norm": ("ffn_norm",),
    "w13": ("feed_forward.w1", "feed_forward.w3"),
    "w2": ("feed_forward.w2",),
}
UNPACKED = {"tok_embeddings", "attention_norm", "ffn_norm", "norm"}  # read as they are, never packed


class Slot(NamedTuple):
    """One attribute of the model or of a layer, and Meta's names of the weights it holds."""

    owner: nn.Module
    attribute: str
    names: tuple[str, ...]

    @property
    def plain(self) -> bool:
        """Read as it is, never packed."""
        return self.attribute in UNPACKED


def slots(model: nn.Module, layers: Iterable[nn.Module]) -> Iterator[Slot]:
    """Every slot of a model, in the order of a forward pass."""
    yield Slot(model, "tok_embeddings", ("tok_embeddings.weight",))
    for index, layer in enumerate(layers):
        for attribute, names in LAYER_WEIGHTS.items():
            yield Slot(layer, attribute, tuple(f"layers.{index}.{name}.weight" for name in names))
    yield Slot(model, "norm", ("norm.weight",))
    yield Slot(model, "output", ("output.weight",))
