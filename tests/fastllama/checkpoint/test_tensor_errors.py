"""Errors for tensors that do not match the model, and for indexes that do not match the files; they name both."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastllama.checkpoint import open_checkpoint
from tests.support.bad_checkpoints import (
    PARAMS,
    SHARDS,
    edit_shard,
    edit_tensors,
    good,
    huggingface,
    indexed,
    meta,
    next_call_works,
    refused,
    without,
)

__all__ = ["good", "next_call_works"]  # fixtures

# Tensors: names, shapes, dtypes


@pytest.mark.parametrize("shards", [1, 2])
def test_open_lists_missing_and_unexpected_tensors(tmp_path: Path, shards: int) -> None:
    meta(tmp_path, shards)
    for shard in range(shards):
        edit_shard(tmp_path, lambda content: content.update(extra=content.pop("norm.weight")), shard)
    refused(tmp_path, "1 missing: norm.weight", "1 unexpected: extra")


def test_open_shortens_long_lists(tmp_path: Path) -> None:
    message = refused(meta(tmp_path, n_layers=4), "18 missing: layers.2.attention_norm.weight", "and 10 more")
    assert "layers.3.ffn_norm" not in message
    refused(meta(tmp_path, n_layers=1), "9 unexpected: layers.1.attention_norm.weight", "and 1 more")


def test_open_rejects_a_missing_output_that_is_not_tied(tmp_path: Path) -> None:
    edit_shard(meta(tmp_path), without("output.weight"))
    refused(tmp_path, "1 missing: output.weight")
    edit_shard(tmp_path, without("tok_embeddings.weight"))
    refused(tmp_path, "2 missing: tok_embeddings.weight, output.weight")


def reshaped(name: str, *shape: int) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({name: torch.ones(shape)})


@pytest.mark.parametrize("shape", [(64, 8), (8, 64), (16, 64, 1), (1024,), (), (17, 64), (64, 64)], ids=str)
def test_open_rejects_misshaped_tensors(tmp_path: Path, shape: tuple[int, ...]) -> None:
    edit_shard(meta(tmp_path), reshaped("layers.1.attention.wk.weight", *shape))
    refused(tmp_path, "layers.1.attention.wk.weight: expected (16, 64), got (", "for 1 joined shards")


@pytest.mark.parametrize("name", ["norm.weight", "layers.0.ffn_norm.weight"])
@pytest.mark.parametrize("shape", [(), (63,), (64, 1)], ids=str)
def test_open_rejects_misshaped_norms(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    edit_shard(meta(tmp_path), reshaped(name, *shape))
    refused(tmp_path, f"{name}: expected (64,), got {shape}")


@pytest.mark.parametrize("stated", [PARAMS["vocab_size"], -1])
@pytest.mark.parametrize("shape", [(576, 65), (64,), (), (3, 64, 64), (64, 576)], ids=str)
def test_open_rejects_a_misshaped_embedding(tmp_path: Path, shape: tuple[int, ...], stated: int) -> None:
    edit_shard(meta(tmp_path, vocab_size=stated), reshaped("tok_embeddings.weight", *shape))
    refused(tmp_path, "tok_embeddings.weight: expected (", "64) from 1 shards", str(tmp_path), str(shape))


def test_open_rejects_another_vocabulary(tmp_path: Path) -> None:
    refused(meta(tmp_path, vocab_size=575), "tok_embeddings.weight: expected (575, 64)", "(576, 64)")


def test_open_rejects_another_hidden_dim(tmp_path: Path) -> None:
    refused(meta(tmp_path, multiple_of=256), "feed_forward.w1.weight: expected (256, 64), got (176, 64)")


def test_open_rejects_another_number_of_kv_heads(tmp_path: Path) -> None:
    refused(meta(tmp_path, n_kv_heads=1), "attention.wk.weight: expected (8, 64), got (16, 64)")
    refused(
        meta(tmp_path, 2, n_kv_heads=4), "attention.wk.weight: expected (32, 64), got (16, 64)", "for 2 joined shards"
    )


def test_open_rejects_a_missing_shard(tmp_path: Path) -> None:
    (meta(tmp_path, shards=4) / "consolidated.01.pth").unlink()
    refused(tmp_path, "shards are missing: consolidated.01.pth")
    (tmp_path / "consolidated.02.pth").unlink()
    (tmp_path / "consolidated.03.pth").unlink()
    refused(tmp_path, "tok_embeddings.weight", "1 shards")


def test_open_rejects_shards_that_disagree(tmp_path: Path) -> None:
    edit_shard(meta(tmp_path, shards=2), without("norm.weight"), shard=1)
    refused(tmp_path, "consolidated.01.pth", "differ in norm.weight")
    edit_shard(meta(tmp_path, shards=2), reshaped("norm.weight", 32), shard=1)
    refused(tmp_path, "consolidated.01.pth", "norm.weight: (64,) torch.float32 there, (32,) torch.float32 here")
    edit_shard(meta(tmp_path, shards=2), lambda shard: shard.update({"norm.weight": torch.ones(64).half()}), shard=1)
    refused(tmp_path, "consolidated.01.pth", "(64,) torch.float16 here")


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.float8_e4m3fn, torch.complex128, torch.complex64, torch.bool], ids=str
)
def test_open_rejects_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    name = "layers.0.attention.wq.weight"
    edit_shard(meta(tmp_path), lambda shard: shard.update({name: shard[name].to(dtype)}))
    refused(tmp_path, "consolidated.00.pth", f"{name} ({str(dtype).removeprefix('torch.')})", "bfloat16")


@pytest.mark.parametrize(
    "tensor",
    [torch.empty(0, 64), torch.empty(64, 64, device="meta"), torch.ones(64, 64).to_sparse()],
    ids=["empty", "meta", "sparse"],
)
def test_open_rejects_tensors_without_data(tmp_path: Path, tensor: torch.Tensor) -> None:
    edit_shard(meta(tmp_path), lambda shard: shard.update({"layers.0.attention.wq.weight": tensor}))
    refused(tmp_path, "consolidated.00.pth", "layers.0.attention.wq.weight")


def test_open_lists_missing_and_unexpected_tensors_of_huggingface(tmp_path: Path) -> None:
    edit_tensors(huggingface(tmp_path), lambda tensors: tensors.update(extra=tensors.pop("lm_head.weight")))
    refused(tmp_path, "1 missing: lm_head.weight", "1 unexpected: extra")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.1.self_attn.k_proj.weight", (64, 16)),
        ("model.layers.0.mlp.down_proj.weight", (64, 175)),
        ("model.norm.weight", ()),
        ("model.embed_tokens.weight", (575, 64)),
    ],
)
def test_open_rejects_misshaped_tensors_of_huggingface(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    edit_tensors(huggingface(tmp_path), reshaped(name, *shape))
    refused(tmp_path, f"{name}: expected (", f"got {shape}")


@pytest.mark.parametrize("shape", [(), (576,), (576, 65)], ids=str)
def test_open_rejects_an_embedding_without_a_vocabulary_size(tmp_path: Path, shape: tuple[int, ...]) -> None:
    edit_tensors(huggingface(tmp_path, vocab_size=...), reshaped("model.embed_tokens.weight", *shape))
    refused(tmp_path, "model.embed_tokens.weight: expected (V, 64)", str(shape))


@pytest.mark.parametrize(
    ("dtype", "named"),
    [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.bool, "BOOL")],
)
def test_open_rejects_other_dtypes_of_huggingface(tmp_path: Path, dtype: torch.dtype, named: str) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(huggingface(tmp_path), lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    refused(tmp_path, f"{name} ({named})", "quantised")


def test_open_rejects_empty_tensors_of_huggingface(tmp_path: Path) -> None:
    refused(edit_tensors(huggingface(tmp_path), reshaped("lm_head.weight", 0, 64)), "lm_head.weight (0, 64)")


# The index


def test_open_rejects_a_file_missing_from_the_index(tmp_path: Path) -> None:
    (indexed(tmp_path) / SHARDS[1]).unlink()
    refused(tmp_path, "model.safetensors.index.json", f"files are missing from the folder: {SHARDS[1]}")


@pytest.mark.parametrize("file", ["x" * 300, "\ud800", "a\0b"], ids=["long", "surrogate", "nul"])
def test_open_rejects_impossible_file_names(tmp_path: Path, file: str) -> None:
    refused(indexed(tmp_path, **{"lm_head.weight": file}), "model.safetensors.index.json", "files are missing")


def test_open_rejects_an_index_that_names_absent_tensors(tmp_path: Path) -> None:
    indexed(tmp_path, **{"lm_head.weight": SHARDS[1], "model.layers.2.mlp.up_proj.weight": SHARDS[0]})
    names = f"lm_head.weight in {SHARDS[1]}, model.layers.2.mlp.up_proj.weight in {SHARDS[0]}"
    refused(tmp_path, "model.safetensors.index.json", f"lists 2 tensors that are not there: {names}")


def test_open_rejects_tensors_that_the_index_leaves_out(tmp_path: Path) -> None:
    path = indexed(tmp_path) / SHARDS[0]
    save_file({**load_file(path), "extra": torch.ones(2)}, path)
    refused(tmp_path, "model.safetensors.index.json", f"does not list 1 tensors that are there: extra in {SHARDS[0]}")


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "", 7, None, ["a"]], ids=str)
def test_open_rejects_an_index_with_invalid_file_names(tmp_path: Path, file: Any) -> None:
    indexed(tmp_path, **{"lm_head.weight": file})
    refused(tmp_path, "model.safetensors.index.json", "'weight_map.lm_head.weight'", "in the same folder")


@pytest.mark.parametrize("weight_map", [None, {}, [], "all"], ids=str)
def test_open_rejects_an_index_without_a_map(tmp_path: Path, weight_map: Any) -> None:
    (indexed(tmp_path) / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(tmp_path, "model.safetensors.index.json", "'weight_map'")


def test_open_rejects_the_same_tensor_twice(tmp_path: Path) -> None:
    (indexed(tmp_path) / "model.safetensors.index.json").unlink()
    for name, copy in zip(SHARDS, ("a", "b"), strict=True):
        (tmp_path / name).rename(tmp_path / f"{copy}.safetensors")
    assert len(open_checkpoint(tmp_path).files) == 2  # files with complete tensors need no order
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "z.safetensors")
    refused(tmp_path, "z.safetensors", "is also in a.safetensors")
