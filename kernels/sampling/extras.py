"""The end of a decode step that needs more than a draw: controls (`controls.py`), masks of tokens (`masks.py`), or the
most likely tokens as output.

Plain torch on any device, and an op of the backend for the masks; with static shapes and without a value on the host,
so that a graph can capture it. Log-probabilities that are wanted stay those of the model, before controls and masks.
"""

from typing import Any

import torch
from torch import Tensor

from fastllama.kernels.batch import Workspace
from fastllama.kernels.decode_state import DecodeState
from fastllama.kernels.sampling.controls import LogitControls, TopTokens
from fastllama.kernels.sampling.masks import TokenMasks


def controlled(logits: Tensor, state: DecodeState, controls: LogitControls) -> Tensor:
    """The logits (B, V) after the controls, in float32: small penalties would vanish in the model dtype.

    Counts each row's newest token if it was generated.
    """
    counts = controls.counts
    is_generated = (state.positions >= state.starts)[:, None]
    counts.scatter_add_(1, state.tokens[:, None], is_generated.to(counts.dtype))
    x = logits.float()
    r = controls.repetition[:, None]
    x = torch.where(controls.in_prompt | (counts > 0), torch.where(x > 0, x / r, x * r), x)
    x = x - controls.presence[:, None] * (counts > 0) - controls.frequency[:, None] * counts + controls.bias
    too_early = (state.positions + 1 < controls.min_position)[:, None]
    x = x.masked_fill(state.is_stop & too_early, -torch.inf)
    distance = state.sampling.temperature.float() * controls.min_p.log()  # -inf: every token is near enough
    least = x.amax(-1, keepdim=True) + torch.where(controls.min_p > 0, distance, -torch.inf)[:, None]
    k = torch.where(controls.top_k > 0, controls.top_k, x.shape[1]).clamp(max=x.shape[1])
    kth = x.sort(dim=-1, descending=True).values.gather(-1, k[:, None] - 1)
    return x.masked_fill(x < torch.maximum(least, kth), -torch.inf)


def sample_with_extras(
    ops: Any,
    logits: Tensor,
    state: DecodeState,
    workspace: Workspace | None,
    *,
    controls: LogitControls | None = None,
    top: TopTokens | None = None,
    masks: TokenMasks | None = None,
    scores: bool = False,
) -> None:
    """`ops.sample_and_advance` of logits (B, V), which `masks` changes, with extras.

    controls, masks: applied before the draw, masks first, so that top-k and min-p keep tokens that are allowed. top:
    space for the most likely tokens. scores: the log-probabilities are those of `logits` as they came in; they are so
    anyway with controls, and in rows without a mask.
    """

    def draw() -> None:
        if masks:
            ops.mask_logits(logits, masks, state.positions)
        ops.sample_and_advance(controlled(logits, state, controls) if controls else logits, state, workspace)

    if not (controls or top or scores):
        draw()
        return
    running, rows = state.positions >= 0, state.rows
    step = torch.where(running, state.positions + 1 - state.starts, 0) % state.out_tokens.shape[0]
    of_model = torch.log_softmax(logits.float(), dim=-1)
    draw()
    if controls or scores:
        tokens, logprobs = state.out_tokens[step, rows], state.out_logprobs[step, rows]
        chosen = of_model.gather(-1, tokens.clamp(min=0)[:, None])[:, 0]
        state.out_logprobs[step, rows] = torch.where(running & (tokens >= 0), chosen, logprobs)
    if top:
        values, ids = of_model.topk(top.ids.shape[2], dim=-1)
        for out, new in ((top.ids, ids), (top.logprobs, values)):
            out[step, rows] = torch.where(running[:, None], new, out[step, rows])
