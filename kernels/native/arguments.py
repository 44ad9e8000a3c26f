"""Checks of the tensors that a native op receives. All raise ValueError for tensors that do not belong together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastllama.kernels.batch import PER_ROW, RaggedBatch, SamplingTensors
from fastllama.kernels.checking import guesses_of
from fastllama.kernels.decode_state import DecodeState
from fastllama.kernels.guesses import MAX_GUESSES, Guesses
from fastllama.kernels.launch.checks import check_cache, check_model_dtype, check_tensor
from fastllama.kernels.paged_cache import LayerCache
from fastllama.kernels.quantized import FORMATS, PLAIN, QuantizedWeight, Weight

CPU = torch.device("cpu")
MIN_GROUP, LARGE_GROUP = 32, 128  # columns of a quantised weight that share a scale
SMALL_GROUPS = (MIN_GROUP, 64)


def check_inputs(name: str, x: Tensor) -> None:
    """Check a contiguous (N, ·) tensor in a model dtype."""
    check_model_dtype(name, x)
    check_tensor(name, x, ("N", "width"), x.dtype, CPU)


def check_embed(table: Tensor, batch: RaggedBatch) -> None:
    """Check a table (V, E) and the batch's tokens."""
    check_model_dtype("table", table)
    check_tensor("table", table, ("V", "E"), table.dtype, CPU)
    check_tensor("batch.tokens", batch.tokens, ("N",), torch.int64, CPU)


def check_projection(
    x: Tensor,
    weight: Weight,
    norm: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """Check the inputs (N, ·), weight, norm, bias and residual of a projection."""
    check_inputs("x", x)
    if isinstance(weight, Tensor):
        check_tensor("weight", weight, ("rows", x.shape[1]), x.dtype, CPU)
    else:
        check_quantized(weight, x.shape[1])
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],), x.dtype, CPU)
    if norm is not None:
        check_tensor("norm", norm, (x.shape[1],), x.dtype, CPU)
    if residual is not None:
        check_tensor("residual", residual, (x.shape[0], weight.shape[0]), x.dtype, CPU)


