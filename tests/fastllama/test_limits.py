"""The memory plan: it counts what is allocated, and says what would fit."""

from typing import Any

import pytest
import torch

from fastllama import ModelArgs, Transformer
from fastllama.limits import DoesNotFit, check_fits, memory_plan
from tests.checkpoints import tiny_params


def published(**changes: Any) -> ModelArgs:
    fields = {
        "dim": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 8,
        "ffn_dim_multiplier": 1.3,
        "multiple_of": 1024,
    }
    return ModelArgs(vocab_size=128256, **(fields | changes))


def test_plan_of_llama3_8b() -> None:
    plan = memory_plan(published(), torch.bfloat16, max_batch_size=1, max_seq_len=8192)
    assert plan.weights == 8_030_261_248 * 2 + 8192 * 128 * 4
    assert plan.cache == 8192 * 131_072
    assert plan.total == plan.weights + plan.cache + plan.workspace and plan.workspace < 2 * 2**30


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_plan_counts_what_a_model_allocates(dtype: torch.dtype) -> None:
    args = ModelArgs(max_batch_size=3, max_seq_len=40, **tiny_params())
    model = Transformer(args, dtype=dtype)
    plan = memory_plan(args, dtype, 3, 40)
    tensors = [*model.parameters(), model.rope]
    assert plan.weights == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert plan.cache == sum(tensor.numel() * tensor.element_size() for tensor in (model.cache.k, model.cache.v))


def test_a_shared_tied_output_counts_once() -> None:
    args = published(tied_output=True)
    apart = memory_plan(args, torch.bfloat16, 1, 128)
    shared = memory_plan(args, torch.bfloat16, 1, 128, shares_tied_output=True)
    assert apart.weights - shared.weights == 128256 * 4096 * 2


def test_error_names_the_largest_sizes_that_fit() -> None:
    args = published(max_batch_size=32, max_seq_len=8192)
    free = 24 * 2**30
    with pytest.raises(DoesNotFit) as caught:
        check_fits(args, torch.bfloat16, free)
    message = str(caught.value)
    rows = int(message.split("max_batch_size=")[2].split()[0])
    length = int(message.split("max_seq_len=")[2].split()[0])
    assert memory_plan(args, torch.bfloat16, rows, 8192).total <= free
    assert memory_plan(args, torch.bfloat16, rows + 1, 8192).total > free
    assert memory_plan(args, torch.bfloat16, 32, length).total <= free
    assert memory_plan(args, torch.bfloat16, 32, length + 1).total > free
    with pytest.raises(DoesNotFit, match="not even one row of one token"):
        check_fits(args, torch.bfloat16, 2**30)


def test_what_fits_is_planned() -> None:
    args = published(max_batch_size=1, max_seq_len=128)
    assert check_fits(args, torch.bfloat16, 40 * 2**30) == memory_plan(args, torch.bfloat16, 1, 128)
