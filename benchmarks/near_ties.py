"""Where two answers part: at a near tie, which rounding of the logits decides, or at a real difference."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastllama.generation import Llama
from fastllama.kernels.sampling.philox import uniform

BOUNDARY_MASS = 1e-6  # float32 sums are reliable at least this far from a boundary, relative to the total mass
# Between kernels that add in other orders, in float32: of logits, and of the probability below a token.
LOGIT_MARGIN, MASS_MARGIN = 2e-4, 1e-4


class Parting(NamedTuple):
    """The first different token of a row."""

    row: int
    token: int  # its number in the answer
    is_near_tie: bool  # by float32's margins


def possible_tokens(
    logits: Tensor, temperature: float, top_p: float, u: float, mass: float = BOUNDARY_MASS
) -> set[int]:
    """The tokens that u may select from one row (V,) if rounding moves a boundary by at most `mass`."""
    x = logits.double().cpu().numpy()
    with np.errstate(over="ignore"):
        masses = np.exp((x - x.max()) / temperature)
    order = np.argsort(-x, kind="stable")
    before, total = np.cumsum(masses[order]) - masses[order], masses.sum()
    tokens = set()
    for move in (-mass, 0.0, mass):
        kept = order[before <= max((top_p + move) * total, 0.0)] if top_p < 1 else order
        lowest = x[kept].min()
        sequence = np.concatenate([np.sort(kept[x[kept] > lowest]), np.sort(kept[x[kept] == lowest])])
        running = np.cumsum(masses[sequence])
        for shift in (-mass, 0.0, mass):
            place = np.searchsorted(running, max(u + shift, 0.0) * running[-1], side="right")
            tokens.add(int(sequence[min(place, len(sequence) - 1)]))
    return tokens


def partings(
    llm: Llama,
    prompts: Sequence[Sequence[int]],
    ours: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    *,
    temperature: float,
    top_p: float,
    seeds: Sequence[int],
) -> list[Parting]:
    """Where answers part from the expected ones. seeds: of the rows, given to `generate` as a list."""
    found = []
    for row, (prompt, one, other, seed) in enumerate(zip(prompts, ours, expected, seeds, strict=True)):
        if list(one) == list(other):
            continue
        at = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
        if at is None:  # a stop token is not in the answer
            at = min(len(one), len(other))
        tokens = {answer[at] for answer in (one, other) if at < len(answer)}
        tokens |= llm.tokenizer.stop_tokens if len(tokens) == 1 else set()
        found.append(Parting(row, at, _is_near(llm, [*prompt, *one[:at]], tokens, temperature, top_p, seed)))
    return found


def _is_near(llm: Llama, context: Sequence[int], tokens: set[int], temperature: float, top_p: float, seed: int) -> bool:
    """Whether at least two of these tokens may come next."""
    logits = llm.model.forward(torch.tensor([context]), 0)[0, -1]
    if temperature == 0 or top_p == 0:
        near = set((logits > logits.max() - LOGIT_MARGIN).nonzero()[:, 0].tolist())
    else:
        zero = torch.zeros(1, dtype=torch.int64)
        u = float(uniform(zero + seed, zero, zero, zero + len(context)))
        near = possible_tokens(logits, temperature, top_p, u, MASS_MARGIN)
    return len(tokens & near) > 1
