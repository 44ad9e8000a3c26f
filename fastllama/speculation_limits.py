"""What lossless speculation can gain at most, from bytes, flops and launches alone: nothing here is measured.

A step that checks k guesses reads the weights as often as a step for one token: once. It has more flops, and a few
launches more. Each guess is taken to be right with the same chance a, whatever came before. Then a row's step makes
1 + a + a² + … + aᵏ tokens. Guesses come from lookup, in one launch, or from k steps of a draft model.

A launch takes as long as its bytes or its flops, and a gap that all launches share (`LAUNCH_GAP_S`). Rows' ends, and
places where lookup finds nothing, are not counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastllama.args import ModelArgs
from fastllama.kernels.guesses import MAX_GUESSES
from fastllama.quantization import NOTHING_QUANTIZED, Scheme
from fastllama.speculation import MAX_CHECKED_TOKENS
from fastllama.speed_of_light import (
    COLLECTIVE_LATENCY_S,
    LAUNCH_GAP_S,
    DataSheet,
    Links,
    Work,
    collectives_seconds,
    decode_step,
    least_seconds,
)

# Launches beside those of the model and of sampling, as in `fastllama.speculation` and `fastllama.draft`. They move a
# few numbers of each row.
CHECKING = (Work("window", 1, 0, 0), Work("accept", 1, 0, 0))  # of a step that checks guesses
LOOK_UP = (Work("look up", 1, 0, 0),)  # of lookup, after each such step
DRAFTING = (Work("window", 1, 0, 0), Work("guess", 1, 0, 0))  # of each step of a draft model


class SharedModel(NamedTuple):
    """A model that `n_processes` share, each on a GPU of its own. A draft model is shared like its target."""

    args: ModelArgs  # of the whole model
    dtype: torch.dtype
    schemes: Mapping[str, Scheme] = NOTHING_QUANTIZED  # how weights of one process's part are quantised
    n_processes: int = 1


@dataclass(frozen=True)
class Setting:
    """What a decode step runs on, and for how many rows and cached positions."""

    gpu: DataSheet
    batch: int
    context: float  # cached positions of each row
    launch_gap: float = LAUNCH_GAP_S  # seconds between launches, an assumption
    collective_latency: float = COLLECTIVE_LATENCY_S


@dataclass(frozen=True)
class SpeculationLimits:
    """The least times of decode steps with and without guesses, in seconds, and the tokens that they make."""

    batch: int
    n_guesses: int
    plain: float  # a step without guesses
    checking: float  # a step that checks n_guesses of every row
    guessing: float  # making them
    tokens_per_step: float  # expected, of each row

    @property
    def checking_cost(self) -> float:
        """The time of a step that checks guesses, in steps without."""
        return self.checking / self.plain

    @property
    def plain_rate(self) -> float:
        """Tokens per second of all rows without speculation."""
        return self.batch / self.plain

    @property
    def rate(self) -> float:
        """Tokens per second of all rows with speculation."""
        return self.batch * self.tokens_per_step / (self.checking + self.guessing)

    @property
    def speed_up(self) -> float:
        return self.rate / self.plain_rate


def expected_tokens(acceptance: float, n_guesses: int) -> float:
    """The tokens that a row's step makes on average, if each guess is right with the chance `acceptance`.

    Raises ValueError for a chance outside of 0 to 1.
    """
    if not 0 <= acceptance <= 1:
        raise ValueError(f"acceptance is a chance from 0 to 1, got {acceptance}")
    return sum(acceptance**i for i in range(n_guesses + 1))


def speculation_limits(
    target: SharedModel, draft: SharedModel | None, setting: Setting, n_guesses: int, acceptance: float
) -> SpeculationLimits:
    """The limits where every step checks n_guesses of every row. draft: None for lookup.

    Without guesses the step is a plain one. Raises ValueError for more than MAX_GUESSES, for an acceptance outside of
    0 to 1, and for a draft model on other processes.
    """
    if not 0 <= n_guesses <= MAX_GUESSES:
        raise ValueError(f"a step checks 0 to {MAX_GUESSES} guesses, got {n_guesses}")
    if draft is not None and draft.n_processes != target.n_processes:
        raise ValueError(f"the draft model runs on {draft.n_processes} processes, the target on {target.n_processes}")
    return SpeculationLimits(
        batch=setting.batch,
        n_guesses=n_guesses,
        plain=_seconds(target, setting),
        checking=_seconds(target, setting, n_guesses + 1, CHECKING if n_guesses else ()),
        guessing=_guessing(draft, setting, n_guesses) if n_guesses else 0.0,
        tokens_per_step=expected_tokens(acceptance, n_guesses),
    )


def most_guesses(batch: int) -> int:
    """The most guesses of a row for which the tokens of all rows are few, as the kernels for few tokens need it."""
    return min(MAX_GUESSES, max(1, MAX_CHECKED_TOKENS // batch) - 1)


def best_limits(
    target: SharedModel, draft: SharedModel | None, setting: Setting, acceptance: float
) -> SpeculationLimits:
    """The limits at the number of guesses, 0 to `most_guesses`, with the most tokens per second."""
    counts = range(most_guesses(setting.batch) + 1)
    found = (speculation_limits(target, draft, setting, n_guesses, acceptance) for n_guesses in counts)
    return max(found, key=lambda limits: limits.rate)


def _guessing(draft: SharedModel | None, setting: Setting, n_guesses: int) -> float:
    """The least time of making guesses. A draft model's first step also reads the token before the newest."""
    if draft is None:
        return least_seconds(LOOK_UP, setting.gpu.machine, setting.launch_gap)
    return _seconds(draft, setting, 2, DRAFTING) + (n_guesses - 1) * _seconds(draft, setting, 1, DRAFTING)


def _seconds(model: SharedModel, setting: Setting, tokens_per_row: int = 1, others: Sequence[Work] = ()) -> float:
    """The least time of a decode step with its collectives and `others`, launches beside the model's."""
    args, dtype, schemes, n_processes = model
    share, n_tokens = args.split(n_processes), setting.batch * tokens_per_row
    step = decode_step(share, dtype, setting.batch, setting.context, schemes, tokens_per_row)
    links = Links(setting.gpu.link_bandwidth, setting.collective_latency)
    exchanging = collectives_seconds(args, dtype, n_tokens, n_processes, links)
    return least_seconds([*step, *others], setting.gpu.machine, setting.launch_gap) + exchanging
