"""Temperature, exact top-p and the draw, without a sort: two launches for any number of rows.

    mass      = exp((x - max x) / temperature)            float32, of the logits x as the model dtype holds them
    kept      = tokens before which, in descending order, lies at most top_p · Σ mass; of equal logits the lowest ids
    token     = first of the kept whose running mass exceeds u · Σ kept mass: those above the lowest kept logit in order
                of id, then those equal to it. u is a function of seed, stream, call and position (`philox.py`)
    logprob   = x[token] - max x - log Σ exp(x - max x)   before temperature and top-p
    temperature or top_p 0: the lowest id of the largest logit; NaN, +inf or no finite logit: token -1, logprob NaN

logits (B, V), all else (B,) -> tokens (B,) int64, logprobs (B,) float32. Reads the logits twice, the second time from
L2: B·V elements, for two exponentials each.

The first launch takes statistics of blocks of logits. In the second, each block sets aside its candidates: a kept token
weighs at least (1 - top_p) · Σ mass / V, for if it weighed less, so would all that come after it, and what lies before
it would exceed top_p · Σ mass. A block's candidates have as many slots as the block has tokens, so nothing can
overflow. The last block of a row to finish searches the candidates for the lowest kept logit, eight ways at a time on
integers that order as the logits do: 3 passes over a few hundred candidates in the usual case, 6 over the vocabulary
(11 in float32) at the worst. Sums are float32 and have a fixed order, so that runs repeat bit for bit.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllama.kernels.checks import check_model_dtype, check_tensor
from fastllama.kernels.ragged import Sampling
from fastllama.kernels.top_p import HIGHEST, draw_token, least_candidate_mass, set_candidates_aside

MAX_VOCABULARY = 262144
MIN_BLOCK = 64
MAX_BLOCK = 2048
LOGITS_PER_THREAD = 8
THREADS_PER_WARP = 32
# Bits that the key of a logit needs: sign, exponent and mantissa as float32 has them, less the mantissa's empty bits.
# Of float16 that is 19, since float32 writes its subnormals with exponents of their own.
KEY_BITS = {torch.bfloat16: 16, torch.float16: 19, torch.float32: 32}
# A row of a batch's tensors may begin anywhere: whether it is aligned must not compile a second kernel.
PER_ROW = ["temperature_ptr", "top_p_ptr", "seed_ptr", "stream_ptr", "call_ptr", "positions_ptr"]
LOG2_E = tl.constexpr(1.4426950408889634)
# 1 / temperature stays a finite, normal float32, so that no infinity meets a zero.
MIN_TEMPERATURE = tl.constexpr(1e-38)
MAX_TEMPERATURE = tl.constexpr(1e37)


class Launch(NamedTuple):
    """How a row is dealt to programs."""

    block: int  # logits of a program
    blocks: int  # programs of a row
    warps: int


def choose_launch(vocab_size: int) -> Launch:
    """Blocks of 8 logits a thread: one 16-byte load of a half-precision type.

    The last program looks at as many candidates at a time as it has had logits, a share of each block's, so that the
    number of blocks costs it nothing: 32 of each of 63 hold most nuclei. A block of twice as many would occupy half as
    many multiprocessors in both launches, and need 16 warps of at most 128 registers.

        V = 128,256     63 blocks of 2,048 logits, 8 warps
        V = 262,144     128 blocks of 2,048, 8 warps
        V = 1,000       1 block of 1,024, 4 warps
    """
    block = max(MIN_BLOCK, min(MAX_BLOCK, triton.next_power_of_2(vocab_size)))
    return Launch(block, triton.cdiv(vocab_size, block), max(1, block // (LOGITS_PER_THREAD * THREADS_PER_WARP)))


@dataclass(frozen=True)
class SamplingScratch:
    """What blocks of logits hand to each other, for up to max_rows rows of one vocabulary of P blocks."""

    vocab_size: int
    maxima: Tensor  # (max_rows, P) float32: a block's largest logit; +inf where one is NaN
    first_ids: Tensor  # (max_rows, P) int32: the lowest id that has it
    sums: Tensor  # (max_rows, P) float32: Σ exp(x - maximum)
    masses: Tensor  # (max_rows, P) float32: the same with temperature
    candidates: Tensor  # (max_rows, P · block) float32: a block's logits that may be kept, in order of id
    counts: Tensor  # (max_rows, P) int32: how many those are
    lowest: Tensor  # (max_rows, P) int32: the key of the smallest of them
    counters: Tensor  # (max_rows,) int32: blocks done; zero between calls

    @classmethod
    def of(cls, max_rows: int, vocab_size: int, device: torch.device) -> "SamplingScratch":
        """Scratch memory for up to max_rows rows. Raises ValueError for a vocabulary that the kernels cannot take."""
        if not 1 <= vocab_size <= MAX_VOCABULARY:
            raise ValueError(
                f"sampling takes a vocabulary of 1 to {MAX_VOCABULARY} tokens, got {vocab_size}: build with "
                'backend="reference"'
            )
        launch = choose_launch(vocab_size)

        def blocks(dtype: torch.dtype) -> Tensor:
            return torch.empty(max_rows, launch.blocks, dtype=dtype, device=device)

        return cls(
            vocab_size,
            maxima=blocks(torch.float32),
            first_ids=blocks(torch.int32),
            sums=blocks(torch.float32),
            masses=blocks(torch.float32),
            candidates=torch.empty(max_rows, launch.blocks * launch.block, dtype=torch.float32, device=device),
            counts=blocks(torch.int32),
            lowest=blocks(torch.int32),
            counters=torch.zeros(max_rows, dtype=torch.int32, device=device),
        )

    def reset(self) -> None:
        """Zero the counters, which a call that was broken off leaves behind."""
        self.counters.zero_()


@triton.jit
def _load_scale(temperature_ptr, row):
    """log2(e) / temperature of a row."""
    temperature = tl.load(temperature_ptr + row)
    inverse = 1.0 / tl.minimum(tl.maximum(temperature, MIN_TEMPERATURE), MAX_TEMPERATURE)
    return (inverse * LOG2_E).to(tl.float32)


@triton.jit
def _draw_number(seed_ptr, stream_ptr, call_ptr, positions_ptr, row):
    """A row's number in [0, 1), as `philox.uniform` has it."""
    position = tl.load(positions_ptr + row).to(tl.uint32)
    stream, call = tl.load(stream_ptr + row).to(tl.uint32), tl.load(call_ptr + row).to(tl.uint32)
    word, _, _, _ = tl.philox(tl.load(seed_ptr + row), position, stream, call, tl.zeros((), tl.uint32))
    return (word >> 8).to(tl.float64) * (1.0 / 16777216)


