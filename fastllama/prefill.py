"""Prefill: run the prompts of all rows through the model in one ragged pass.

The prompts' tokens are concatenated without padding and processed in chunks of a fixed number of tokens; a chunk may
end inside a prompt. Only the hidden state of each prompt's last token is kept, and turned into logits at the end. The
prompts' own log-probabilities, if requested, are computed from a few tokens' logits at a time.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastllama import threads
from fastllama.kernels.batch import RaggedBatch
from fastllama.model import Transformer
from fastllama.speculation import Guesser
from fastllama.token_scores import score_tokens

PREFILL_CHUNK_TOKENS = 2048

NOT_FINITE_CAUSE = "the weights, or their overflow in this dtype, are the likely cause"

Piece = tuple[int, int, Sequence[int]]  # row, position of its first token, tokens


def prefill(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    score: bool = False,
    n_cached: Sequence[int] | None = None,
    guesser: Guesser | None = None,
) -> tuple[Tensor, list[list[float]] | None]:
    """Fill cache rows 0, 1, … with the prompts, each from position 0. Rows get the pages that they lack.

    n_cached: how many tokens of each prompt the row's pages hold already. guesser: reads them, too. Returns
    the logits (B, V) after each prompt's last token, in the model dtype, and, with `score`, each prompt's
    log-probabilities: one per token, 0.0 for the first token, which nothing predicts.
    """
    last = torch.empty(len(prompts), model.params.dim, device=model.device, dtype=model.dtype)
    scores: list[list[float]] = [[0.0] for _ in prompts]
    batch = None
    model.cache.extend([len(prompt) for prompt in prompts])
    if guesser is not None and n_cached is not None:
        guesser.read_cached({row: prompts[row][:count] for row, count in enumerate(n_cached) if count})
    for pieces in _chunks(prompts, PREFILL_CHUNK_TOKENS, n_cached or [0] * len(prompts)):
        batch = RaggedBatch.of(pieces, model.device, model.workspace)
        with model.suited(len(batch.tokens), max(segment.keys for segment in batch.segments)):
            h = model.hidden(batch)
            if guesser is not None:
                guesser.follow(batch)
            for segment in batch.segments:
                if segment.keys == len(prompts[segment.row]):
                    last[segment.row] = h[segment.end - 1]
            if score:
                _score(model, h, batch, pieces, prompts, scores)
    if batch is None:
        raise ValueError("prefill needs at least one prompt")
    _end_library_threads(model)  # the kernels that follow may have threads of their own
    with model.suited(len(prompts), 0):
        logits = model.logits(last, batch)
    _end_library_threads(model)
    return logits, scores if score else None


def _end_library_threads(model: Transformer) -> None:
    if model.device.type == "cpu":
        threads.end_openmp_threads()


def _chunks(prompts: Sequence[Sequence[int]], limit: int, n_cached: Sequence[int]) -> Iterator[list[Piece]]:
    """Cut the concatenated prompts, without their cached tokens, into chunks of `limit` tokens: pieces of prompts."""
    pieces: list[Piece] = []
    left = limit
    for row, (prompt, start) in enumerate(zip(prompts, n_cached, strict=True)):
        while start < len(prompt):
            piece = prompt[start : start + left]
            pieces.append((row, start, piece))
            start += len(piece)
            left -= len(piece)
            if left == 0:
                yield pieces
                pieces, left = [], limit
    if pieces:
        yield pieces


def _score(
    model: Transformer,
    h: Tensor,
    batch: RaggedBatch,
    pieces: list[Piece],
    prompts: Sequence[Sequence[int]],
    scores: list[list[float]],
) -> None:
    """Append to the scores the log-probability of each token that follows a token of this chunk."""
    targets = [(row, t) for row, start, piece in pieces for t in prompts[row][start + 1 : start + 1 + len(piece)]]
    ends = {s.end - 1 for s in batch.segments if s.keys == len(prompts[s.row])}  # nothing follows a prompt's last token
    sources = [token for token in range(h.shape[0]) if token not in ends]
    found = score_tokens(model, h, batch, sources, [token for _, token in targets])
    for (row, _), score in zip(targets, found, strict=True):
        if math.isnan(score.logprob):
            raise ValueError(f"the logits of row {row} are not finite numbers in its prompt; {NOT_FINITE_CAUSE}")
        scores[row].append(score.logprob)
