"""Checks of a projection's arguments, y = epilogue(weight · norm(x) + bias). Both projection kernels use them."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastllama.kernels.launch.checks import check_model_dtype, check_tensor
from fastllama.kernels.projection.packing import checked
from fastllama.kernels.quantized import Weight
from fastllama.kernels.rope import CacheTarget


class Projection(NamedTuple):
    """The checked arguments of one call, as both kernels take them."""

    y: Tensor  # (N, OUT), or q (N, H·D); not yet written
    results: int  # OUT: rows of the weight, or half as many if each result needs two rows
    tiles: int  # rows of the weight per result: 1 or 2
    pointers: tuple[Tensor | None, ...]
    length: int  # T of the cache
    dims: dict[str, int | str]  # the kernels' constexpr dims

    @classmethod
    def of(
        cls,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        norm: Tensor | None,
        residual: Tensor | None,
        swiglu: bool,
        append_to: CacheTarget | None,
    ) -> "Projection":
        """Check a projection's tensors and allocate its result. Raises ValueError if they do not match."""
        check_model_dtype("x", x)
        like_x = x.dtype, x.device
        if isinstance(weight, Tensor):
            check_tensor("weight", weight, ("rows", "IN"), *like_x)
        else:
            check_tensor("weight", checked(weight).values, ("rows", "bytes"), torch.uint8, x.device)
        rows, in_features = weight.shape
        check_tensor("x", x, ("N", in_features), *like_x)
        if bias is not None:
            check_tensor("bias", bias, (rows,), *like_x)
        if norm is not None:
            check_tensor("norm", norm, (in_features,), *like_x)
        n_tokens = x.shape[0]
        epilogue, tiles, width, length = "none", 1, rows, 0
        n_heads = n_kv_heads = head_dim = 0
        if append_to is not None:
            n_heads = append_to.query_heads(n_tokens, rows, *like_x)
            cache = append_to.cache
            n_kv_heads, head_dim, length = cache.k.shape[1], cache.k.shape[3], cache.length
            epilogue, tiles, width = "rotary", 2, n_heads * head_dim
        elif swiglu:
            if rows % 2:
                raise ValueError(f"a gate and an up projection must have 2·F rows together, got {rows}")
            epilogue, tiles, width = "swiglu", 2, rows // 2
        if residual is not None:
            check_tensor("residual", residual, (n_tokens, width), *like_x)
            if tiles == 2:
                raise ValueError("only a plain projection takes a residual")
        y = torch.empty(n_tokens, width, dtype=x.dtype, device=x.device)
        return cls(
            y,
            rows // tiles,
            tiles,
            (y, bias, residual, *(append_to.pointers if append_to else (None,) * 6)),
            length,
            {
                "IN": in_features,
                "OUT": rows // tiles,
                "H": n_heads,
                "K": n_kv_heads,
                "D": head_dim,
                "EPILOGUE": epilogue,
            },
        )
