"""The projections with quantised weights on an NVIDIA GPU, at the widths of real models, against float64."""

from typing import Any, cast

import pytest
import torch

from fastllama import ModelArgs
from fastllama.calibration import Calibration
from fastllama.kernels import fused
from fastllama.kernels.projection.dequantize import dequantize
from fastllama.kernels.projection.packing import checked
from fastllama.kernels.projection.quantized_few_tokens import quantized_few_tokens
from fastllama.kernels.projection.quantized_matvec import quantized_matvec
from fastllama.kernels.quantized import QuantizedWeight
from fastllama.quantization import CHOICES, converts_fp8, quantized
from tests.gpu.test_projections import EPS, WIDTHS, Tensors, assert_near, linear, normalized
from tests.support.checkpoints import random_weights, tiny_params

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU: torch.cuda.is_available() is False"),
]
WEIGHTS = ("wqkv", "wo", "w13", "w2", "output")
CPU = torch.device("cpu")
RUNS = 20
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def skip_unless_supported(name: str) -> None:
    if name == "fp8" and not converts_fp8(torch.device("cuda")):
        pytest.skip("fp8 needs compute capability 8.9")


@pytest.mark.parametrize("n_tokens", [1, 2, 8, 16, 17], ids=lambda n: f"N{n}")
@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("model", ["3.2-1B", "3-8B"])
def test_projections_match_float64(model: str, name: str, n_tokens: int, device: torch.device) -> None:
    skip_unless_supported(name)
    tensors = Tensors(WIDTHS[model], n_tokens, device, with_biases=n_tokens == 2)
    wide = {}
    for attribute in WEIGHTS:
        weight = quantized(getattr(tensors, attribute), CHOICES[name])
        wide[attribute] = weight.dequantized()
        setattr(tensors, attribute, fused.pack(weight))
    out = tensors.run()
    heads = linear(normalized(out["h"], tensors.norm), wide["wqkv"], tensors.bqkv)
    heads = heads.unflatten(-1, (-1, tensors.widths.head_dim))
    assert_near("values", tensors.appended[1], heads[:, -tensors.widths.n_kv_heads :])
    assert_near("output", out["middle"], out["h"].double() + linear(tensors.attended, wide["wo"], tensors.bo))
    gate, up = linear(normalized(out["middle"], tensors.norm), wide["w13"], tensors.b13).chunk(2, -1)
    assert_near("swiglu", out["hidden"], torch.nn.functional.silu(gate) * up)
    assert_near("down", out["last"], out["middle"].double() + linear(out["hidden"], wide["w2"], tensors.b2))
    assert_near("logits", out["logits"], normalized(out["last"], tensors.norm) @ wide["output"].double().T)
    for _ in range(RUNS):
        for result, value in tensors.run().items():
            assert torch.equal(value, out[result]), f"{result} does not repeat"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CHOICES)
def test_each_conversion_gives_the_exact_weight(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Each column of the identity gives one weight, by assembly and without; every value of the format occurs."""
    skip_unless_supported(name)
    torch.manual_seed(1)
    weight = quantized(torch.randn(64, 256, device=device) * torch.logspace(-3, 0, 256, device=device), CHOICES[name])
    packed, exact = checked(fused.pack(weight)), weight.dequantized().to(dtype)  # type: ignore[arg-type]
    out = torch.empty_like(exact)
    dequantize(packed, out)
    tolerance: dict[str, Any] = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-5}
    torch.testing.assert_close(out, exact, **tolerance)
    eye = torch.eye(256, dtype=dtype, device=device)
    for begin in range(0, 256, 16):
        few = quantized_few_tokens(eye[begin : begin + 16].contiguous(), packed)
        torch.testing.assert_close(few.T, exact[:, begin : begin + 16], **tolerance)
    for column in range(0, 256, 7):
        for plain in (False, True):
            one = quantized_matvec(eye[column : column + 1].contiguous(), packed, plain=plain)
            torch.testing.assert_close(one[0], exact[:, column], **tolerance)


def test_norms_are_rounded_as_without_quantisation(device: torch.device) -> None:
    """x · inverse and its product with the norm's weight round to bfloat16: exact weights show the same numbers."""
    torch.manual_seed(2)
    x, norm = (torch.randn(n, 4096, device=device).bfloat16() for n in (1, 1))
    weight = quantized(torch.eye(4096, device=device), CHOICES["int8"])
    ours = quantized_matvec(x, checked(fused.pack(weight)), norm=norm[0], eps=EPS)  # type: ignore[arg-type]
    normed = (x.float() * torch.rsqrt(x.float().pow(2).mean() + EPS)).bfloat16() * norm
    assert (ours != normed).float().mean() < 0.01


def test_calibration_rounds_as_on_a_cpu(device: torch.device) -> None:
    params = tiny_params(hidden_dim=96, vocab_size=320)
    weights = random_weights(params, seed=5)
    windows = [[(31 * i + 7 * j) % 300 for j in range(40)] for i in range(4)]
    ordered = [(name, weights[name]) for name in ModelArgs(**params).shapes]
    ours, theirs = (dict(Calibration(params, windows, one).rounded(iter(ordered), 32)) for one in (device, CPU))
    for name, weight in ours.items():
        assert weight.device == CPU
        if isinstance(weight, QuantizedWeight):
            expected = cast(QuantizedWeight, theirs[name])
            same = (weight.values == expected.values).double().mean()
            assert same > 0.95, name  # near ties are decided otherwise
