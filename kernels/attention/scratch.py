"""Scratch memory of decode attention: the partial results of splits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastllama.kernels.attention.online_softmax import AttentionDims

NUM_SPLITS = 32  # with Llama 3's 8 kv heads: 256 programs, two per multiprocessor of the largest GPUs


@dataclass(frozen=True)
class AttentionScratch:
    """Partial results of rows in several splits, for up to max_rows rows."""

    acc: Tensor  # (num_splits + max_rows, K, G, D) float32: sums of p · v, not normalized
    score_max: Tensor  # (num_splits + max_rows, K, G) float32: largest score, times log2(e)
    p_sum: Tensor  # (num_splits + max_rows, K, G) float32: sums of p
    counters: Tensor  # (max_rows, H) int32: finished splits of a row, per tile of heads; zero between calls

    @classmethod
    def of(
        cls,
        max_rows: int,
        n_kv_heads: int,
        n_heads: int,
        head_dim: int,
        device: torch.device,
        num_splits: int | None = None,
    ) -> "AttentionScratch":
        """Scratch memory for decode steps of up to max_rows rows. num_splits: a power of two, default NUM_SPLITS."""
        shape = ((num_splits or NUM_SPLITS) + max_rows, n_kv_heads, n_heads // n_kv_heads)
        return cls(
            torch.empty(*shape, head_dim, dtype=torch.float32, device=device),
            torch.empty(*shape, dtype=torch.float32, device=device),
            torch.empty(*shape, dtype=torch.float32, device=device),
            torch.zeros(max_rows, n_heads, dtype=torch.int32, device=device),
        )

    @property
    def num_splits(self) -> int:
        """The most splits of one row. All rows together have at most num_splits + rows."""
        return self.acc.shape[0] - self.counters.shape[0]

    def reset(self) -> None:
        """Zero the counters. They may be nonzero after an interrupted call."""
        self.counters.zero_()

    def check(self, n_rows: int, dims: AttentionDims, device: torch.device) -> None:
        """Raise ValueError unless the scratch has this device, these heads and at least n_rows rows."""
        heads = (dims.n_kv_heads, dims.groups, dims.head_dim)
        if tuple(self.acc.shape[1:]) != heads or self.counters.shape[0] < n_rows:
            got = (self.counters.shape[0], *self.acc.shape[1:])
            raise ValueError(
                f"scratch must be for at least {n_rows} rows and (K, G, D) = {heads}, got one for {got[0]} rows and "
                f"{got[1:]}: make it with AttentionScratch.of"
            )
        if self.acc.device != device:
            raise ValueError(f"scratch must be on {device}, got {self.acc.device}: make it there")
