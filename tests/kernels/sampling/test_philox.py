"""The random numbers match published test vectors, are uniform, and differ between streams."""

import torch

from fastllama.kernels.sampling.philox import philox, uniform


def words(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([value]) for value in values)


def test_philox_matches_the_published_vectors() -> None:
    """Known answers of Random123 for philox4x32-10: counter, key, result."""
    ones = 0xFFFFFFFF
    vectors = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, expected in vectors:
        c0, c1, c2, c3 = words(*counter)
        k0, k1 = words(*key)
        assert tuple(word.item() for word in philox((c0, c1, c2, c3), (k0, k1))) == expected


def test_uniform_is_in_range_and_uniform() -> None:
    position = torch.arange(20_000)
    fixed = torch.full_like(position, 7)
    drawn = uniform(fixed, fixed, fixed, position)
    assert drawn.dtype == torch.float64 and drawn.min() >= 0 and drawn.max() < 1
    counts = torch.histc(drawn, bins=20, min=0, max=1)
    chi_square = ((counts - 1000) ** 2 / 1000).sum().item()
    assert chi_square < 43.8  # the 99.9% quantile of chi-square with 19 degrees of freedom
    assert torch.equal(drawn.float().double(), drawn)


def test_uniform_differs_in_every_argument() -> None:
    base = [torch.tensor([value]) for value in (5, 6, 7, 8)]
    seen = {uniform(*base).item()}
    for place in range(4):
        for value in (0, 1, 2**31, 2**32 - 1):
            changed = list(base)
            changed[place] = torch.tensor([value])
            seen.add(uniform(*changed).item())
    high_seed = [torch.tensor([5 + (1 << 32)]), *base[1:]]
    negative_seed = [torch.tensor([-1]), *base[1:]]
    seen |= {uniform(*high_seed).item(), uniform(*negative_seed).item()}
    assert len(seen) == 19
