"""Log-probabilities of tokens that are known: of prompts, and of continuations that are scored.

The logits of a few tokens at a time are in memory: those of a long prompt over a large vocabulary would be gigabytes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastllama.kernels.batch import RaggedBatch, upload
from fastllama.model import Transformer

SCORE_CHUNK_TOKENS = 256  # tokens whose logits are in memory at once


class TokenScore(NamedTuple):
    """How likely a token was at its place."""

    logprob: float  # NaN if the logits are not numbers
    is_greedy: bool  # whether it is the most likely token
    top: list[tuple[int, float]]  # the most likely tokens, with their log-probabilities


def score_tokens(
    model: Transformer, h: Tensor, batch: RaggedBatch, sources: Sequence[int], targets: Sequence[int], n_top: int = 0
) -> list[TokenScore]:
    """Score each target as the token that follows h[source]: h (N, dim), the batch's hidden states.

    n_top: how many of the most likely tokens each score lists.
    """
    scores: list[TokenScore] = []
    for begin in range(0, len(sources), SCORE_CHUNK_TOKENS):
        part = slice(begin, begin + SCORE_CHUNK_TOKENS)
        at, following = upload([list(sources[part]), list(targets[part])], torch.int64, h.device)
        logprobs = torch.log_softmax(model.logits(h[at], batch).float(), dim=-1)
        chosen = logprobs.gather(-1, following[:, None])[:, 0].tolist()
        best = logprobs.argmax(-1).tolist()
        top_logprobs, top_ids = (found.tolist() for found in logprobs.topk(n_top, dim=-1))
        for target, logprob, first, ids, values in zip(targets[part], chosen, best, top_ids, top_logprobs, strict=True):
            scores.append(TokenScore(logprob, target == first, list(zip(ids, values, strict=True))))
    return scores
