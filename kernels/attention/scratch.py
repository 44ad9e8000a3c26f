"""The memory in which the programs of decode attention hand over to each other."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastllama.kernels.attention.tile import AttentionDims

SPLITS = 32  # with the 8 kv heads of every Llama 3: 256 programs, two for each multiprocessor of the largest GPUs


@dataclass(frozen=True)
class AttentionScratch:
    """What the programs of a row in several pieces hand to the last of them, for up to max_rows rows."""

    mixed: Tensor  # (slots + max_rows, K, G, D) float32: sums of p · v
    maxima: Tensor  # (slots + max_rows, K, G) float32: of the scores, in powers of two
    totals: Tensor  # (slots + max_rows, K, G) float32: sums of p
    counters: Tensor  # (max_rows, H) int32: pieces done, one for each tile of heads; zero between calls

    @classmethod
    def of(
        cls,
        max_rows: int,
        n_kv_heads: int,
        n_heads: int,
        head_dim: int,
        device: torch.device,
        slots: int | None = None,
    ) -> "AttentionScratch":
        """Scratch memory for decode steps of up to max_rows rows. slots: a power of two, in place of SPLITS."""
        shape = ((slots or SPLITS) + max_rows, n_kv_heads, n_heads // n_kv_heads)
        return cls(
            torch.empty(*shape, head_dim, dtype=torch.float32, device=device),
            torch.empty(*shape, dtype=torch.float32, device=device),
            torch.empty(*shape, dtype=torch.float32, device=device),
            torch.zeros(max_rows, n_heads, dtype=torch.int32, device=device),
        )

    @property
    def slots(self) -> int:
        """To which all rows' pieces are dealt, besides one for each row."""
        return self.mixed.shape[0] - self.counters.shape[0]

    def reset(self) -> None:
        """Zero the counters, which a call that was broken off leaves behind."""
        self.counters.zero_()

    def check(self, n_rows: int, dims: AttentionDims, device: torch.device) -> None:
        """ValueError unless this is on the device, of the same heads, and for as many rows."""
        heads = (dims.n_kv_heads, dims.groups, dims.head_dim)
        if tuple(self.mixed.shape[1:]) != heads or self.counters.shape[0] < n_rows:
            got = (self.counters.shape[0], *self.mixed.shape[1:])
            raise ValueError(
                f"scratch must be for at least {n_rows} rows and (K, G, D) = {heads}, got one for {got[0]} rows and "
                f"{got[1:]}: make it with AttentionScratch.of"
            )
        if self.mixed.device != device:
            raise ValueError(f"scratch must be on {device}, got {self.mixed.device}: make it there")
