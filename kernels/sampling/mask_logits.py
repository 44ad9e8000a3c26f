"""Masks of tokens over the logits, before they are sampled: `masks.mask_logits` in one launch.

    logits[b, t] = -inf     where bit t % 32 of words[b, t // 32] is 0, if row b is active and has a mask

logits (B, V) in the model dtype, words (B, ceil(V / 32)) int32, has_mask (B,) bool, positions (B,) int64. For each row
that has a mask, moves its V / 8 bytes, and reads and writes V logits. Programs of other rows return at once.

The logits were written by the launch before and are read by the next one, so they are in L2. A program loads its block
and stores it again, in accesses of 16 bytes: to store -inf alone would take one narrow store for each logit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllama.kernels.launch.checks import check_model_dtype, check_tensor
from fastllama.kernels.launch.dependent import dependent_launch, wait_for_inputs
from fastllama.kernels.launch.sizes import ceil_div
from fastllama.kernels.sampling.masks import WORD_BITS, TokenMasks, n_words
from fastllama.kernels.sampling.scratch import choose_launch

BITS = tl.constexpr(WORD_BITS)


@triton.jit(do_not_specialize_on_alignment=["has_mask_ptr", "positions_ptr"])
def _mask_logits_kernel(
    logits_ptr,
    words_ptr,
    has_mask_ptr,
    positions_ptr,
    V: tl.constexpr,
    W: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    wait_for_inputs(DEPENDENT)
    row, block = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(0) % BLOCKS
    if tl.load(has_mask_ptr + row).to(tl.int1) & (tl.load(positions_ptr + row) >= 0):
        at = block * BLOCK_W + tl.arange(0, BLOCK_W)
        words = tl.load(words_ptr + row * W + at, mask=at < W, other=0)
        bits = tl.arange(0, BITS)
        ids = at[:, None] * BITS + bits[None, :]
        is_allowed = ((words[:, None] >> bits[None, :]) & 1) != 0
        x = tl.load(logits_ptr + row * V + ids, mask=ids < V, other=float("-inf"))
        tl.store(logits_ptr + row * V + ids, tl.where(is_allowed, x, float("-inf")), mask=ids < V)


def mask_logits(logits: Tensor, masks: TokenMasks, positions: Tensor) -> None:
    """Write -inf over the logits (B, V) that the masks do not allow. Rows at negative positions (B,) stay as they are.

    Raises ValueError if tensors do not match.
    """
    check_model_dtype("logits", logits)
    check_tensor("logits", logits, ("B", "V"), logits.dtype, logits.device)
    rows, vocab_size = logits.shape
    check_tensor("masks.words", masks.words, (rows, n_words(vocab_size)), torch.int32, logits.device)
    check_tensor("masks.has_mask", masks.has_mask, (rows,), torch.bool, logits.device)
    check_tensor("positions", positions, (rows,), torch.int64, logits.device)
    if not rows:
        return
    launch = choose_launch(vocab_size)
    block = launch.block // WORD_BITS
    blocks = ceil_div(n_words(vocab_size), block)
    _mask_logits_kernel[(rows * blocks,)](
        logits,
        masks.words,
        masks.has_mask,
        positions,
        V=vocab_size,
        W=n_words(vocab_size),
        BLOCKS=blocks,
        BLOCK_W=block,
        num_warps=launch.warps,
        **dependent_launch(),
    )
