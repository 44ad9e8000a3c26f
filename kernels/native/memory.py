"""Memory in large pages, which a CPU reads faster: it looks up fewer addresses (figures: docs/kernels.md).

Small tensors are placed one after another in blocks, because a large page is a part of one block. A large tensor has a
block of its own. A block is unmapped when the last of its tensors is freed. Where the system has no large pages, or no
memory, torch allocates.
"""

import contextlib
import mmap
import os
import threading
import weakref

import torch
from torch import Tensor

LARGE_PAGE = 2**21  # bytes, on most systems
BLOCK_BYTES = 2**25  # address space of a block of small tensors
MAX_SHARED_BYTES = 2**23  # of a small tensor
ALIGNMENT = 64  # of a tensor, in bytes: a cache line


class Blocks:
    """Where the next tensor is placed. One thread at a time takes memory."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin with a new block."""
        self._lock = threading.Lock()
        self._block: weakref.ref[mmap.mmap] | None = None  # of small tensors, which keep it
        self._used = 0  # bytes of that block

    def take(self, n_bytes: int) -> Tensor:
        """Zeros (n_bytes,) uint8. Raises OSError where there is no memory."""
        if n_bytes > MAX_SHARED_BYTES:
            return _tensor(*_map(n_bytes), n_bytes)
        with self._lock:
            block = self._block() if self._block is not None else None
            if block is None or self._used + n_bytes > len(block):
                block, self._used = _map(BLOCK_BYTES)
                self._block = weakref.ref(block)
            memory = _tensor(block, self._used, n_bytes)
            self._used += -(-n_bytes // ALIGNMENT) * ALIGNMENT
            return memory


def _map(n_bytes: int) -> tuple[mmap.mmap, int]:
    """Address space for n_bytes, in large pages where the system has them, and the offset of the first such page."""
    block = mmap.mmap(-1, n_bytes + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # this system has none
        block.madvise(mmap.MADV_HUGEPAGE)
    return block, -_tensor(block, 0, 1).data_ptr() % LARGE_PAGE


def _tensor(block: mmap.mmap, offset: int, n_bytes: int) -> Tensor:
    return torch.frombuffer(block, dtype=torch.uint8, count=n_bytes, offset=offset)


_blocks = Blocks()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_blocks.reset)  # another thread may have held the lock


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialized memory, on a CPU with Linux in large pages."""
    size = torch.Size(shape).numel()
    if device.type == "cpu" and size > 0 and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # torch's error names the bytes that there are not
            return _blocks.take(size * dtype.itemsize).view(dtype).view(shape)
    return torch.empty(shape, dtype=dtype, device=device)
