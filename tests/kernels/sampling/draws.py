"""Shared by the sampling tests: Meta's rule in float64, an oracle for single draws, and chi-square."""

import math

import torch
from torch import Tensor

from fastllama.benchmarks.near_ties import BOUNDARY_MASS
from fastllama.kernels.batch import SamplingTensors
from fastllama.kernels.sampling.philox import uniform

STREAMS = 65536  # number of streams that `stream_near` searches
MIN_EXPECTED = 5  # expected draws per cell of a chi-square


def sampling(
    temperature: list[float], top_p: list[float], streams: list[tuple[int, int, int]], device: torch.device
) -> SamplingTensors:
    """Parameters per row. A single temperature or top_p is used for all rows. streams: (seed, stream, call) per row."""
    rows = len(streams)
    params = SamplingTensors.of(1.0, 1.0, streams, device)
    wide = [torch.tensor(values, dtype=torch.float64).expand(rows).contiguous() for values in (temperature, top_p)]
    return SamplingTensors(
        wide[0].to(device), wide[1].to(device), params.seed, params.stream, params.call, greedy=False
    )


def rows_of(params: SamplingTensors, rows: Tensor) -> SamplingTensors:
    """The parameters of these rows."""
    temperature, top_p, seed, stream, call = (
        part[rows].contiguous() for part in (params.temperature, params.top_p, params.seed, params.stream, params.call)
    )
    return SamplingTensors(temperature, top_p, seed, stream, call, greedy=False)


def numbers_drawn(params: SamplingTensors, positions: Tensor) -> list[float]:
    """The random number in [0, 1) of each row."""
    drawn: list[float] = uniform(params.seed, params.stream, params.call, positions).tolist()
    return drawn


def stream_near(u: float, seed: int = 0) -> tuple[int, int, int]:
    """The (seed, stream, call) whose random number at position 0 is nearest to u."""
    zero = torch.zeros(STREAMS, dtype=torch.int64)
    drawn = uniform(zero + seed, torch.arange(STREAMS), zero, zero)
    return seed, int((drawn - u).abs().argmin()), 0


def metas_distribution(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Meta's sample_top_p in float64 for one row (V,): drops tokens with more than top_p before them, renormalizes."""
    probs = torch.softmax(logits.double().cpu() / temperature, -1)
    ordered, ids = probs.sort(descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    assert float((before - top_p).abs().min()) > BOUNDARY_MASS, (
        "a token is too close to the top_p boundary for float32: choose another top_p"
    )
    ordered[before > top_p] = 0.0
    return torch.zeros_like(probs).scatter(-1, ids, ordered / ordered.sum())


def assert_follows(counts: Tensor, distribution: Tensor) -> None:
    """Assert that counts (V,) of draws fit a distribution (V,): none outside its support, chi-square within 4 sigma."""
    counts, draws = counts.double().cpu(), int(counts.sum())
    assert int(counts[distribution == 0].sum()) == 0, "tokens were drawn that top-p drops"
    expected = distribution * draws
    large = expected >= MIN_EXPECTED
    cells = [(counts[large], expected[large])]
    if bool((~large).any()) and float(expected[~large].sum()) > 0:
        cells.append((counts[~large].sum()[None], expected[~large].sum()[None]))
    observed, wanted = (torch.cat(parts) for parts in zip(*cells, strict=True))
    statistic, freedom = float(((observed - wanted) ** 2 / wanted).sum()), len(wanted) - 1
    assert freedom > 0, "a chi-square needs two cells"
    # Wilson and Hilferty: the cube root of chi-square / degrees of freedom is nearly normally distributed.
    spread = 2 / (9 * freedom)
    limit = freedom * (1 - spread + 4 * math.sqrt(spread)) ** 3
    assert statistic < limit, f"chi-square {statistic:.1f} with {freedom} degrees of freedom, limit {limit:.1f}"
