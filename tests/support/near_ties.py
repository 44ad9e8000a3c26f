"""Whether two answers part at a near tie: where rounding of the logits decides which token comes next."""

from collections.abc import Sequence

import torch

from fastllama import Llama
from fastllama.kernels.sampling.philox import uniform
from tests.kernels.sampling.draws import possible_tokens

LOGIT_MARGIN = 1e-3  # float32 logits of the same tokens, by other kernels, differ by less


def count_near_ties(
    llm: Llama,
    prompts: Sequence[Sequence[int]],
    found: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    *,
    temperature: float,
    top_p: float,
    seeds: Sequence[int],
) -> int:
    """How many answers part at a near tie. Fails for one that parts elsewhere. seeds: of each row, in a list."""
    count = 0
    for prompt, ours, theirs, seed in zip(prompts, found, expected, seeds, strict=True):
        if list(ours) == list(theirs):
            continue
        at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
        assert at is not None, f"one answer ends early: {len(ours)} and {len(theirs)} tokens"
        logits = llm.model.forward(torch.tensor([[*prompt, *ours[:at]]]), 0)[0, -1]
        if temperature == 0:
            margin = float(logits.max() - min(logits[ours[at]], logits[theirs[at]]))
            assert margin < LOGIT_MARGIN, f"token {at} differs by {margin} in its logits"
        else:
            position = torch.tensor([len(prompt) + at])
            u = float(uniform(torch.tensor([seed]), torch.tensor([0]), torch.tensor([0]), position))
            near = possible_tokens(logits, temperature, top_p, u)
            assert {ours[at], theirs[at]} <= near, f"token {at} differs, and is no near tie"
        count += 1
    return count
