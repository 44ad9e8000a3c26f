"""Temperature, exact top-p and the draw, without a sort, in two launches for any number of rows.

    mass      = exp((x - max x) / temperature)            float32, x: the logits in the model dtype
    kept      = tokens with at most top_p · Σ mass before them, in descending order; among equal logits lowest ids first
    token     = the first kept token whose running mass exceeds u · Σ kept mass, counting those above the lowest kept
                logit in order of id, then those equal to it; u depends on seed, stream, call and position (`philox.py`)
    logprob   = x[token] - max x - log Σ exp(x - max x)   before temperature and top-p
    temperature or top_p 0: the lowest id of the largest logit; NaN, +inf or no finite logit: token -1, logprob NaN

logits (B, V), all else (B,) -> tokens (B,) int64, logprobs (B,) float32. Reads the logits twice, the second time from
L2: B·V elements, with two exponentials each.

The first launch computes statistics of blocks of logits. In the second, each block stores its candidates. A kept token
has a mass of at least (1 - top_p) · Σ mass / V: with less, it and all later tokens would have less than (1 - top_p) ·
Σ mass together, so more than top_p · Σ mass would come before it. A block has space for as many candidates as it has
tokens, so nothing can overflow. The last block of a row to finish searches the candidates for the lowest kept logit.
The search divides a range of integer keys, which have the order of the logits, by eight in each pass: usually 3 passes
over a few hundred candidates, at most 6 over the vocabulary (11 in float32). Sums are float32 and have a fixed order,
so that repeated runs are equal bit for bit.

In a decode step (`sample_and_advance`) the same program writes the token to the output, tests whether the row ends, and
advances it. So the host can queue the next step before it has read this step's token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllama.kernels.batch import SamplingTensors
from fastllama.kernels.decode_state import DecodeState
from fastllama.kernels.launch.checks import check_model_dtype, check_tensor
from fastllama.kernels.launch.dependent import dependent_launch, wait_for_inputs
from fastllama.kernels.launch.sizes import next_power_of_2
from fastllama.kernels.launch.target import current_target
from fastllama.kernels.sampling.scratch import SamplingScratch, choose_launch
from fastllama.kernels.sampling.top_p_triton import (
    INT32_MAX,
    LOG2_E,
    collect_candidates,
    draw_token,
    load_scale,
    min_candidate_mass,
    random_number,
)

# Bits of a logit's key: those of float32 (sign, exponent, mantissa) without the mantissa bits that are always zero.
# float16 needs 19, since its subnormals have exponents of their own in float32.
KEY_BITS = {torch.bfloat16: 16, torch.float16: 19, torch.float32: 32}
# Registers of two programs of the draw per multiprocessor. Without a limit some compiler versions aim, for some GPUs,
# at more programs per multiprocessor, and spill.
DRAW_REGISTERS, MAX_REGISTERS = 65536 // 2, 255
# Per-row tensors may be slices of a larger batch: their alignment must not compile a second kernel.
PER_ROW = ["temperature_ptr", "top_p_ptr", "seed_ptr", "stream_ptr", "call_ptr", "positions_ptr", "tokens_ptr"]
PER_ROW += ["logprobs_ptr", "starts_ptr", "last_ptr", "newest_ptr"]
MAX_CHUNK = tl.constexpr(128)  # candidates per block and pass: with few blocks, registers are the limit


# fmt: off
@triton.jit
def _advance_row(row, token, logprob, positions_ptr, starts_ptr, last_ptr, is_stop_ptr, newest_ptr, tokens_ptr,
                 logprobs_ptr, n_steps, stride, V: tl.constexpr):
    # fmt: on
    """Write a row's token to the output and advance the row, or deactivate it if it ends. Skip an inactive row."""
    position = tl.load(positions_ptr + row)
    if position >= 0:
        following = position + 1
        at = (following - tl.load(starts_ptr + row)) % n_steps * stride + row
        tl.store(tokens_ptr + at, token.to(tl.int64))
        tl.store(logprobs_ptr + at, logprob)
        known = tl.maximum(token, 0).to(tl.int64)
        ends = (
            (token < 0) | (following >= tl.load(last_ptr + row)) | tl.load(is_stop_ptr + row.to(tl.int64) * V + known)
        )
        tl.store(newest_ptr + row, known)
        tl.store(positions_ptr + row, tl.where(ends, -1, following))


