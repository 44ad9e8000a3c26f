"""The embedding: rows of a table by token id.

    h[n] = table[clamp(tokens[n], 0, V - 1)]
    h[n] = table[tokens[n] - begin], or 0 where there is no such row       if the table is a slice of the vocabulary

tokens (N,) int64, table (V, E), h (N, E). Moves 2·N·E elements. An id outside the vocabulary reads the first or last
row (in a slice: zeros), so that a wrong id cannot crash the process. The caller checks ids and reports them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllama.kernels.launch.checks import check_model_dtype, check_tensor
from fastllama.kernels.launch.dependent import dependent_launch, wait_for_inputs
from fastllama.kernels.launch.sizes import next_power_of_2
from fastllama.kernels.rms_norm import warps_for


@triton.jit(do_not_specialize=["begin"], do_not_specialize_on_alignment=["tokens_ptr"])
def _embed_kernel(
    tokens_ptr,
    table_ptr,
    h_ptr,
    begin,
    SLICE: tl.constexpr,
    V: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    wait_for_inputs(DEPENDENT)
    token = tl.program_id(0)
    cols = tl.arange(0, BLOCK_E)
    live = cols < E
    index = tl.load(tokens_ptr + token)
    if SLICE:
        index -= begin
        live &= (index >= 0) & (index < V)
    index = tl.minimum(tl.maximum(index, 0), V - 1)
    row = tl.load(table_ptr + index * E + cols, mask=live, other=0.0)
    tl.store(h_ptr + token.to(tl.int64) * E + cols, row, mask=cols < E)


def embed(table: Tensor, tokens: Tensor, begin: int | None = None) -> Tensor:
    """Gather rows: table (V, E), tokens (N,) int64 -> h (N, E). Raises ValueError if tensors do not match.

    begin: the first id of the table if it is a slice of the vocabulary.
    """
    check_model_dtype("table", table)
    check_tensor("table", table, ("V", "E"), table.dtype, table.device)
    check_tensor("tokens", tokens, ("N",), torch.int64, table.device)
    n_tokens, (n_rows, width) = tokens.shape[0], table.shape
    h = torch.empty(n_tokens, width, dtype=table.dtype, device=table.device)
    block = next_power_of_2(width)
    if n_tokens:
        _embed_kernel[(n_tokens,)](
            tokens,
            table,
            h,
            begin or 0,
            SLICE=begin is not None,
            V=n_rows,
            E=width,
            BLOCK_E=block,
            num_warps=warps_for(block),
            **dependent_launch(),
        )
    return h
