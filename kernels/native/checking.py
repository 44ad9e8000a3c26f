"""The ops of a step that checks guesses, which `kernels/checking.py` defines: each is a kernel with a chunk per row.

Unlike the operations of torch there, a captured step records them.
"""

import torch
from torch import Tensor

from fastllama.kernels.decode_state import DecodeState
from fastllama.kernels.guesses import Guesses, Window
from fastllama.kernels.native import arguments
from fastllama.kernels.native.library import Kind, empty, run


def window(state: DecodeState, begin: int, end: int) -> Window:
    """The tokens from begin to end - 1 after the newest of every row -> S = end - begin tokens a row."""
    arguments.check_window(begin, end)
    guesses = arguments.check_guesses(state, ("rows", "positions", "last"))
    n_tokens = state.rows.shape[0] * (end - begin)
    out = empty((len(Window._fields), n_tokens), torch.int64)
    sizes = {"n_tokens": n_tokens, "tokens_per_row": end - begin, "begin": begin}
    _run(Kind.WINDOW, state, guesses, rows=state.rows, last=state.last, out=out, **sizes)
    return Window(*(out[field] for field in range(len(Window._fields))))


def accept(state: DecodeState, drawn: Tensor, logprobs: Tensor) -> None:
    """drawn, logprobs (B·S,) -> each row advances by its draws, up to and including the first that was not guessed."""
    guesses = arguments.check_guesses(state, ("tokens", "positions", "starts", "last"))
    per_row = arguments.check_draws(state, drawn, logprobs)
    _run(
        Kind.ACCEPT,
        state,
        guesses,
        tokens=drawn,
        logprobs=logprobs,
        state_tokens=state.tokens,
        starts=state.starts,
        last=state.last,
        is_stop=state.is_stop,
        vocab=state.is_stop.shape[1],
        out_tokens=state.out_tokens,
        out_logprobs=state.out_logprobs,
        n_steps=state.out_tokens.shape[0],
        out_stride=state.out_tokens.stride(0),
        newest=guesses.newest,
        n_tokens=drawn.shape[0],
        tokens_per_row=per_row,
    )


def look_up(state: DecodeState, n_guesses: int) -> None:
    """Each row's first n_guesses guesses are what followed the latest place with the same newest tokens."""
    arguments.check_look_up(n_guesses)
    guesses = arguments.check_guesses(state, ("positions",))
    sizes = {"n_tokens": state.rows.shape[0], "tokens_per_row": 1, "n_guesses": n_guesses}
    _run(Kind.LOOK_UP, state, guesses, matched=guesses.matched, **sizes)


def put_guess(state: DecodeState, number: int, drawn: Tensor) -> None:
    """The last of each row's draws is its guess of this number; later guesses are dropped: drawn (B·S,)."""
    guesses = arguments.check_guesses(state, ())
    per_row = arguments.check_guess(state, number, drawn)
    sizes = {"n_tokens": drawn.shape[0], "tokens_per_row": per_row, "begin": number, "vocab": state.is_stop.shape[1]}
    _run(Kind.PUT_GUESS, state, guesses, tokens=drawn, matched=guesses.matched, **sizes)


def _run(kind: Kind, state: DecodeState, guesses: Guesses, **fields: Tensor | int) -> None:
    run(
        kind,
        torch.float32,  # of the log-probabilities; there are no tensors in a model dtype
        state_positions=state.positions,
        history=guesses.history,
        guesses=guesses.tokens,
        length=guesses.history.shape[1],
        max_guesses=guesses.tokens.shape[1],
        **fields,
    )
