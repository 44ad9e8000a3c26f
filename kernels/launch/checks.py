"""Checks of the tensors that a kernel's wrapper receives, made before the launch."""

import torch
from torch import Tensor

from fastllama.kernels.paged_cache import PAGE_TOKENS, LayerCache

MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


def check_model_dtype(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless a tensor has one of the model dtypes."""
    if tensor.dtype not in MODEL_DTYPES:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}: convert the model")


def check_head_dim(head_dim: int) -> None:
    """Raise ValueError for a head dim that the kernels do not support."""
    if head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"the fused kernels take even head dims up to {MAX_HEAD_DIM}, got {head_dim}: build with "
            'backend="reference"'
        )


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int | str, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Raise ValueError unless a tensor is contiguous and has this shape (strings match any size), dtype, device."""
    sizes = tensor.shape
    fits = len(sizes) == len(shape)
    if fits and sizes != shape:
        fits = not [1 for size, wanted in zip(sizes, shape, strict=True) if size != wanted and type(wanted) is not str]
    if not fits:
        wanted, got = (", ".join(map(str, sizes)) for sizes in (shape, tensor.shape))
        raise ValueError(f"{name} must have shape ({wanted}), got ({got})")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}: convert it first")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}: move it first")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}: make a copy with .contiguous()")


def check_cache(cache: LayerCache, head_dim: int | str, dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError unless a layer's cache has this head dim, dtype and device."""
    check_tensor("cache.k", cache.k, ("P", "K", PAGE_TOKENS, head_dim), dtype, device)
    check_tensor("cache.v", cache.v, tuple(cache.k.shape), dtype, device)
    check_tensor("cache.table", cache.table, ("B", "M"), torch.int32, device)
