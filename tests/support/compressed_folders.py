"""Stores matrices as the package compressed-tensors does, and unpacks them through it.

The package is imported by the functions: that takes seconds, which processes that run other tests do not need.
"""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.quantized_folders import Parts, linear_weights

NEEDED = pytest.mark.skipif(
    find_spec("compressed_tensors") is None,
    reason="compressed-tensors is not installed: pip install compressed-tensors",
)
LINEAR = linear_weights()
INT8, FP8 = {"num_bits": 8, "type": "int"}, {"num_bits": 8, "type": "float"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group"}
# (format, the weights' arguments, what it is in memory)
KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "fp8-channel": ("float-quantized", FP8 | {"strategy": "channel"}, "fp8 by row"),
    "fp8-tensor": ("naive-quantized", FP8 | {"strategy": "tensor"}, "fp8 by row"),
    "int8-channel": ("int-quantized", INT8 | {"strategy": "channel"}, "int8 by row"),
    "int8-tensor": ("naive-quantized", INT8 | {"strategy": "tensor"}, "int8 by row"),
    "int8-group": ("int-quantized", INT8 | {"strategy": "group", "group_size": 64}, "int8 in groups of 64"),
    "int8-packed": ("pack-quantized", INT8 | {"strategy": "channel"}, "int8 by row"),
    "int8-packed-group": ("pack-quantized", INT8 | {"strategy": "group", "group_size": 128}, "int8 in groups of 128"),
    "int4-128": ("pack-quantized", INT4 | {"group_size": 128}, "int4 in groups of 128"),
    "int4-64-zeros": ("pack-quantized", INT4 | {"group_size": 64, "symmetric": False}, "int4 in groups of 64"),
    "int4-32-zeros": ("pack-quantized", INT4 | {"group_size": 32, "symmetric": False}, "int4 in groups of 32"),
    "int4-256": ("pack-quantized", INT4 | {"group_size": 256, "symmetric": False}, "int4 in groups of 128"),
    "int4-channel": ("pack-quantized", INT4 | {"strategy": "channel", "symmetric": False}, "int4 in groups of 128"),
    "int4-tensor": ("pack-quantized", INT4 | {"strategy": "tensor"}, "int4 in groups of 128"),
}


def compressed(weight: Tensor, layout: str, fields: dict[str, Any], dtype: torch.dtype = torch.float16) -> Parts:
    """A matrix as the package stores it, with simple scales in this dtype."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    arguments = QuantizationArgs(**fields)
    groups = weight.shape[1] // (arguments.group_size or weight.shape[1])
    grouped = weight.view(1, 1, -1) if arguments.strategy == "tensor" else weight.view(weight.shape[0], groups, -1)
    largest = grouped.abs().amax(-1)
    top = 448.0 if arguments.type == "float" else 2.0 ** (arguments.num_bits - 1) - 1
    parts = {"weight": weight, "weight_scale": (largest / top).to(dtype)}
    if arguments.strategy == "tensor":
        parts["weight_scale"] = parts["weight_scale"].view(1)
    if not arguments.symmetric:
        generator = torch.Generator().manual_seed(3)
        parts["weight_zero_point"] = torch.randint(-8, 8, largest.shape, generator=generator).to(torch.int8)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    stored: Parts = BaseCompressor.get_value_from_registry(layout).compress(parts, scheme)
    return stored


def dequantised(parts: Parts, layout: str, fields: dict[str, Any]) -> Tensor:
    """The matrix as the package unpacks it, with scales in float32."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**fields))
    wide = parts | {"weight_scale": parts["weight_scale"].float()}
    weight: Tensor = BaseCompressor.get_value_from_registry(layout).decompress(wide, scheme)["weight"]
    return weight.float()


def configuration(layout: str, fields: dict[str, Any], **changes: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": fields}
    fixed = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": []}
    return fixed | {"format": layout, "config_groups": {"group_0": group}} | changes
