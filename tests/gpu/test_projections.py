"""The projection kernels on an NVIDIA GPU, at the widths of Llama 3.2-1B and 3-8B, against float64."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastllama.kernels import fused
from fastllama.kernels.batch import RaggedBatch
from fastllama.kernels.paged_cache import LayerCache, pages_for
from tests.kernels.pages import shuffled_table

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU: torch.cuda.is_available() is False"),
]


class Widths(NamedTuple):
    dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int


WIDTHS = {
    "3.2-1B": Widths(2048, 32, 8, 64, 8192, 128256),
    "3-8B": Widths(4096, 32, 8, 128, 14336, 128256),
    "3-70B/8": Widths(8192, 8, 1, 128, 3584, 16032),
}
TOKENS = (1, 2, 4, 8, 16, 17, 300)
LENGTH = 512
EPS = 1e-5
RUNS = 100
LARGE_CACHE = (17, 131072, 8, 128)  # rows, positions, kv heads, head dim: 2.3e9 elements
# Relative to the root mean square: half an ulp of bfloat16 is 2^-9, and about three roundings occur.
MAX_RELATIVE_ERROR = 6e-3
MAX_ELEMENT_ERROR = 5e-2


class Tensors:
    """A layer's weights and a batch of one token per row, or of one row if there are more tokens than cache rows."""

    def __init__(self, widths: Widths, n_tokens: int, device: torch.device, with_biases: bool = False) -> None:
        torch.manual_seed(1)
        dim, n_heads, n_kv_heads, head_dim, hidden_dim, vocab_size = self.widths = widths
        rows = min(n_tokens, 16)
        pieces = [(row, 7 * row, [row]) for row in range(rows)] if n_tokens <= 16 else [(3, 0, [5] * n_tokens)]

        def weight(out: int, width: int) -> Tensor:
            return torch.randn(out, width, device=device).div(width**0.5).bfloat16()

        self.workspace = fused.workspace(
            max_batch_size=16,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            vocab_size=vocab_size,
            device=device,
        )
        self.batch = RaggedBatch.of(pieces, device, self.workspace)
        self.table = torch.randn(64, dim, device=device).bfloat16()
        self.norm = (1 + 0.1 * torch.randn(dim, device=device)).bfloat16()
        self.wqkv, self.wo = weight((n_heads + 2 * n_kv_heads) * head_dim, dim), weight(dim, n_heads * head_dim)
        self.bqkv, self.bo, self.b13, self.b2 = (
            torch.randn(out, device=device).bfloat16() if with_biases else None
            for out in ((n_heads + 2 * n_kv_heads) * head_dim, dim, 2 * hidden_dim, dim)
        )
        self.w13, self.w2, self.output = weight(2 * hidden_dim, dim), weight(dim, hidden_dim), weight(vocab_size, dim)
        self.attended = torch.randn(n_tokens, n_heads * head_dim, device=device).bfloat16()
        angles = torch.rand(LENGTH, head_dim // 2, device=device) * 6.3
        self.rope = torch.stack([angles.cos(), angles.sin()], -1)
        ordered = LayerCache.of(16, LENGTH, n_kv_heads, head_dim, torch.bfloat16, device)
        self.cache = ordered._replace(table=shuffled_table(16, LENGTH, device))

    @property
    def appended(self) -> tuple[Tensor, Tensor]:
        """The batch's keys and values in the cache, (N, K, D) each."""
        pages, places = self.cache.places(self.batch.rows, self.batch.positions)
        return self.cache.k[pages, :, places], self.cache.v[pages, :, places]

    def run(self) -> dict[str, Tensor]:
        """One layer's projections and the head, each with the previous one's result as input."""
        h = fused.embed(self.table, self.batch)
        q = fused.norm_qkv_rope_append(h, self.norm, self.wqkv, self.rope, self.cache, EPS, self.batch, self.bqkv)
        middle = fused.linear_residual(self.attended, self.wo, h, self.batch, self.bo)
        hidden = fused.norm_swiglu(middle, self.norm, self.w13, EPS, self.batch, self.b13)
        last = fused.linear_residual(hidden, self.w2, middle, self.batch, self.b2)
        logits = fused.norm_lm_head(last, self.norm, self.output, EPS, self.batch)
        return {"h": h, "q": q, "middle": middle, "hidden": hidden, "last": last, "logits": logits}


def normalized(h: Tensor, norm: Tensor) -> Tensor:
    wide = h.double()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * norm.double()


def assert_near(name: str, ours: Tensor, expected: Tensor) -> None:
    """Compare the norm of the difference, and every element's error relative to its own and the typical size."""
    error = (ours.double() - expected).norm() / expected.norm()
    assert error < MAX_RELATIVE_ERROR, f"{name}: relative error {error:.2e}"
    scale = expected.pow(2).mean().sqrt()
    worst = ((ours.double() - expected).abs() / (scale + expected.abs())).max()
    assert worst < MAX_ELEMENT_ERROR, f"{name}: one element is off by {worst:.2e} of its size"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())