@triton.jit(do_not_specialize=["n_draws"], do_not_specialize_on_alignment=["temperature_ptr"])
def _statistics_kernel(
    logits_ptr,
    temperature_ptr,
    maxima_ptr,
    first_ids_ptr,
    sums_ptr,
    masses_ptr,
    n_draws,  # of each row of the parameters
    V: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    wait_for_inputs(DEPENDENT)
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
    tl.store(masses_ptr + slot, tl.sum(tl.exp2((x - base) * load_scale(temperature_ptr, row // n_draws)), 0))


@triton.jit(do_not_specialize=["n_draws", "n_steps", "stride"], do_not_specialize_on_alignment=PER_ROW)
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
    n_draws,
    starts_ptr,  # this and the next three: only in a decode step; positions_ptr has the previous tokens' positions
    last_ptr,
    is_stop_ptr,
    newest_ptr,
    n_steps,  # of the output
    stride,  # between the results of successive steps
    V: tl.constexpr,
    BLOCKS: tl.constexpr,
    KEY_BITS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_BLOCKS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    wait_for_inputs(DEPENDENT)
    row, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    owner = row // n_draws  # the row of the parameters
    blocks = tl.arange(0, BLOCK_BLOCKS)
    exists, slots = blocks < BLOCKS, row * BLOCKS + blocks
    maxima = tl.load(maxima_ptr + slots, mask=exists, other=float("-inf"))
    maximum = tl.max(maxima, 0)
    total = tl.sum(tl.load(sums_ptr + slots, mask=exists, other=0.0) * tl.exp2((maxima - maximum) * LOG2_E), 0)
    first_ids = tl.load(first_ids_ptr + slots, mask=exists, other=V)
    is_distribution = (maximum > float("-inf")) & (maximum < float("inf"))
    # The result of a row that does not draw, written by one program of the row.
    token = tl.where(is_distribution, tl.min(tl.where(maxima == maximum, first_ids, V), 0), -1)
    logprob = tl.where(is_distribution, -tl.log(total), float("nan"))
    top_p, writes = tl.load(top_p_ptr + owner), block == 0
    if is_distribution & (tl.load(temperature_ptr + owner) != 0.0) & (top_p != 0.0):
        scale = load_scale(temperature_ptr, owner)
        mass = tl.sum(tl.load(masses_ptr + slots, mask=exists, other=0.0) * tl.exp2((maxima - maximum) * scale), 0)
        limit = tl.where(top_p >= 1.0, float("inf"), top_p * mass.to(tl.float64))
        row_logits_ptr, slot = logits_ptr + row.to(tl.int64) * V, (row * BLOCKS + block).to(tl.int64)
        # fmt: off
        collect_candidates(row_logits_ptr, block, maximum, scale, min_candidate_mass(top_p, mass, V),
                             candidates_ptr, counts_ptr, lowest_ptr, slot, V, KEY_BITS, BLOCK_V)
        # fmt: on
        tl.debug_barrier()  # all threads must have stored before one thread adds to the counter
        writes = tl.atomic_add(counters_ptr + row, 1, sem="acq_rel", scope="gpu") == BLOCKS - 1
        if writes:
            tl.store(counters_ptr + row, 0)
            counts = tl.load(counts_ptr + slots, mask=exists, other=0, cache_modifier=".cg")
            lowest = tl.load(lowest_ptr + slots, mask=exists, other=INT32_MAX, cache_modifier=".cg")
            position = tl.load(positions_ptr + row)
            if newest_ptr is not None:
                position += 1
            u = random_number(seed_ptr, stream_ptr, call_ptr, position, owner)
            row_candidates_ptr = candidates_ptr + (slot - block) * BLOCK_V
            CHUNK: tl.constexpr = min(BLOCK_V // BLOCK_BLOCKS, MAX_CHUNK)
            # fmt: off
            token, x_token = draw_token(row_logits_ptr, row_candidates_ptr, counts, tl.min(lowest, 0).to(tl.int64),
                                        limit, u, maximum, scale, V, BLOCK_V, KEY_BITS, CHUNK)
            # fmt: on
            logprob += x_token - maximum
    if writes:
        if newest_ptr is not None:
            # fmt: off
            _advance_row(row, token, logprob, positions_ptr, starts_ptr, last_ptr, is_stop_ptr, newest_ptr, tokens_ptr,
                         logprobs_ptr, n_steps, stride, V)
            # fmt: on
        else:
            tl.store(tokens_ptr + row, token.to(tl.int64))
            tl.store(logprobs_ptr + row, logprob)


def sample(
    logits: Tensor, sampling: SamplingTensors, positions: Tensor, scratch: SamplingScratch
) -> tuple[Tensor, Tensor]:
    """Sample each row's next token: logits (B, V) in the model dtype, positions (B,) int64 of the new tokens.

    With S times as many logits and positions as rows of `sampling`, each row has S adjacent draws.
    Returns tokens (B,) int64 and their float32 log-probabilities (B,) before temperature and top-p. A row whose logits
    hold a NaN or +inf, or are all -inf, gets token -1 and log-probability NaN. Ignores `sampling.greedy`, since a
    captured graph is replayed with other parameters than those of its capture. Calls that share a scratch must run one
    after another on one stream. Raises ValueError if tensors do not match, and for a scratch of another vocabulary
    or fewer rows.
    """
    rows = _check_logits(logits, sampling, positions, scratch)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _launch(logits, sampling, positions, scratch, tokens, logprobs)
    return tokens, logprobs


def sample_and_advance(logits: Tensor, state: DecodeState, scratch: SamplingScratch) -> None:
    """`sample` for every row of a decode state, then advance the rows to the new tokens. Changes the state.

    logits (B, V). Raises ValueError if tensors do not match, and for a scratch of another vocabulary or fewer rows.
    """
    rows = _check_logits(logits, state.sampling, state.positions, scratch)
    device = logits.device
    check_tensor("sampling.temperature", state.sampling.temperature, (rows,), torch.float64, device)
    for name in ("tokens", "starts", "last"):
        check_tensor(f"state.{name}", getattr(state, name), (rows,), torch.int64, device)
    check_tensor("state.is_stop", state.is_stop, (rows, logits.shape[1]), torch.bool, device)
    if state.out_tokens.shape != state.out_logprobs.shape or state.out_tokens.stride() != state.out_logprobs.stride():
        raise ValueError("state.out_tokens and state.out_logprobs must have one layout: make it with DecodeState.of")
    advance = (
        state.starts,
        state.last,
        state.is_stop,
        state.tokens,
        state.out_tokens.shape[0],
        state.out_tokens.stride(0),
    )
    _launch(logits, state.sampling, state.positions, scratch, state.out_tokens, state.out_logprobs, advance)


def _check_logits(logits: Tensor, sampling: SamplingTensors, positions: Tensor, scratch: SamplingScratch) -> int:
    """Check that tensors match. Returns the number of rows, B."""
    check_model_dtype("logits", logits)
    check_tensor("logits", logits, ("B", "V"), logits.dtype, logits.device)
    rows, vocab_size = logits.shape
    n_params = sampling.temperature.shape[0]
    if not n_params or rows % n_params:
        n_params = rows
    for name in ("temperature", "top_p"):
        check_tensor(f"sampling.{name}", getattr(sampling, name), (n_params,), torch.float64, logits.device)
    for name in ("seed", "stream", "call"):
        check_tensor(f"sampling.{name}", getattr(sampling, name), (n_params,), torch.int64, logits.device)
    check_tensor("positions", positions, (rows,), torch.int64, logits.device)
    scratch.check(rows, vocab_size, logits.device)
    return rows


def _registers(warps: int) -> dict[str, int]:
    """The launch option that limits the registers per thread of the draw, on NVIDIA GPUs."""
    target = current_target()
    most = min(DRAW_REGISTERS // (warps * target.warp_size), MAX_REGISTERS)
    return {"maxnreg": most} if target.backend == "cuda" else {}


def _launch(
    logits: Tensor,
    sampling: SamplingTensors,
    positions: Tensor,
    scratch: SamplingScratch,
    tokens: Tensor,
    logprobs: Tensor,
    advance: tuple[Tensor | int | None, ...] = (None, None, None, None, 0, 0),
) -> None:
    if logits.shape[0] == 0:
        return
    launch = choose_launch(logits.shape[1])
    grid = (logits.shape[0] * launch.blocks,)
    constants = {"V": logits.shape[1], "BLOCKS": launch.blocks, "BLOCK_V": launch.block, "num_warps": launch.warps}
    constants |= dependent_launch()
    statistics = (scratch.maxima, scratch.first_ids, scratch.sums, scratch.masses)
    n_draws = logits.shape[0] // sampling.temperature.shape[0]
    _statistics_kernel[grid](logits, sampling.temperature, *statistics, n_draws, **constants)
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
        n_draws,
        *advance,
        KEY_BITS=KEY_BITS[logits.dtype],
        BLOCK_BLOCKS=next_power_of_2(launch.blocks),
        **_registers(launch.warps),
        **constants,
    )
