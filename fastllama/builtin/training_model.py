"""A Llama 3 that can be trained.

The runtime's Transformer is for inference: packed weights, a cache, no gradients. This one has the same mathematics in
plain differentiable PyTorch: RMSNorm, rotary embedding of interleaved pairs, grouped-query attention, SwiGLU. It has
Meta's parameter names, so its `state_dict` is a Meta checkpoint. Only the built-in model's trainer uses it.

Sizes are read from a dict with the fields of Meta's params.json. In training, one matrix is both token embedding and
output projection, because a model of this size then learns faster. `meta_state_dict` writes it under both names.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INIT_STD = 0.02


def ffn_width(params: dict[str, Any]) -> int:
    """Meta's feed-forward width: 8/3 of dim, times the multiplier, rounded up to a multiple of `multiple_of`."""
    width = int(8 * params["dim"] / 3)
    if params["ffn_dim_multiplier"] is not None:
        width = int(params["ffn_dim_multiplier"] * width)
    multiple: int = params["multiple_of"]
    return multiple * ((width + multiple - 1) // multiple)


def rotary_table(head_dim: int, length: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, each (length, head_dim / 2): position times the pair's frequency."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, S, heads, head_dim) with each pair (x[2i], x[2i+1]) rotated by its position's angle."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class RMSNorm(nn.Module):
    """x divided by its root mean square, times a learned weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention over one document per row: causal, positions from 0."""

    def __init__(self, params: dict[str, Any]) -> None:
        super().__init__()
        dim = params["dim"]
        self.head_dim = dim // params["n_heads"]
        self.wq = nn.Linear(dim, params["n_heads"] * self.head_dim, bias=False)
        self.wk = nn.Linear(dim, params["n_kv_heads"] * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, params["n_kv_heads"] * self.head_dim, bias=False)
        self.wo = nn.Linear(params["n_heads"] * self.head_dim, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        length, kv_heads = x.shape[1], k.shape[2]
        # Query heads that share a kv head become rows of one product: (B, kv_heads, group * S, head_dim). For documents
        # this short, plain products train several times faster on a CPU than fused attention, whose backward is slow.
        rows = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        scores = (rows @ k.permute(0, 2, 3, 1) * self.head_dim**-0.5).unflatten(2, (-1, length))
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        probs = scores.masked_fill(future, -torch.inf).softmax(dim=-1).flatten(2, 3)
        attended = (probs @ v.transpose(1, 2)).unflatten(2, (-1, length)).permute(0, 3, 1, 2, 4)
        out: Tensor = self.wo(attended.flatten(2))
        return out


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, params: dict[str, Any]) -> None:
        super().__init__()
        dim, width = params["dim"], ffn_width(params)
        self.w1 = nn.Linear(dim, width, bias=False)
        self.w2 = nn.Linear(width, dim, bias=False)
        self.w3 = nn.Linear(dim, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class Block(nn.Module):
    """One layer: attention and feed-forward, each with a norm before it and a residual connection."""

    def __init__(self, params: dict[str, Any]) -> None:
        super().__init__()
        self.attention = Attention(params)
        self.feed_forward = FeedForward(params)
        self.attention_norm = RMSNorm(params["dim"], params["norm_eps"])
        self.ffn_norm = RMSNorm(params["dim"], params["norm_eps"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        out: Tensor = x + self.feed_forward(self.ffn_norm(x))
        return out


class TrainableLlama(nn.Module):
    """The complete model. `forward` takes tokens (B, S) and returns float32 logits (B, S, vocab_size)."""

    def __init__(self, params: dict[str, Any], max_length: int) -> None:
        super().__init__()
        self.params = params
        self.tok_embeddings = nn.Embedding(params["vocab_size"], params["dim"])
        self.layers = nn.ModuleList(Block(params) for _ in range(params["n_layers"]))
        self.norm = RMSNorm(params["dim"], params["norm_eps"])
        self.cos, self.sin = rotary_table(params["dim"] // params["n_heads"], max_length, params["rope_theta"])
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                # Projections into the residual stream start smaller, so the stream does not grow with depth.
                is_residual = name.endswith(("wo.weight", "w2.weight"))
                nn.init.normal_(weight, std=INIT_STD / (2 * params["n_layers"]) ** 0.5 if is_residual else INIT_STD)

    def hidden(self, tokens: Tensor) -> Tensor:
        """The normed hidden states after the last layer, (B, S, dim)."""
        length = tokens.shape[1]
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, self.cos[:length], self.sin[:length])
        out: Tensor = self.norm(x)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocab_size) of hidden states (..., dim), through the shared embedding matrix."""
        return F.linear(hidden, self.tok_embeddings.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits(self.hidden(tokens))


def meta_state_dict(model: TrainableLlama) -> dict[str, Tensor]:
    """The weights in bfloat16 under Meta's names, with the shared matrix stored twice as in Meta's layout."""
    # clone: torch.save writes each storage once, and the file must not depend on tensors that share one.
    weights = {name: tensor.detach().to(torch.bfloat16).clone() for name, tensor in model.state_dict().items()}
    weights["output.weight"] = weights["tok_embeddings.weight"].clone()
    return weights
