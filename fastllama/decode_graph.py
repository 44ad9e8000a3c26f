"""The decode step: one token for every row, with all that it reads and writes on the device.

`DecodeState` names every tensor of the step: embed → layers → logits → sample → write the token and its log-probability
→ stop test → advance. What a row's tensors hold never decides what Python does, so that a graph can hold the step. The
host counts along how long the rows are (an eager backend reads no more of the cache than that) and reads what was
written.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastllama.kernels.ragged import Ragged, Sampling, Segment
from fastllama.model import Transformer

NO_TOKEN = -1  # what `sample` gives a row whose logits are not numbers


@dataclass(frozen=True)
class DecodeState:
    """Static tensors of B rows; row i is cache row i."""

    rows: Tensor  # (B,) int64: 0, 1, …
    tokens: Tensor  # (B,) int64, the newest token of each row, next to be fed
    positions: Tensor  # (B,) int64, where it stands
    last: Tensor  # (B,) int64, the last position that may get a token
    finished: Tensor  # (B,) bool
    stop_ids: Tensor  # (S,) int64
    sampling: Sampling
    out_tokens: Tensor  # (B, T + 1) int64 by position; a row whose prompt fills all T has a place to write to, too
    out_logprobs: Tensor  # (B, T + 1) float32

    @classmethod
    def of(
        cls,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        last: Sequence[int],
        stop_ids: Sequence[int],
        sampling: Sampling,
    ) -> "DecodeState":
        """Right after prefill: each row stands on its prompt's last token and may write up to position `last`."""
        device = model.device
        ends = [[prompt[-1], len(prompt) - 1, limit] for prompt, limit in zip(prompts, last, strict=True)]
        tokens, positions, limits = torch.tensor(ends, dtype=torch.int64, device=device).T.contiguous()
        shape = (len(prompts), model.cache.max_seq_len + 1)
        return cls(
            rows=torch.arange(len(prompts), device=device),
            tokens=tokens,
            positions=positions,
            last=limits,
            finished=positions >= limits,
            stop_ids=torch.tensor(list(stop_ids), dtype=torch.int64, device=device),
            sampling=sampling,
            out_tokens=torch.full(shape, NO_TOKEN, dtype=torch.int64, device=device),
            out_logprobs=torch.zeros(shape, dtype=torch.float32, device=device),
        )

    def read(self, positions: Sequence[int]) -> tuple[list[int], list[float]]:
        """The token and log-probability that each row wrote at its position. Waits for the device."""
        at = torch.tensor(positions, device=self.tokens.device)[:, None]
        return self.out_tokens.gather(1, at)[:, 0].tolist(), self.out_logprobs.gather(1, at)[:, 0].tolist()


def step(model: Transformer, state: DecodeState, lengths: Sequence[int]) -> None:
    """Feed every row's newest token and choose the next. lengths are the rows' own, that token included."""
    batch = Ragged(
        tokens=state.tokens,
        positions=state.positions,
        rows=state.rows,
        segments=tuple(Segment(row, row, row + 1, length) for row, length in enumerate(lengths)),
        workspace=model.workspace,
    )
    choose(model, state, model.logits(model.hidden(batch), batch))


def choose(model: Transformer, state: DecodeState, logits: Tensor) -> None:
    """The second half of a step: from logits (B, V) to the rows' next tokens, written out and ready to be fed.

    A row that is finished, or becomes so, stays where it is: it is fed again what it was fed before, and writes
    nothing.
    """
    following = state.positions + 1
    tokens, logprobs = model.ops.sample(logits, state.sampling, following, model.workspace)
    running = ~state.finished
    at = following[:, None]
    state.out_tokens.scatter_(1, at, torch.where(running[:, None], tokens[:, None], state.out_tokens.gather(1, at)))
    state.out_logprobs.scatter_(
        1, at, torch.where(running[:, None], logprobs[:, None], state.out_logprobs.gather(1, at))
    )
    stopped = (tokens[:, None] == state.stop_ids).any(-1) | (tokens == NO_TOKEN)
    state.finished.logical_or_(stopped | (following >= state.last))
    advances = ~state.finished
    state.tokens.copy_(torch.where(advances, tokens, state.tokens))
    state.positions.add_(advances)