@triton.jit(do_not_specialize_on_alignment=["temperature_ptr"])
def _statistics_kernel(
    logits_ptr,
    temperature_ptr,
    maxima_ptr,
    first_ids_ptr,
    sums_ptr,
    masses_ptr,
    V: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row, block = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(0) % BLOCKS
    ids = block * BLOCK_V + tl.arange(0, BLOCK_V)
    x = tl.load(logits_ptr + row * V + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("inf"))
    maximum = tl.max(x, 0)
    base = tl.where(maximum == float("-inf"), 0.0, maximum)  # sums of a block of masked tokens are 0, not NaN
    slot = row * BLOCKS + block
    tl.store(maxima_ptr + slot, maximum)
    tl.store(first_ids_ptr + slot, tl.min(tl.where(x == maximum, ids, V), 0))
    tl.store(sums_ptr + slot, tl.sum(tl.exp2((x - base) * LOG2_E), 0))
    tl.store(masses_ptr + slot, tl.sum(tl.exp2((x - base) * _load_scale(temperature_ptr, row)), 0))


@triton.jit(do_not_specialize_on_alignment=PER_ROW)
def _draw_kernel(
    logits_ptr,
    temperature_ptr,
    top_p_ptr,
    seed_ptr,
    stream_ptr,
    call_ptr,
    positions_ptr,
    maxima_ptr,
    first_ids_ptr,
    sums_ptr,
    masses_ptr,
    candidates_ptr,
    counts_ptr,
    lowest_ptr,
    counters_ptr,
    tokens_ptr,
    logprobs_ptr,
    V: tl.constexpr,
    BLOCKS: tl.constexpr,
    KEY_BITS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_BLOCKS: tl.constexpr,
):
    row, block = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(0) % BLOCKS
    blocks = tl.arange(0, BLOCK_BLOCKS)
    exists, slots = blocks < BLOCKS, row * BLOCKS + blocks
    maxima = tl.load(maxima_ptr + slots, mask=exists, other=float("-inf"))
    maximum = tl.max(maxima, 0)
    total = tl.sum(tl.load(sums_ptr + slots, mask=exists, other=0.0) * tl.exp2((maxima - maximum) * LOG2_E), 0)
    first_ids = tl.load(first_ids_ptr + slots, mask=exists, other=V)
    is_distribution = (maximum > float("-inf")) & (maximum < float("inf"))
    # What the row gets unless it draws, from one program of the row.
    token = tl.where(is_distribution, tl.min(tl.where(maxima == maximum, first_ids, V), 0), -1)
    logprob = tl.where(is_distribution, -tl.log(total), float("nan"))
    top_p, writes = tl.load(top_p_ptr + row), block == 0
    if is_distribution & (tl.load(temperature_ptr + row) != 0.0) & (top_p != 0.0):
        scale = _load_scale(temperature_ptr, row)
        mass = tl.sum(tl.load(masses_ptr + slots, mask=exists, other=0.0) * tl.exp2((maxima - maximum) * scale), 0)
        # fmt: off
        set_candidates_aside(logits_ptr + row * V, block, maximum, scale, least_candidate_mass(top_p, mass, V),
                             candidates_ptr, counts_ptr, lowest_ptr, row * BLOCKS + block, V, KEY_BITS, BLOCK_V)
        # fmt: on
        tl.debug_barrier()  # all threads' stores before the one thread's atomic
        writes = tl.atomic_add(counters_ptr + row, 1, sem="acq_rel", scope="gpu") == BLOCKS - 1
        if writes:
            tl.store(counters_ptr + row, 0)
            counts = tl.load(counts_ptr + slots, mask=exists, other=0, cache_modifier=".cg")
            lowest = tl.load(lowest_ptr + slots, mask=exists, other=HIGHEST, cache_modifier=".cg")
            limit = tl.where(top_p >= 1.0, float("inf"), top_p * mass.to(tl.float64))
            u = _draw_number(seed_ptr, stream_ptr, call_ptr, positions_ptr, row)
            # fmt: off
            token, x_token = draw_token(logits_ptr + row * V, candidates_ptr + row * BLOCKS * BLOCK_V, counts,
                                        tl.min(lowest, 0).to(tl.int64), limit, u, maximum, scale, V, BLOCK_V,
                                        KEY_BITS, BLOCK_V // BLOCK_BLOCKS)
            # fmt: on
            logprob = x_token - maximum - tl.log(total)
    if writes:
        tl.store(tokens_ptr + row, token.to(tl.int64))
        tl.store(logprobs_ptr + row, logprob)


def sample(logits: Tensor, sampling: Sampling, positions: Tensor, scratch: SamplingScratch) -> tuple[Tensor, Tensor]:
    """Choose each row's next token: logits (B, V) in the model dtype, positions (B,) int64 where the tokens will stand.

    Returns tokens (B,) int64 and their float32 log-probabilities (B,) before temperature and top-p. A row whose logits
    hold a NaN or +inf, or are all -inf, gets token -1 and log-probability NaN. `sampling.greedy` is not looked at: a
    captured graph replays with other parameters than it was captured with. Calls that share a scratch follow one
    another on one stream. Raises ValueError for tensors that do not belong together and for a scratch of another
    vocabulary or fewer rows.
    """
    check_model_dtype("logits", logits)
    check_tensor("logits", logits, ("B", "V"), logits.dtype, logits.device)
    rows, vocab_size = logits.shape
    for name in ("temperature", "top_p"):
        check_tensor(f"sampling.{name}", getattr(sampling, name), (rows,), torch.float64, logits.device)
    for name in ("seed", "stream", "call"):
        check_tensor(f"sampling.{name}", getattr(sampling, name), (rows,), torch.int64, logits.device)
    check_tensor("positions", positions, (rows,), torch.int64, logits.device)
    _check_scratch(scratch, rows, vocab_size, logits.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        _launch(logits, sampling, positions, scratch, tokens, logprobs)
    return tokens, logprobs


def _launch(
    logits: Tensor, sampling: Sampling, positions: Tensor, scratch: SamplingScratch, tokens: Tensor, logprobs: Tensor
) -> None:
    launch = choose_launch(logits.shape[1])
    grid = (logits.shape[0] * launch.blocks,)
    how = {"V": logits.shape[1], "BLOCKS": launch.blocks, "BLOCK_V": launch.block, "num_warps": launch.warps}
    statistics = (scratch.maxima, scratch.first_ids, scratch.sums, scratch.masses)
    _statistics_kernel[grid](logits, sampling.temperature, *statistics, **how)
    _draw_kernel[grid](
        logits,
        sampling.temperature,
        sampling.top_p,
        sampling.seed,
        sampling.stream,
        sampling.call,
        positions,
        *statistics,
        scratch.candidates,
        scratch.counts,
        scratch.lowest,
        scratch.counters,
        tokens,
        logprobs,
        KEY_BITS=KEY_BITS[logits.dtype],
        BLOCK_BLOCKS=triton.next_power_of_2(launch.blocks),
        **how,
    )


def _check_scratch(scratch: SamplingScratch, rows: int, vocab_size: int, device: torch.device) -> None:
    """ValueError unless the scratch is on the device, of the same vocabulary, and for as many rows."""
    max_rows = scratch.counters.shape[0]
    if scratch.vocab_size != vocab_size or max_rows < rows:
        raise ValueError(
            f"scratch must be for at least {rows} rows and a vocabulary of {vocab_size}, got one for {max_rows} rows "
            f"and {scratch.vocab_size}: make it with SamplingScratch.of"
        )
    if scratch.counters.device != device:
        raise ValueError(f"scratch must be on {device}, got {scratch.counters.device}: make it there")