@pytest.mark.parametrize("n_tokens", TOKENS, ids=lambda n: f"N{n}")
@pytest.mark.parametrize("with_biases", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("model", WIDTHS)
def test_projections_match_float64(model: str, with_biases: bool, n_tokens: int, device: torch.device) -> None:
    tensors = Tensors(WIDTHS[model], n_tokens, device, with_biases)
    out = tensors.run()
    batch, (_, n_heads, n_kv_heads, head_dim, *_) = tensors.batch, tensors.widths
    assert torch.equal(out["h"], tensors.table[batch.tokens])
    heads = linear(normalized(out["h"], tensors.norm), tensors.wqkv, tensors.bqkv).unflatten(-1, (-1, head_dim))
    pairs = torch.view_as_complex(heads[:, : n_heads + n_kv_heads].unflatten(-1, (-1, 2)))
    angles = torch.view_as_complex(tensors.rope.double()[batch.positions])[:, None]
    rotated = torch.view_as_real(pairs * angles).flatten(-2)
    assert_near("q", out["q"], rotated[:, :n_heads])
    keys, values = tensors.appended
    assert_near("keys", keys, rotated[:, n_heads:])
    assert_near("values", values, heads[:, n_heads + n_kv_heads :])
    assert tensors.cache.k.count_nonzero() <= n_tokens * n_kv_heads * head_dim
    assert_near("output", out["middle"], out["h"].double() + linear(tensors.attended, tensors.wo, tensors.bo))
    gate, up = linear(normalized(out["middle"], tensors.norm), tensors.w13, tensors.b13).chunk(2, -1)
    assert_near("swiglu", out["hidden"], torch.nn.functional.silu(gate) * up)
    assert_near("down", out["last"], out["middle"].double() + linear(out["hidden"], tensors.w2, tensors.b2))
    assert_near("logits", out["logits"], normalized(out["last"], tensors.norm) @ tensors.output.double().T)


@pytest.mark.parametrize("n_tokens", [1, 4, 16], ids=lambda n: f"N{n}")
def test_projections_repeat_bit_for_bit(n_tokens: int, device: torch.device) -> None:
    """Equal in a hundred runs: no sum depends on the order in which programs finish."""
    tensors = Tensors(WIDTHS["3.2-1B"], n_tokens, device)
    first = tensors.run()
    for _ in range(RUNS):
        for name, value in tensors.run().items():
            assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("n_tokens", [1, 3, 40], ids=lambda n: f"N{n}")
def test_append_reaches_beyond_32_bits(n_tokens: int, device: torch.device) -> None:
    """Append at the last positions of a cache of more than 2^31 elements, with each of the three appending kernels."""
    rows, length, n_kv_heads, head_dim = LARGE_CACHE
    batch = RaggedBatch.of([(rows - 1, length - n_tokens, [1] * n_tokens)], device)
    torch.manual_seed(2)
    h, norm = torch.randn(n_tokens, 256, device=device).bfloat16(), torch.ones(256, device=device).bfloat16()
    weight = torch.randn(3 * n_kv_heads * head_dim, 256, device=device).div(16).bfloat16()
    angles = torch.rand(length, head_dim // 2, device=device) * 6.3
    rope = torch.stack([angles.cos(), angles.sin()], -1)
    cache = LayerCache.of(*LARGE_CACHE, torch.bfloat16, device)
    q = fused.norm_qkv_rope_append(h, norm, weight, rope, cache, EPS, batch)
    heads = (normalized(h, norm) @ weight.double().T).unflatten(-1, (-1, head_dim))
    pairs = torch.view_as_complex(heads[:, : 2 * n_kv_heads].unflatten(-1, (-1, 2)))
    rotated = torch.view_as_real(pairs * torch.view_as_complex(rope.double()[-n_tokens:])[:, None]).flatten(-2)
    assert_near("q", q, rotated[:, :n_kv_heads])
    page = rows * pages_for(length) - 1  # the last row's last one; another follows that belongs to no row
    for pages, expected in ((cache.k, rotated[:, n_kv_heads:]), (cache.v, heads[:, 2 * n_kv_heads :])):
        written = pages[page, :, -n_tokens:]
        assert_near("cache", written.transpose(0, 1), expected)
        assert pages.count_nonzero() == written.count_nonzero()
