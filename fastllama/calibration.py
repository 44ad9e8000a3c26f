"""Rounds a model's layers to int4 one after another, each by what its inputs are on a text.

The text's windows run through the layers in float32, with the weights that are rounded already. So what a layer is
rounded by has the errors of those before it, which it partly makes good. Only one layer is in memory at a time, its
windows' activations, and some five float64 matrices of the moments of one weight's inputs.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fastllama.args import EMBEDDING_NAME, ModelArgs
from fastllama.gptq import gptq
from fastllama.kernels import reference
from fastllama.kernels.batch import RaggedBatch
from fastllama.kernels.paged_cache import LayerCache
from fastllama.kernels.quantized import Weight, split
from fastllama.packed_weights import LAYER_WEIGHTS
from fastllama.quantization import naming
from fastllama.rope import rope_table


class Calibration:
    """The hidden states of windows of tokens before a layer."""

    def __init__(self, params: Mapping[str, Any], windows: Sequence[Sequence[int]], device: torch.device) -> None:
        """params: ModelArgs fields, resolved. windows: of tokens, each from position 0 on. device: that computes."""
        longest = max(map(len, windows))
        self._args = ModelArgs(**{**params, "max_seq_len": longest, "max_batch_size": 1})
        self._windows = [torch.tensor(window) for window in windows]
        self._n_names = sum(name.startswith("layers.0.") for name in self._args.shapes)
        self._device = device
        self.n_tokens = sum(map(len, windows))
        self._rope = rope_table(self._args).to(device)
        self._cache = LayerCache.of(1, longest, self._args.n_kv_heads, self._args.head_dim, torch.float32, device)
        self._batches = {n: RaggedBatch.of([(0, 0, [0] * n)], device) for n in set(map(len, windows))}
        self._hidden: list[Tensor] = []

    @torch.inference_mode()
    def rounded(self, weights: Iterable[tuple[str, Tensor]], group_size: int) -> Iterator[tuple[str, Weight]]:
        """All weights of a model in the order of a forward pass -> the same, the layers' matrices as int4 with zeros.

        ValueError for weights that are not finite.
        """
        layer: dict[str, Tensor] = {}
        for name, weight in weights:
            prefix, _, part = name.partition(".")
            if prefix != "layers":
                if name == EMBEDDING_NAME:
                    self._hidden = [weight[window].to(self._device, torch.float32) for window in self._windows]
                yield name, weight
                continue
            index, _, part = part.partition(".")
            layer[part] = weight
            if len(layer) == self._n_names:
                for part, result in self._rounded_layer(index, layer, group_size).items():
                    yield f"layers.{index}.{part}", result
                layer = {}

    def _rounded_layer(self, index: str, layer: Mapping[str, Tensor], group_size: int) -> dict[str, Weight]:
        """Layer number `index` with its matrices rounded. The hidden states become those after it."""
        eps, result = self._args.norm_eps, dict[str, Weight](layer)

        def packed(attribute: str) -> Tensor | None:
            parts = [layer[name] for name in LAYER_WEIGHTS[attribute] if name in layer]
            return torch.cat(parts).to(self._device, torch.float32) if parts else None

        def rounded(attribute: str, inputs: Iterable[Tensor]) -> Tensor:
            names = LAYER_WEIGHTS[attribute]
            with naming(", ".join(f"layers.{index}.{name}" for name in names)):
                weight = gptq(cast(Tensor, packed(attribute)), _moments(inputs), group_size)
            parts = split(weight, [layer[name].shape[0] for name in names])
            result.update({name: part.to(layer[name].device) for name, part in zip(names, parts, strict=True)})
            return weight.dequantized()

        norm, ffn_norm = cast(Tensor, packed("attention_norm")), cast(Tensor, packed("ffn_norm"))
        wqkv = rounded("wqkv", (reference.rms_norm(h, norm, eps) for h in self._hidden))
        attended = [self._attended(h, norm, wqkv, packed("bqkv")) for h in self._hidden]
        self._add(attended, rounded("wo", attended), packed("bo"))
        w13 = rounded("w13", (reference.rms_norm(h, ffn_norm, eps) for h in self._hidden))
        b13 = packed("b13")
        f = [reference.norm_swiglu(h, ffn_norm, w13, eps, self._batch(h), b13) for h in self._hidden]
        self._add(f, rounded("w2", f), packed("b2"))
        return result

    def _batch(self, h: Tensor) -> RaggedBatch:
        """A window as a batch of one row."""
        return self._batches[len(h)]

    def _attended(self, h: Tensor, norm: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What attention makes of a window (N, E) -> (N, H·D)."""
        batch, cache = self._batch(h), self._cache
        q = reference.norm_qkv_rope_append(h, norm, weight, self._rope, cache, self._args.norm_eps, batch, bias)
        return reference.attention(q, cache, batch)

    def _add(self, inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> None:
        """Add a projection of its inputs to the hidden states."""
        pairs = zip(inputs, self._hidden, strict=True)
        self._hidden = [reference.linear_residual(x, weight, h, self._batch(h), bias) for x, h in pairs]


def _moments(inputs: Iterable[Tensor]) -> Tensor:
    """The mean of x·xᵀ over all tokens x of the inputs, (N, E) each -> (E, E). ValueError if it is not finite."""
    total, n_tokens = torch.zeros(()), 0
    for x in inputs:
        total = total.to(x.device) + x.T @ x
        n_tokens += len(x)
    if not bool(total.isfinite().all()):
        raise ValueError("its inputs on the calibration text are not finite: the checkpoint is damaged")
    return total / n_tokens
