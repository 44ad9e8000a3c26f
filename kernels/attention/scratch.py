"""Scratch memory of decode attention: the partial results of splits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastllama.kernels.attention.online_softmax import AttentionDims

NUM_SPLITS = 32  # with Llama 3's 8 kv heads: 256 programs, two per multiprocessor of the largest GPUs


@dataclass(frozen=True)
class AttentionScratch:
    """Partial results of rows in several splits, flat: a call takes as many as it needs, in its own order.

    A call has up to max_rows rows of up to max_tokens_per_row tokens S, and up to max_tokens in all.
    """

    acc: Tensor  # (partial results, D) float32: sums of p · v, not normalized
    score_max: Tensor  # (partial results,) float32: largest score, times log2(e)
    p_sum: Tensor  # (partial results,) float32: sums of p
    counters: Tensor  # (max_tokens · H,) int32: finished splits of a row, per tile of queries; zero between calls
    heads: tuple[int, int, int]  # K, G, D
    num_splits: int  # the most of one row. All rows together have at most num_splits + rows
    max_rows: int
    max_tokens_per_row: int
    max_tokens: int

    @classmethod
    def of(
        cls,
        max_rows: int,
        n_kv_heads: int,
        n_heads: int,
        head_dim: int,
        device: torch.device,
        num_splits: int | None = None,
        max_tokens_per_row: int = 1,
        max_tokens: int | None = None,
    ) -> "AttentionScratch":
        """Scratch memory for decode steps.

        num_splits: a power of two, default NUM_SPLITS. max_tokens: default max_rows · max_tokens_per_row.
        """
        splits, tokens = num_splits or NUM_SPLITS, max_tokens or max_rows * max_tokens_per_row
        row_tokens = ((rows, min(max_tokens_per_row, tokens // rows)) for rows in range(1, max_rows + 1))
        n_results = n_heads * max(((splits + rows) * size for rows, size in row_tokens), default=0)
        return cls(
            torch.empty(n_results, head_dim, dtype=torch.float32, device=device),
            torch.empty(n_results, dtype=torch.float32, device=device),
            torch.empty(n_results, dtype=torch.float32, device=device),
            torch.zeros(tokens * n_heads, dtype=torch.int32, device=device),
            (n_kv_heads, n_heads // n_kv_heads, head_dim),
            splits,
            max_rows,
            max_tokens_per_row,
            tokens,
        )

    def reset(self) -> None:
        """Zero the counters. They may be nonzero after an interrupted call."""
        self.counters.zero_()

    def check(self, n_rows: int, dims: AttentionDims, device: torch.device) -> None:
        """Raise ValueError unless the scratch has this device, these heads and at least these rows and tokens."""
        heads, size = (dims.n_kv_heads, dims.groups, dims.head_dim), dims.tokens_per_row
        fits = n_rows <= self.max_rows and size <= self.max_tokens_per_row and n_rows * size <= self.max_tokens
        if self.heads != heads or not fits:
            raise ValueError(
                f"scratch must be for at least {n_rows} rows of {size} tokens and (K, G, D) = {heads}, got one for "
                f"{self.max_rows} rows of {self.max_tokens_per_row} tokens, {self.max_tokens} in all, and "
                f"{self.heads}: make it with AttentionScratch.of"
            )
        if self.acc.device != device:
            raise ValueError(f"scratch must be on {device}, got {self.acc.device}: make it there")
