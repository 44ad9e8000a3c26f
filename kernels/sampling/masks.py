"""Which tokens a row may draw next, where a grammar says so.

    logits[b, t] = -inf     where token t is not allowed in row b, if the row is active and has a mask

A mask has a bit per token, so a row of 128,256 tokens has 16 KB. The host writes it before the step that draws from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastllama.kernels.batch import upload

WORD_BITS = 32


@dataclass(frozen=True)
class TokenMasks:
    """The masks of B rows, of W = ceil(V / 32) words."""

    words: Tensor  # (B, W) int32; bit t % 32 of word t // 32: token t is allowed
    has_mask: Tensor  # (B,) bool; a row without a mask may draw every token

    @classmethod
    def of(cls, n_rows: int, vocab_size: int, device: torch.device) -> "TokenMasks":
        """Rows without a mask."""
        words = torch.zeros(n_rows, n_words(vocab_size), dtype=torch.int32, device=device)
        return cls(words, torch.zeros(n_rows, dtype=torch.bool, device=device))

    @property
    def tensors(self) -> list[Tensor]:
        """Both tensors; the first dimension of each is the rows."""
        return [self.words, self.has_mask]

    def first(self, n_rows: int) -> "TokenMasks":
        """The first n_rows rows, sharing memory."""
        return TokenMasks(self.words[:n_rows], self.has_mask[:n_rows])

    def set_rows(self, rows: Sequence[int], masks: Sequence[Tensor]) -> None:
        """Give these rows masks, (W,) int32 on the CPU each. Does not wait for the device."""
        device = self.words.device
        index, words = upload(list(rows), torch.int64, device), torch.stack(list(masks))
        if device.type == "cuda":
            words = words.pin_memory()
        self.words.index_copy_(0, index, words.to(device, non_blocking=True))
        self.has_mask.index_fill_(0, index, True)

    def clear_rows(self, rows: Sequence[int]) -> None:
        """These rows have no masks any more."""
        self.has_mask.index_fill_(0, upload(list(rows), torch.int64, self.words.device), False)


def n_words(vocab_size: int) -> int:
    """The words of a mask, W."""
    return -(-vocab_size // WORD_BITS)


def allowed_tokens(words: Tensor, vocab_size: int) -> Tensor:
    """Masks (..., W) as (..., V) bool."""
    bits = words[..., None] >> torch.arange(WORD_BITS, dtype=torch.int32, device=words.device) & 1
    return bits.flatten(-2)[..., :vocab_size].bool()


def mask_logits(logits: Tensor, masks: TokenMasks, positions: Tensor) -> None:
    """Write -inf over the logits (B, V) that the masks do not allow. Rows at negative positions (B,) stay as they are.

    The shapes do not depend on the masks, so that a graph can capture it.
    """
    is_masked = masks.has_mask & (positions >= 0)
    logits.masked_fill_(is_masked[:, None] & ~allowed_tokens(masks.words, logits.shape[1]), -torch.inf)


def mask_logits_of_rows(logits: Tensor, masks: TokenMasks, positions: Tensor) -> None:
    """`mask_logits` that touches only the rows it changes: for a CPU, where looking at them costs nothing."""
    for row in (masks.has_mask & (positions >= 0)).nonzero().flatten().tolist():
        logits[row].masked_fill_(~allowed_tokens(masks.words[row], logits.shape[1]), -torch.inf)
