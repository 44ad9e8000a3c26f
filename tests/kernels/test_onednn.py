"""oneDNN's matrix product: equal to torch's for any number of tokens, with few compiled kernels."""

import pytest
import torch

from fastllama.kernels import onednn
from tests.kernels.cases import random


@pytest.mark.parametrize("n_tokens", [1, 64, 65, 77, 301])
def test_linear_equals_torch(n_tokens: int) -> None:
    x, weight, bias = random(n_tokens, 48, seed=1), random(40, 48, seed=2), random(40, seed=3)
    ours = onednn.linear(x, weight, bias)
    assert ours.is_contiguous() and ours.shape == (n_tokens, 40)
    torch.testing.assert_close(ours, torch.nn.functional.linear(x, weight, bias), atol=1e-4, rtol=1e-4)


def test_numbers_of_tokens_are_rounded_to_few_and_by_little() -> None:
    rounded = {n: onednn.rounded_up(n) for n in range(1, 2049)}
    assert all(n <= found <= n + n // 8 + 1 for n, found in rounded.items())
    assert len({found for n, found in rounded.items() if n > 64}) == 8 * 5
    assert all(onednn.rounded_up(found) == found for found in rounded.values())
