"""How the sampling kernels split a row of logits into blocks, one per program, and their scratch memory."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastllama.kernels.launch.sizes import ceil_div, next_power_of_2

MAX_VOCABULARY = 262144
MIN_BLOCK = 64
MAX_BLOCK = 2048
LOGITS_PER_THREAD = 8
THREADS_PER_WARP = 32


class Launch(NamedTuple):
    """How a row is split into blocks."""

    block: int  # logits per program
    blocks: int  # programs per row
    warps: int


def choose_launch(vocab_size: int) -> Launch:
    """Blocks of 8 logits per thread: one 16-byte load of a 16-bit dtype.

    The last program of a row reads one chunk of each block's candidates at a time, together at most as many as a block
    has logits. So the cost does not depend on the number of blocks. 63 chunks of 32 hold most nuclei. Blocks of
    twice the size would occupy half as many multiprocessors in both launches, and need 16 warps with at most 128
    registers.

        V = 128,256     63 blocks of 2,048 logits, 8 warps
        V = 262,144     128 blocks of 2,048, 8 warps
        V = 1,000       1 block of 1,024, 4 warps
    """
    block = max(MIN_BLOCK, min(MAX_BLOCK, next_power_of_2(vocab_size)))
    return Launch(block, ceil_div(vocab_size, block), max(1, block // (LOGITS_PER_THREAD * THREADS_PER_WARP)))


@dataclass(frozen=True)
class SamplingScratch:
    """Intermediate results of the blocks, for up to max_rows rows of one vocabulary of P blocks."""

    vocab_size: int
    maxima: Tensor  # (max_rows, P) float32: a block's largest logit; +inf if one is NaN
    first_ids: Tensor  # (max_rows, P) int32: the lowest id with that logit
    sums: Tensor  # (max_rows, P) float32: Σ exp(x - maximum)
    masses: Tensor  # (max_rows, P) float32: Σ exp((x - maximum) / temperature)
    candidates: Tensor  # (max_rows, P · block) float32: a block's logits that top-p may keep, in order of id
    counts: Tensor  # (max_rows, P) int32: number of candidates
    lowest: Tensor  # (max_rows, P) int32: key of the smallest candidate
    counters: Tensor  # (max_rows,) int32: finished blocks; zero between calls

    @classmethod
    def of(cls, max_rows: int, vocab_size: int, device: torch.device) -> "SamplingScratch":
        """Scratch memory for up to max_rows rows. Raises ValueError for an unsupported vocabulary size."""
        if not 1 <= vocab_size <= MAX_VOCABULARY:
            raise ValueError(
                f"sampling takes a vocabulary of 1 to {MAX_VOCABULARY} tokens, got {vocab_size}: build with "
                'backend="reference"'
            )
        launch = choose_launch(vocab_size)

        def blocks(dtype: torch.dtype) -> Tensor:
            return torch.empty(max_rows, launch.blocks, dtype=dtype, device=device)

        return cls(
            vocab_size,
            maxima=blocks(torch.float32),
            first_ids=blocks(torch.int32),
            sums=blocks(torch.float32),
            masses=blocks(torch.float32),
            candidates=torch.empty(max_rows, launch.blocks * launch.block, dtype=torch.float32, device=device),
            counts=blocks(torch.int32),
            lowest=blocks(torch.int32),
            counters=torch.zeros(max_rows, dtype=torch.int32, device=device),
        )

    def reset(self) -> None:
        """Zero the counters. They may be nonzero after an interrupted call."""
        self.counters.zero_()

    def check(self, rows: int, vocab_size: int, device: torch.device) -> None:
        """Raise ValueError unless the scratch has this device, this vocabulary and at least `rows` rows."""
        max_rows = self.counters.shape[0]
        if self.vocab_size != vocab_size or max_rows < rows:
            raise ValueError(
                f"scratch must be for at least {rows} rows and a vocabulary of {vocab_size}, got one for {max_rows} "
                f"rows and {self.vocab_size}: make it with SamplingScratch.of"
            )
        if self.counters.device != device:
            raise ValueError(f"scratch must be on {device}, got {self.counters.device}: make it there")
