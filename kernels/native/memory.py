"""Memory in large pages, which a CPU reads faster: it looks up 512 times fewer addresses (figures: docs/kernels.md).

Tensors are placed one after another in blocks, because a large page is 2 MiB of one block. A block
is unmapped when the last of its tensors is freed. The end of a block, which no tensor uses, takes no memory.
"""

import mmap
import threading
import weakref

import torch
from torch import Tensor

LARGE_PAGE = 2**21  # bytes
BLOCK_BYTES = 2**26  # address space of a block; a larger tensor has a block of its own
ALIGNMENT = 64  # of a tensor, in bytes: a cache line


class Blocks:
    """Where the next tensor is placed. One thread at a time takes memory."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._block: weakref.ref[mmap.mmap] | None = None  # its tensors keep it
        self._used = 0  # bytes of the block

    def take(self, n_bytes: int) -> Tensor:
        """Zeroed memory (n_bytes,) uint8."""
        with self._lock:
            block = self._block() if self._block is not None else None
            if block is None or self._used + n_bytes > len(block):
                block, self._used = _map(max(n_bytes + LARGE_PAGE, BLOCK_BYTES))
                self._block = weakref.ref(block)
            memory = torch.frombuffer(block, dtype=torch.uint8, count=n_bytes, offset=self._used)
            self._used += -(-n_bytes // ALIGNMENT) * ALIGNMENT
            return memory


def _map(n_bytes: int) -> tuple[mmap.mmap, int]:
    """Address space in large pages where the system has them, and the offset of the first such page."""
    block = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_HUGEPAGE)
    return block, -torch.frombuffer(block, dtype=torch.uint8).data_ptr() % LARGE_PAGE


_blocks = Blocks()


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialized memory, in large pages on Linux."""
    size = torch.Size(shape).numel()
    if size == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    return _blocks.take(size * dtype.itemsize).view(dtype).view(shape)