def check_quantized(weight: QuantizedWeight, width: int) -> None:
    """Check a quantised weight of this width."""
    if weight.format not in FORMATS or weight.order != PLAIN:
        raise ValueError(
            f"weight must be {', '.join(FORMATS)} in the order {PLAIN!r}, got {weight.format!r} in {weight.order!r}"
        )
    is_int4 = weight.format == "int4"
    dtype = torch.int8 if weight.format == "int8" else torch.uint8
    check_tensor("weight.values", weight.values, ("rows", width // 2 if is_int4 else width), dtype, CPU)
    rows, groups = weight.values.shape[0], weight.scales.shape[-1]
    check_model_dtype("weight.scales", weight.scales)
    check_tensor("weight.scales", weight.scales, (rows, "groups"), weight.scales.dtype, CPU)
    if weight.offsets is not None:
        check_tensor("weight.offsets", weight.offsets, (rows, groups), weight.scales.dtype, CPU)
    if is_int4 == (weight.offsets is None):
        got = "without" if is_int4 else "with offsets"
        raise ValueError(f"a weight must have offsets if it is int4, and only then: got {weight.format} {got}")
    size = width // groups if groups else 0
    fits = size in SMALL_GROUPS or (size > 0 and size % LARGE_GROUP == 0) or groups == 1
    if groups * size != width or not fits or (is_int4 and width % MIN_GROUP):
        raise ValueError(
            f"a weight must have one group of columns, or groups of {MIN_GROUP}, 64 or a multiple of {LARGE_GROUP}, "
            f"and in int4 a multiple of {MIN_GROUP} columns: got {width} columns in {groups} groups as {weight.format}"
        )


def half(rows: int) -> int:
    """F of a gate and an up projection of 2·F rows together."""
    if rows % 2:
        raise ValueError(f"a gate and an up projection must have 2·F rows together, got {rows}")
    return rows // 2


def check_heads(x: Tensor, width: int, rope: Tensor, cache: LayerCache, batch: RaggedBatch) -> int:
    """Check a layer's cache, the rotary table and heads of this width together, from x (N, ·) -> H."""
    n_kv_heads, head_dim = _check_cache(cache, x.dtype)
    n_heads = width // head_dim - 2 * n_kv_heads
    if width % head_dim or n_heads < 1 or n_heads % n_kv_heads:
        raise ValueError(
            f"queries, keys and values must have (H + 2·{n_kv_heads})·{head_dim} elements together, with H a multiple "
            f"of {n_kv_heads}, got {width}"
        )
    check_tensor("rope", rope, ("T", head_dim // 2, 2), torch.float32, CPU)
    if rope.shape[0] < cache.length:
        raise ValueError(f"rope must hold the cache's {cache.length} positions, got {rope.shape[0]}")
    _check_places(batch, x.shape[0])
    return n_heads


def check_attention(q: Tensor, cache: LayerCache, batch: RaggedBatch) -> int:
    """Check queries (N, H, D) and a layer's cache -> the rows, of S adjacent tokens each."""
    check_model_dtype("q", q)
    check_tensor("q", q, ("N", "H", "D"), q.dtype, CPU)
    n_kv_heads, head_dim = _check_cache(cache, q.dtype)
    n_heads = q.shape[1]
    if q.shape[2] != head_dim or n_heads < 1 or n_heads % n_kv_heads:
        raise ValueError(
            f"q must have head dim {head_dim} and a multiple of the cache's {n_kv_heads} heads, got (H, D) = "
            f"({n_heads}, {q.shape[2]})"
        )
    _check_places(batch, q.shape[0])
    if batch.tokens_per_row < 1 or q.shape[0] % batch.tokens_per_row:
        raise ValueError(f"a batch must have tokens_per_row = {batch.tokens_per_row} for every row, got {q.shape[0]}")
    return q.shape[0] // batch.tokens_per_row


def _check_cache(cache: LayerCache, dtype: torch.dtype) -> tuple[int, int]:
    """Check a layer's cache -> (K, D)."""
    check_cache(cache, "D", dtype, CPU)
    n_pages, n_kv_heads, _, head_dim = cache.k.shape
    if min(n_pages, cache.length, n_kv_heads, head_dim) < 1 or head_dim % 2:
        raise ValueError(
            "the cache must have pages, positions, kv heads and an even head dim, got (P, T, K, D) = "
            f"({n_pages}, {cache.length}, {n_kv_heads}, {head_dim})"
        )
    return n_kv_heads, head_dim


def _check_places(batch: RaggedBatch, n_tokens: int) -> None:
    check_tensor("batch.positions", batch.positions, (n_tokens,), torch.int64, CPU)
    check_tensor("batch.rows", batch.rows, (n_tokens,), torch.int64, CPU)


def check_sampling(logits: Tensor, sampling: SamplingTensors, positions: Tensor) -> int:
    """Check logits (B·S, V), the sampling parameters of B rows, and the positions (B·S,) -> S, the draws of a row."""
    check_model_dtype("logits", logits)
    check_tensor("logits", logits, ("B", "V"), logits.dtype, CPU)
    n_draws, n_rows = logits.shape[0], sampling.temperature.shape[0]
    if logits.shape[1] < 1:
        raise ValueError("sampling takes a vocabulary of at least 1 token, got 0")
    for name in PER_ROW:
        dtype = torch.float64 if name in ("temperature", "top_p") else torch.int64
        check_tensor(f"sampling.{name}", getattr(sampling, name), (n_rows,), dtype, CPU)
    check_tensor("positions", positions, (n_draws,), torch.int64, CPU)
    return draws_per_row("logits", n_draws, n_rows)


def draws_per_row(name: str, n_draws: int, n_rows: int) -> int:
    """S of (B·S, ·) values for B rows."""
    per_row = n_draws // max(n_rows, 1)
    if per_row * n_rows != n_draws or (n_rows and not per_row):
        raise ValueError(f"{name} must have S for each of B = {n_rows} rows, B·S in all with S >= 1, got {n_draws}")
    return max(per_row, 1)


def check_state(logits: Tensor, state: DecodeState) -> None:
    """Check the state that rows of logits (B, V) advance."""
    check_rows(state, logits.shape[0], ("tokens", "starts", "last"))
    check_output(state, *logits.shape)


def check_rows(state: DecodeState, n_rows: int, names: Sequence[str]) -> None:
    """Check fields of the state of B rows that have a number for each."""
    for name in names:
        check_tensor(f"state.{name}", getattr(state, name), (n_rows,), torch.int64, CPU)


def check_output(state: DecodeState, n_rows: int, vocab: int | str) -> None:
    """Check where the tokens of B rows go, and the stop tokens."""
    check_tensor("state.is_stop", state.is_stop, (n_rows, vocab), torch.bool, CPU)
    out = state.out_tokens, state.out_logprobs
    same = out[0].shape == out[1].shape and out[0].stride() == out[1].stride() and out[0].stride(1) == 1
    if not same or out[0].shape[1] != n_rows or (out[0].dtype, out[1].dtype) != (torch.int64, torch.float32):
        raise ValueError("state.out_tokens and out_logprobs must have one layout: make it with DecodeState.of")


def check_guesses(state: DecodeState, names: Sequence[str]) -> Guesses:
    """Check the guesses of a state's rows, and these fields of the state -> the guesses."""
    guesses, n_rows = guesses_of(state), state.rows.shape[0]
    check_rows(state, n_rows, names)
    check_tensor("guesses.history", guesses.history, (n_rows, "T"), torch.int64, CPU)
    if guesses.history.shape[1] < 1:
        raise ValueError("guesses.history must have at least 1 position, got 0")
    check_tensor("guesses.tokens", guesses.tokens, (n_rows, MAX_GUESSES), torch.int64, CPU)
    for name in ("matched", "newest"):
        check_tensor(f"guesses.{name}", getattr(guesses, name), (n_rows,), torch.int64, CPU)
    return guesses


def check_window(begin: int, end: int) -> None:
    """Check the first and the last token of a window, by their distance from the newest."""
    if not begin < end <= MAX_GUESSES + 1:
        raise ValueError(f"a window must have begin < end <= {MAX_GUESSES + 1}, got begin {begin} and end {end}")


def check_draws(state: DecodeState, drawn: Tensor, logprobs: Tensor) -> int:
    """Check draws and their log-probabilities (B·S,) after the newest token and S - 1 guesses of B rows -> S."""
    check_tensor("drawn", drawn, ("B·S",), torch.int64, CPU)
    check_tensor("logprobs", logprobs, tuple(drawn.shape), torch.float32, CPU)
    check_output(state, state.rows.shape[0], "V")
    per_row = draws_per_row("drawn", drawn.shape[0], state.rows.shape[0])
    if per_row > MAX_GUESSES + 1:
        raise ValueError(f"drawn must have at most {MAX_GUESSES + 1} tokens a row, got {per_row}")
    return per_row


def check_look_up(n_guesses: int) -> None:
    """Check a number of guesses."""
    if not 0 <= n_guesses <= MAX_GUESSES:
        raise ValueError(f"a row has 0 to {MAX_GUESSES} guesses, got {n_guesses}")


def check_guess(state: DecodeState, number: int, drawn: Tensor) -> int:
    """Check a guess's number and draws (B·S,) of B rows -> S."""
    if not 0 <= number < MAX_GUESSES:
        raise ValueError(f"a row has 1 to {MAX_GUESSES} guesses, got number {number}, counted from 0")
    check_tensor("drawn", drawn, ("B·S",), torch.int64, CPU)
    return draws_per_row("drawn", drawn.shape[0], state.rows.shape[0])
