"""Temperature and top_p at the ends of their ranges: both backends draw as the limit requires."""

from itertools import product

import pytest
import torch

from fastllama.kernels import fused, reference
from fastllama.kernels.batch import PER_ROW, SamplingTensors
from tests.support.tiers import parameters

VOCABULARY = 70
TINY = (1e-39, 1e-310, 5e-324)
TOP_P = (1.0, 0.5, 5e-324)
HUGE = (1e37, 1e39, 1e300, 1.7e308)
STREAMS = 8
NO_TOKEN = -1
inf, nan = float("inf"), float("nan")

# (logits, ids of the largest)
LARGEST: dict[str, tuple[list[float], list[int]]] = {
    "one": ([0.0, 1.0, 5.0, 2.0], [2]),
    "ties": ([1.0, 5.0, 5.0, 0.0, 5.0], [1, 2, 4]),
    "masked": ([-inf, 3.0, -inf, 3.0], [1, 3]),
    "near": ([1.0, 1.0000001, 1.0, 1.0], [1]),
    "far-apart": ([-3e38, 3e38, 1e38, 3e38], [1, 3]),
    "zeros": ([0.0, -0.0, -1.0], [0, 1]),
}


def drawn(
    rows: list[list[float]], pairs: list[tuple[float, float]], device: torch.device, n: int
) -> list[list[set[int]]]:
    """The tokens that each backend draws, n times from each row's logits. All other tokens have far smaller logits."""
    x = torch.tensor([row + [-60.0] * (VOCABULARY - len(row)) for row in rows for _ in range(n)], device=device)
    each = [SamplingTensors.of(*pair, [(11, stream, 0) for stream in range(n)], device) for pair in pairs]
    parts = {name: torch.cat([getattr(one, name) for one in each]) for name in PER_ROW}
    positions = torch.arange(x.shape[0], device=device)
    found = []
    for op in (reference.sample, fused.sample):
        tokens = op(x, SamplingTensors(**parts, greedy=False), positions)[0].view(-1, n).tolist()
        found.append([set(row) for row in tokens])
    return found


@pytest.mark.parametrize("name", parameters({name: name for name in LARGEST}, ("ties", "masked", "far-apart")))
def test_a_tiny_temperature_draws_among_the_largest(name: str, device: torch.device) -> None:
    logits, largest = LARGEST[name]
    pairs = list(product(TINY, TOP_P))
    by_reference, by_kernel = drawn([logits] * len(pairs), pairs, device, STREAMS)
    assert by_reference == by_kernel
    for top_p in TOP_P:
        # Of n equal logits, those with at most top_p of the mass before them are kept.
        kept = {token for place, token in enumerate(largest) if place <= top_p * len(largest)}
        found = [tokens for (_, mass), tokens in zip(pairs, by_kernel, strict=True) if mass == top_p]
        assert set.union(*found) == kept and all(len(tokens) > 1 or len(kept) == 1 for tokens in found)


def test_a_huge_temperature_draws_uniformly(device: torch.device) -> None:
    pairs = list(product(HUGE, (1.0, 0.5)))
    by_reference, by_kernel = drawn([[5.0, 1.0]] * len(pairs), pairs, device, STREAMS)
    assert by_reference == by_kernel
    assert all(len(tokens) > 2 for tokens in by_kernel)


def test_nan_and_infinite_logits_give_no_token(device: torch.device) -> None:
    pairs = list(product((5e-324, 1e300), (1.0, 0.5)))
    for logits in ([inf, 1.0], [nan, 1.0]):
        for found in drawn([logits] * len(pairs), pairs, device, 1):
            assert found == [{NO_TOKEN}] * len(pairs)


def test_backends_agree_on_seeds_at_the_ends_of_their_range(device: torch.device) -> None:
    logits = torch.zeros(4, VOCABULARY, device=device)
    streams = [(0, 0, 0), (2**63 - 1, 0, 0), (2**63, 0, 0), (2**64 - 1, 0, 0)]
    params, positions = SamplingTensors.of(1.0, 1.0, streams, device), torch.zeros(4, dtype=torch.int64, device=device)
    expected = reference.sample(logits, params, positions)[0].tolist()
    assert fused.sample(logits, params, positions)[0].tolist() == expected and len(set(expected)) > 1
