"""Masks over the logits: bit by bit as the definition, in every backend."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama.kernels import fused, native, reference
from fastllama.kernels.batch import SamplingTensors
from fastllama.kernels.native import library
from fastllama.kernels.sampling.masks import TokenMasks, allowed_tokens, mask_logits, n_words
from tests.kernels.cases import DTYPES, random
from tests.kernels.guards import GuardedMemory
from tests.support.tiers import parameters

ROWS = 5
POSITIONS = [7, 0, -1, 3, 900]  # the third row is inactive
MASKED = [True, False, True, True, True]
SIZES = {f"V{size}": size for size in (1, 31, 32, 33, 300, 1000, 2048, 5000, 128256)}


def bits_of(vocab_size: int, seed: int = 3) -> Tensor:
    """Which tokens each row allows, (ROWS, V) bool: few, and in the fourth row all, in the last one alone."""
    allowed = torch.rand(ROWS, vocab_size, generator=torch.Generator().manual_seed(seed)) < 0.2
    allowed[3], allowed[4] = True, False
    allowed[4, vocab_size - 1] = True
    return allowed


def packed(allowed: Tensor) -> Tensor:
    """Bits (B, V) as words (B, W), by Python's integers."""
    words: list[list[int]] = []
    for row in allowed.tolist():
        ones = [sum(1 << bit for bit, one in enumerate(row[at : at + 32]) if one) for at in range(0, len(row), 32)]
        words.append([word - 2**32 if word >= 2**31 else word for word in ones])
    return torch.tensor(words, dtype=torch.int32)


def masks_of(allowed: Tensor, device: torch.device, masked: list[bool] = MASKED) -> TokenMasks:
    """The first rows of a larger state's masks."""
    masks = TokenMasks.of(ROWS + 2, allowed.shape[1], device)
    masks.words.fill_(0x5A5A5A5A)
    rows = [row for row in range(ROWS) if masked[row]]
    if rows:
        masks.set_rows(rows, [packed(allowed)[row] for row in rows])
    return masks.first(ROWS)


def expected_of(logits: Tensor, allowed: Tensor, masked: list[bool] = MASKED) -> Tensor:
    expected = logits.clone()
    for row in range(ROWS):
        if masked[row] and POSITIONS[row] >= 0:
            expected[row, ~allowed[row].to(logits.device)] = -torch.inf
    return expected


@pytest.mark.parametrize("vocab_size", parameters(SIZES, quick=("V1", "V33", "V300", "V5000")))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_mask_logits_matches_reference(
    dtype: torch.dtype, vocab_size: int, device: torch.device, guarded: GuardedMemory
) -> None:
    allowed, positions = bits_of(vocab_size), torch.tensor(POSITIONS, device=device)
    logits = random(ROWS, vocab_size, dtype=dtype, device=device)
    logits[1, 0] = torch.nan  # of a row without a mask, which stays as it is
    expected, ours = expected_of(logits, allowed), {}
    for name, ops in (("fused", fused), ("reference", reference)):
        ours[name] = guarded.copy(logits)
        ops.mask_logits(ours[name], masks_of(allowed, device), positions)
        assert torch.equal(ours[name].nan_to_num(nan=5e4), expected.nan_to_num(nan=5e4)), name


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_native_backend_touches_only_masked_rows(dtype: torch.dtype, guarded: GuardedMemory) -> None:
    cpu, allowed = torch.device("cpu"), bits_of(300)
    logits = random(ROWS, 300, dtype=dtype)
    ours = guarded.copy(logits)
    native.mask_logits(ours, masks_of(allowed, cpu), torch.tensor(POSITIONS))
    assert torch.equal(ours, expected_of(logits, allowed))
    none = [False] * ROWS
    untouched = logits.clone()
    before = untouched._version
    native.mask_logits(untouched, masks_of(allowed, cpu, none), torch.tensor(POSITIONS))
    assert untouched._version == before


def test_a_row_loses_its_mask(device: torch.device) -> None:
    allowed, logits = bits_of(300), random(ROWS, 300, device=device)
    masks = masks_of(allowed, device)
    masks.clear_rows([0, 3])
    masked = [False, False, True, False, True]
    ours = logits.clone()
    fused.mask_logits(ours, masks, torch.tensor(POSITIONS, device=device))
    assert torch.equal(ours, expected_of(logits, allowed, masked))


def test_allowed_tokens_are_the_bits() -> None:
    for vocab_size in (1, 32, 33, 300):
        allowed = bits_of(vocab_size)
        words = packed(allowed)
        assert words.shape == (ROWS, n_words(vocab_size))
        assert torch.equal(allowed_tokens(words, vocab_size), allowed)
        assert torch.equal(allowed_tokens(words[2], vocab_size), allowed[2])


def test_first_rows_share_memory(device: torch.device) -> None:
    masks = TokenMasks.of(3, 40, device)
    masks.first(2).set_rows([1], [torch.tensor([5, 6], dtype=torch.int32)])
    assert masks.words.tolist() == [[0, 0], [5, 6], [0, 0]] and masks.has_mask.tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(ROWS, 300, dtype=torch.float64)}, "logits must be float32"),
        ({"logits": torch.zeros(ROWS, 600)[:, ::2]}, "must be contiguous"),
        ({"logits": torch.zeros(ROWS, 400)}, r"masks.words must have shape \(5, 13\), got \(5, 10\)"),
        ({"positions": torch.zeros(ROWS + 1, dtype=torch.int64)}, r"positions must have shape \(5\), got \(6\)"),
        ({"positions": torch.zeros(ROWS, dtype=torch.int32)}, "positions must be torch.int64"),
    ],
)
def test_mask_logits_rejects_tensors_that_do_not_match(change: dict[str, Tensor], message: str) -> None:
    cpu = torch.device("cpu")
    given: dict[str, Any] = {"logits": torch.zeros(ROWS, 300), "positions": torch.zeros(ROWS, dtype=torch.int64)}
    given |= {"masks": masks_of(bits_of(300), cpu)} | change
    with pytest.raises(ValueError, match=message):
        fused.mask_logits(**given)


def test_without_rows_nothing_is_launched(device: torch.device) -> None:
    logits, masks = torch.zeros(0, 300, device=device), TokenMasks.of(0, 300, device)
    for ops in (fused, reference):
        ops.mask_logits(logits, masks, torch.zeros(0, dtype=torch.int64, device=device))


@pytest.mark.parametrize("dtype", parameters(DTYPES, quick=("bf16",)))
@pytest.mark.parametrize("temperature", parameters({"0": 0.0, "0.7": 0.7, "tiny": 1e-38, "large": 1e37}, ("0.7",)))
def test_draws_are_allowed_tokens(dtype: torch.dtype, temperature: float, device: torch.device) -> None:
    """Rows with one token, with few and with all of them, drawn by every backend from the masked logits."""
    allowed, positions = bits_of(300), torch.tensor(POSITIONS, device=device)
    logits = 3 * random(ROWS, 300, dtype=dtype, device=device)
    mask_logits(logits, masks_of(allowed, device), positions)
    params = SamplingTensors.of(temperature, 0.9, [(row, 0, 0) for row in range(ROWS)], device)
    is_native = device.type == "cpu" and library.obstacle() is None
    for ops in (reference, fused, native) if is_native else (reference, fused):
        for position in range(8):
            tokens, _ = ops.sample(logits, params, torch.full_like(positions, position))
            for row in (0, 3, 4):
                assert allowed[row, int(tokens[row])], ops.__name__
