"""Quantised weights in the order of the kernels' loads: nothing is lost, and x is where the documented order says."""

from dataclasses import replace

import pytest
import torch

from fastllama.kernels import fused
from fastllama.kernels.projection.dequantize import dequantize
from fastllama.kernels.projection.packing import FusedWeight, checked
from fastllama.kernels.quantized import QuantizedWeight, unpack_int4
from tests.kernels.cases import random
from tests.kernels.guards import GuardedMemory
from tests.kernels.projection.quantized_cases import BY_ROW, NAMES, quantized_as


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [128, 384, 100])
def test_unpack_undoes_pack(name: str, width: int) -> None:
    if width == 100 and name not in BY_ROW:
        pytest.skip("no groups divide 100 columns")
    parts = [quantized_as(name, random(rows, width, seed=rows)) for rows in (5, 1, 3)]
    packed = fused.pack(*parts)
    assert isinstance(packed, FusedWeight) and packed.shape == (9, width)
    assert packed.order == "fused" and packed.values.is_contiguous() and packed.values.shape[1] % 16 == 0
    for part, other in zip(parts, fused.unpack(packed, [5, 1, 3]), strict=True):
        assert isinstance(other, QuantizedWeight)
        for ours, expected in ((other.values, part.values), (other.scales, part.scales), (other.offsets, part.offsets)):
            assert (ours is None and expected is None) or (ours is not None and expected is not None)
            if ours is not None and expected is not None:
                assert ours.dtype == expected.dtype and torch.equal(ours, expected)
        assert (other.format, other.has_zeros, other.order) == (part.format, part.has_zeros, "plain")


@pytest.mark.parametrize("group", [0, 32, 128])
def test_columns_of_a_word_are_as_documented(group: int) -> None:
    """Byte b of word i of a block holds column 4·((b // 4)·B + i) + b % 4; int4's high half the one 8·B further on."""
    if group:
        weight = quantized_as(f"int4-g{group}", random(1, 256, seed=1))
        values, n_words = unpack_int4(weight.values)[0], group // 16
    else:
        weight = quantized_as("int8", random(1, 256, seed=1))
        values, n_words = weight.values[0], 8
    packed = checked(fused.pack(weight))  # type: ignore[arg-type]
    for at, byte in enumerate(packed.values[0].tolist()):
        block, within = divmod(at, 8 * n_words)
        word, b = divmod(within, 8)
        column = block * (group or 64) + 4 * (b // 4 * n_words + word) + b % 4
        if group:
            assert (byte & 15, byte >> 4) == (values[column], values[column + 8 * n_words])
        else:
            assert byte == int(values[column]) % 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_dequantize_gives_the_weight(
    name: str, dtype: torch.dtype, device: torch.device, guarded: GuardedMemory
) -> None:
    width = 100 if name in BY_ROW else 256
    weight = quantized_as(name, random(7, width, seed=2)).to(device)
    out = guarded.empty(7, width, dtype=dtype, device=device)
    dequantize(checked(fused.pack(weight)), out)  # type: ignore[arg-type]
    # An offset may be added in the multiply-add that multiplies by the scale, rounded once.
    torch.testing.assert_close(out, weight.dequantized(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_weights_that_the_kernels_do_not_take_are_refused() -> None:
    weight = quantized_as("int4-g32", random(4, 256, seed=3))
    packed = fused.pack(weight)
    assert isinstance(packed, QuantizedWeight)
    refusals = {
        "only weights in the order 'plain' can be packed": lambda: fused.pack(packed),
        "need a weight packed by fused.pack, got one in the order 'plain'": lambda: checked(weight),
        "groups of 32, 64, 128 columns, got groups of 256": lambda: fused.pack(
            replace(weight, scales=weight.scales[:, :1], offsets=weight.scales[:, :1])
        ),
        "got int4 with torch.float16 scales and no offsets": lambda: fused.pack(replace(weight, offsets=None)),
        "got int4 with torch.float32 scales and offsets": lambda: fused.pack(
            replace(weight, scales=weight.scales.float())
        ),
    }
    for message, call in refusals.items():
        with pytest.raises(ValueError) as caught:
            call()
        assert message in str(caught.value)
