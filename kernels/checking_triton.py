"""The ops of a step that checks guesses, one launch each. `checking.py` defines them.

Programs are one per row and share nothing, except those of `window`, which are one per token. `look_up` reads a row's
history once, up to its newest token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllama.kernels.checking import guesses_of
from fastllama.kernels.decode_state import DecodeState
from fastllama.kernels.guesses import DRAFTED, MAX_GUESSES, Guesses, Window
from fastllama.kernels.launch.checks import check_tensor
from fastllama.kernels.launch.dependent import dependent_launch, wait_for_inputs

BLOCK_T = 1024  # tokens of history that a program compares at once
BLOCK_GUESSES = tl.constexpr(MAX_GUESSES + 1)  # a power of 2


@triton.jit(do_not_specialize=["begin", "size", "T", "G"])
def _window_kernel(
    positions_ptr,
    last_ptr,
    rows_ptr,
    history_ptr,
    guesses_ptr,
    out_ptr,  # (4, B·S): tokens, positions, following, rows
    begin,
    size,
    T,
    G,
    DEPENDENT: tl.constexpr,
):
    wait_for_inputs(DEPENDENT)
    program = tl.program_id(0).to(tl.int64)
    row, offset = program // size, begin + program % size
    newest = tl.load(positions_ptr + row)
    position = newest + offset
    at = tl.minimum(tl.maximum(position, 0), T - 1)
    guess = tl.load(guesses_ptr + row * G + offset - 1, mask=offset > 0, other=0)
    token = tl.where(offset > 0, guess, tl.load(history_ptr + row * T + at))
    live = (newest >= 0) & (position >= 0) & (position < tl.load(last_ptr + row)) & (token >= 0)
    position = tl.where(live, position, -1)
    count = tl.num_programs(0)
    out = out_ptr + program
    tl.store(out, tl.where(live, token, 0))
    tl.store(out + count, position)
    tl.store(out + 2 * count, position + 1)
    tl.store(out + 3 * count, tl.load(rows_ptr + row))


@triton.jit(do_not_specialize=["size", "n_steps", "stride", "T", "G", "V"])
def _accept_kernel(
    drawn_ptr,
    logprobs_ptr,
    positions_ptr,
    tokens_ptr,
    starts_ptr,
    last_ptr,
    is_stop_ptr,
    out_tokens_ptr,
    out_logprobs_ptr,
    history_ptr,
    guesses_ptr,
    newest_ptr,
    size,
    n_steps,
    stride,
    T,
    G,
    V,
    DEPENDENT: tl.constexpr,
):
    wait_for_inputs(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(positions_ptr + row)
    start, last = tl.load(starts_ptr + row), tl.load(last_ptr + row)
    going = begin >= 0
    position, known = begin, tl.load(tokens_ptr + row)
    for i in range(size):
        token = tl.load(drawn_ptr + row * size + i)
        score = tl.load(logprobs_ptr + row * size + i)
        following = begin + i + 1
        slot = (following - start) % n_steps
        at = tl.where(slot < 0, slot + n_steps, slot) * stride + row
        tl.store(out_tokens_ptr + at, token, mask=going)
        tl.store(out_logprobs_ptr + at, score, mask=going)
        known = tl.where(going, tl.maximum(token, 0), known)
        tl.store(history_ptr + row * T + tl.minimum(following, T - 1), known, mask=going)
        stops = tl.load(is_stop_ptr + row * V + known, mask=going, other=0) != 0
        ends = (token < 0) | stops | (following >= last)
        position = tl.where(going, tl.where(ends, -1, following), position)
        tl.store(newest_ptr + row, following, mask=going)
        guess = tl.load(guesses_ptr + row * G + tl.minimum(i, G - 1))
        going = going & (ends == 0) & (token == guess)
    tl.store(tokens_ptr + row, known)
    tl.store(positions_ptr + row, position)


@triton.jit(do_not_specialize=["n_guesses", "T", "G"])
def _look_up_kernel(
    positions_ptr,
    history_ptr,
    guesses_ptr,
    matched_ptr,
    n_guesses,
    T,
    G,
    BLOCK_T: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    wait_for_inputs(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    newest = tl.load(positions_ptr + row)
    history = history_ptr + row * T
    last = tl.load(history + newest, mask=newest >= 0, other=-1)
    second = tl.load(history + newest - 1, mask=newest >= 1, other=-1)
    third = tl.load(history + newest - 2, mask=newest >= 2, other=-1)
    best = tl.full((), -1, tl.int64)  # length · T + place of the best match
    block = (newest + BLOCK_T - 1) // BLOCK_T - 1
    while (block >= 0) & (best < 3 * T):  # from the newest block on, until there is a longest match
        place = block * BLOCK_T + tl.arange(0, BLOCK_T)
        live = place < newest
        same = live & (tl.load(history + place, mask=live, other=-1) == last)
        two = same & (place >= 1) & (tl.load(history + place - 1, mask=live & (place >= 1), other=-1) == second)
        three = two & (place >= 2) & (tl.load(history + place - 2, mask=live & (place >= 2), other=-1) == third)
        length = same.to(tl.int64) + two.to(tl.int64) + three.to(tl.int64)
        best = tl.maximum(best, tl.max(tl.where(same, length * T + place, -1), 0))
        block -= 1
    found = best >= 0
    end = tl.where(found, best % T, -1)
    ahead = tl.arange(0, BLOCK_GUESSES)
    copied = tl.load(history + end + 1 + ahead % tl.maximum(newest - end, 1), mask=found & (ahead < n_guesses), other=0)
    tl.store(guesses_ptr + row * G + ahead, tl.where(found, copied, -1), mask=ahead < n_guesses)
    tl.store(matched_ptr + row, tl.where(found, best // T, 0))


@triton.jit(do_not_specialize=["number", "size", "G", "V"])
def _put_guess_kernel(
    drawn_ptr,
    guesses_ptr,
    matched_ptr,
    number,
    size,
    G,
    V,
    DRAFTED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    wait_for_inputs(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(drawn_ptr + row * size + size - 1)
    before = tl.load(guesses_ptr + row * G + number - 1, mask=number > 0, other=0)
    known = (token >= 0) & (token < V) & (before >= 0)
    place = tl.arange(0, BLOCK_GUESSES)
    guess = tl.where((place == number) & known, token, -1)
    tl.store(guesses_ptr + row * G + place, guess, mask=(place >= number) & (place < G))
    tl.store(matched_ptr + row, tl.where(known, DRAFTED, 0), mask=number == 0)


def _sizes(guesses: Guesses) -> tuple[int, int]:
    """The strides of history and guesses between rows."""
    return guesses.history.stride(0), guesses.tokens.stride(0)


def window(state: DecodeState, begin: int, end: int) -> Window:
    """`checking.window`, in one launch. Raises ValueError for a state without guesses."""
    guesses, n_rows, size = guesses_of(state), state.rows.shape[0], end - begin
    out = torch.empty(4, n_rows * size, dtype=torch.int64, device=state.rows.device)
    tensors = (state.positions, state.last, state.rows, guesses.history, guesses.tokens, out)
    if out.numel():
        _window_kernel[(n_rows * size,)](*tensors, begin, size, *_sizes(guesses), num_warps=1, **dependent_launch())
    return Window(out[0], out[1], out[2], out[3])


def accept(state: DecodeState, drawn: Tensor, logprobs: Tensor) -> None:
    """`checking.accept`, in one launch. Raises ValueError without guesses, and for tensors that do not match."""
    guesses, n_rows = guesses_of(state), state.rows.shape[0]
    check_tensor("drawn", drawn, ("B·S",), torch.int64, state.rows.device)
    check_tensor("logprobs", logprobs, tuple(drawn.shape), torch.float32, state.rows.device)
    if not n_rows:
        return
    sizes = drawn.shape[0] // n_rows, state.out_tokens.shape[0], state.out_tokens.stride(0), *_sizes(guesses)
    _accept_kernel[(n_rows,)](
        drawn,
        logprobs,
        state.positions,
        state.tokens,
        state.starts,
        state.last,
        state.is_stop,
        state.out_tokens,
        state.out_logprobs,
        guesses.history,
        guesses.tokens,
        guesses.newest,
        *sizes,
        state.is_stop.stride(0),
        num_warps=1,
        **dependent_launch(),
    )


def look_up(state: DecodeState, n_guesses: int) -> None:
    """`checking.look_up`, in one launch. Raises ValueError for a state without guesses."""
    guesses, n_rows = guesses_of(state), state.rows.shape[0]
    tensors = (state.positions, guesses.history, guesses.tokens, guesses.matched)
    if n_rows:
        _look_up_kernel[(n_rows,)](
            *tensors, n_guesses, *_sizes(guesses), BLOCK_T=BLOCK_T, num_warps=4, **dependent_launch()
        )


def put_guess(state: DecodeState, number: int, drawn: Tensor) -> None:
    """`checking.put_guess`, in one launch. Raises ValueError for a state without guesses."""
    guesses, n_rows = guesses_of(state), state.rows.shape[0]
    check_tensor("drawn", drawn, ("B·S",), torch.int64, state.rows.device)
    if n_rows:
        sizes = drawn.shape[0] // n_rows, guesses.tokens.stride(0), state.is_stop.shape[1]
        _put_guess_kernel[(n_rows,)](
            drawn, guesses.tokens, guesses.matched, number, *sizes, DRAFTED=DRAFTED, num_warps=1, **dependent_launch()
        )
