"""The ops of a step that checks guesses, in plain torch: `window` before the model, the others after it.

window → model on S tokens a row → sample → accept → look_up
                                                   → (window → draft model → sample → put_guess), k times
"""

import torch
from torch import Tensor

from fastllama.kernels.decode_state import INACTIVE, NO_TOKEN, DecodeState
from fastllama.kernels.guesses import DRAFTED, MAX_NGRAM, NO_GUESS, Guesses, Window


def guesses_of(state: DecodeState) -> Guesses:
    """The state's guesses. Raises ValueError if it has none."""
    if state.guesses is None:
        raise ValueError("this decode state has no guesses: make it with with_guesses")
    return state.guesses


def window(state: DecodeState, begin: int, end: int) -> Window:
    """The tokens from p + begin to p + end - 1 of every row, whose newest token is at p. Those after p are guesses.

    A token is inactive if its row is, if there is no guess, before the row's first token, and from the row's last
    position on, where no draw is wanted.
    """
    guesses = guesses_of(state)
    n_rows, device = state.rows.shape[0], state.rows.device
    positions = state.positions[:, None] + torch.arange(begin, end, device=device)
    length = guesses.history.shape[1]
    known = guesses.history.gather(1, positions[:, : max(0, 1 - begin)].clamp(0, length - 1))
    tokens = torch.cat([known, guesses.tokens[:, max(0, begin - 1) : max(0, end - 1)]], dim=1)
    live = (state.positions >= 0)[:, None] & (positions >= 0) & (positions < state.last[:, None]) & (tokens >= 0)
    positions = torch.where(live, positions, INACTIVE).flatten()
    rows = state.rows[:, None].expand(n_rows, end - begin)
    return Window(torch.where(live, tokens, 0).flatten(), positions, positions + 1, rows.flatten())


def accept(state: DecodeState, drawn: Tensor, logprobs: Tensor) -> None:
    """Advance each row by its draws, up to and including the first that was not guessed.

    drawn, logprobs (B·S,), after the newest token and S - 1 guesses. Each accepted token goes to the output and to the
    history. A row ends as in `sample_and_advance`, also before it has used all guesses. Changes the state.
    """
    guesses, n_rows = guesses_of(state), state.rows.shape[0]
    tokens, scores = drawn.view(n_rows, -1), logprobs.view(n_rows, -1)
    begin, going = state.positions.clone(), state.positions >= 0
    for i in range(tokens.shape[1]):
        token, known, following = tokens[:, i], tokens[:, i].clamp(min=0), begin + i + 1
        at = torch.where(going, following - state.starts, 0)[None] % state.out_tokens.shape[0]
        for out, new in ((state.out_tokens, token), (state.out_logprobs, scores[:, i])):
            out.scatter_(0, at, torch.where(going, new, out.gather(0, at)))
        place = torch.where(going, following, 0).clamp(max=guesses.history.shape[1] - 1)[:, None]
        old = guesses.history.gather(1, place)
        guesses.history.scatter_(1, place, torch.where(going[:, None], known[:, None], old))
        stops = state.is_stop.gather(1, known[:, None])[:, 0]
        ends = (token == NO_TOKEN) | stops | (following >= state.last)
        state.tokens.copy_(torch.where(going, known, state.tokens))
        state.positions.copy_(torch.where(going, torch.where(ends, INACTIVE, following), state.positions))
        guesses.newest.copy_(torch.where(going, following, guesses.newest))
        going = going & ~ends & (token == guesses.tokens[:, min(i, guesses.tokens.shape[1] - 1)])


def look_up(state: DecodeState, n_guesses: int) -> None:
    """Guess that the row goes on as it did after the latest earlier place with the same newest tokens.

    The newest 3 tokens are looked for, then 2, then 1; `matched` is their number. Where what followed ends at the
    newest token, it is repeated. Changes the first n_guesses guesses of every row.
    """
    guesses = guesses_of(state)
    history, length = guesses.history, guesses.history.shape[1]
    newest = state.positions[:, None]  # (B, 1)
    place = torch.arange(length, device=history.device)[None]
    same = place < newest
    end, matched = torch.full_like(newest, -1), torch.zeros_like(newest)
    for n in range(1, MAX_NGRAM + 1):
        wanted = history.gather(1, (newest - n + 1).clamp(min=0))
        shifted = torch.roll(history, n - 1, dims=1)
        same = same & (place >= n - 1) & (newest >= n - 1) & (shifted == wanted)
        found = torch.where(same, place, -1).amax(1, keepdim=True)
        end, matched = torch.where(found >= 0, found, end), torch.where(found >= 0, n, matched)
    ahead = torch.arange(n_guesses, device=history.device)[None]
    copied = history.gather(1, (end + 1 + ahead % (newest - end).clamp(min=1)).clamp(0, length - 1))
    guesses.tokens[:, :n_guesses] = torch.where(end >= 0, copied, NO_GUESS)
    guesses.matched.copy_(matched[:, 0])


def put_guess(state: DecodeState, number: int, drawn: Tensor) -> None:
    """Take the last of each row's draws as its guess of this number, counted from 0. Later guesses are dropped.

    drawn (B·S,) of a draft model. There is no guess where it is outside the vocabulary, or where the one before is not
    there. Changes the state's guesses.
    """
    guesses, n_rows = guesses_of(state), state.rows.shape[0]
    token = drawn.view(n_rows, -1)[:, -1]
    known = (token >= 0) & (token < state.is_stop.shape[1])
    if number > 0:
        known = known & (guesses.tokens[:, number - 1] >= 0)
    else:
        guesses.matched.copy_(torch.where(known, DRAFTED, 0))
    guesses.tokens[:, number] = torch.where(known, token, NO_GUESS)
    guesses.tokens[:, number + 1 :] = NO_GUESS
