"""Memory with guard bands on both sides, which detect writes outside a tensor."""

import torch
from torch import Tensor

GUARD_BYTES = 1024  # on each side; a multiple of 16, which keeps the tensor aligned
GUARD_VALUE = 0xA5


class GuardedMemory:
    """Allocates tensors between guard bands, filled with NaN (or -1), and checks all bands."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        """A contiguous tensor of this shape, filled with a value that no result has: NaN, or -1 for integers."""
        count = torch.Size(shape).numel()
        n_bytes = count * dtype.itemsize
        buffer = torch.full((n_bytes + 2 * GUARD_BYTES,), GUARD_VALUE, dtype=torch.uint8, device=device)
        self._buffers.append(buffer)
        inner = buffer[GUARD_BYTES : GUARD_BYTES + n_bytes].view(dtype).view(shape)
        return inner.fill_(torch.nan if dtype.is_floating_point else True if dtype == torch.bool else -1)

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of a tensor."""
        return self.empty(*tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)

    def check(self) -> None:
        """AssertionError if anything was written outside the tensors."""
        for buffer in self._buffers:
            for band in (buffer[:GUARD_BYTES], buffer[-GUARD_BYTES:]):
                assert bool((band == GUARD_VALUE).all()), "a kernel wrote outside a tensor"
