"""Hugging Face checkpoints, written by transformers: names, row order, shards, tied outputs, old and new rope."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastllama.checkpoint import open_checkpoint
from tests.support.checkpoints import huggingface_weights, random_weights, share, tiny_params, write_huggingface

PARAMS = tiny_params()
WEIGHTS = random_weights(PARAMS, seed=2)
SHARD_BYTES = 100_000
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}

LLAMA3 = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


def write_plain(folder: Path, **fields: Any) -> Path:
    """WEIGHTS in one file with CONFIG and `fields`; faster than writing through transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **fields}))
    save_file(huggingface_weights(PARAMS, WEIGHTS), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("max_shard_size", ["5GB", SHARD_BYTES], ids=["one_file", "sharded"])
def test_tensors_are_metas_on_any_world_size(tmp_path: Path, max_shard_size: int | str, world_size: int) -> None:
    checkpoint = open_checkpoint(write_huggingface(tmp_path, PARAMS, WEIGHTS, max_shard_size))
    assert checkpoint.format == "huggingface"
    assert (len(checkpoint.files) > 1) == (max_shard_size == SHARD_BYTES)
    for rank in range(world_size):
        received = dict(checkpoint.dense_tensors(rank, world_size))
        assert list(received) == list(WEIGHTS)
        for name, tensor in received.items():
            assert torch.equal(tensor, share(PARAMS, name, WEIGHTS[name], rank, world_size)), name


def test_tensors_give_the_attention_scores_of_rotated_halves(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_huggingface(tmp_path, PARAMS, WEIGHTS))
    theirs = load_file(tmp_path / "model.safetensors")
    ours = dict(checkpoint.dense_tensors())
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    angle = torch.outer(torch.arange(5), 500000.0 ** (-torch.arange(4) / 4)).double()[:, None]  # (N, 1, D/2)

    def rotate(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()

    def halves(weight: Tensor) -> Tensor:
        heads = (x @ weight.double().T).view(5, -1, 2, 4)
        return torch.cat(rotate(heads[:, :, 0], heads[:, :, 1]), dim=-1)

    def pairs(weight: Tensor) -> Tensor:
        heads = (x @ weight.double().T).view(5, -1, 4, 2)
        return torch.stack(rotate(heads[..., 0], heads[..., 1]), dim=-1).flatten(2)

    def scores(q: Tensor, k: Tensor) -> Tensor:
        return torch.einsum("nhd,thd->hnt", q, k.repeat_interleave(4, dim=1))

    prefix = "model.layers.1.self_attn"
    expected = scores(halves(theirs[f"{prefix}.q_proj.weight"]), halves(theirs[f"{prefix}.k_proj.weight"]))
    q, k = (ours[f"layers.1.attention.{part}.weight"] for part in ("wq", "wk"))
    torch.testing.assert_close(scores(pairs(q), pairs(k)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tensors_keep_the_files_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(write_huggingface(tmp_path, PARAMS, WEIGHTS, dtype=dtype))
    assert checkpoint.dtype == dtype
    assert all(torch.equal(tensor, WEIGHTS[name].to(dtype)) for name, tensor in checkpoint.dense_tensors(0, 1))


@pytest.mark.parametrize("tied", [False, True])
def test_tensors_of_float64_are_read_as_float32(tmp_path: Path, tied: bool) -> None:
    params = tiny_params(tied_output=tied)
    weights = random_weights(params, dtype=torch.float64)
    checkpoint = open_checkpoint(write_huggingface(tmp_path, params, weights))
    assert (checkpoint.dtype, checkpoint.params["tied_output"]) == (torch.float32, tied)
    for name, tensor in checkpoint.dense_tensors():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, weights[name].float())


def test_tensors_are_views_where_no_rows_are_permuted(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_plain(tmp_path))
    once, again = dict(checkpoint.dense_tensors(1, 2)), dict(checkpoint.dense_tensors(1, 2))
    copied = {name.split(".")[-2] for name in once if once[name].data_ptr() != again[name].data_ptr()}
    assert copied == {"wq", "wk"}


def test_open_resolves_every_size(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_huggingface(tmp_path, PARAMS, WEIGHTS))
    assert checkpoint.params == {
        **{key: value for key, value in PARAMS.items() if key != "multiple_of"},
        "use_scaled_rope": False,
        "head_dim": 8,
        "hidden_dim": 176,
        "tied_output": False,
        "attention_bias": False,
        "mlp_bias": False,
    }
    assert checkpoint.n_parameters == sum(weight.numel() for weight in WEIGHTS.values())
    file = tmp_path / "model.safetensors"
    assert checkpoint.files == [(file, file.stat().st_size)]


@pytest.mark.parametrize("old_fields", [False, True], ids=["new_fields", "old_fields"])
@pytest.mark.parametrize("factor", [None, 8.0, 32.0])
def test_open_reads_rope(tmp_path: Path, factor: float | None, old_fields: bool) -> None:
    rope: dict[str, Any] = {} if factor is None else {"use_scaled_rope": True, "rope_scaling_factor": factor}
    params = tiny_params(rope_theta=123456.0, **rope)
    checkpoint = open_checkpoint(write_huggingface(tmp_path, params, WEIGHTS, old_fields=old_fields))
    scaled = {"rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0, "rope_original_max_seq_len": 8192}
    expected = {"rope_theta": 123456.0, "use_scaled_rope": False, **rope}
    if factor is not None:
        expected |= scaled
    assert {key: value for key, value in checkpoint.params.items() if "rope" in key} == expected


@pytest.mark.parametrize(
    ("fields", "theta"),
    [
        ({}, 10000.0),
        ({"rope_theta": 5000}, 5000.0),
        ({"rope_scaling": {"type": "default"}, "rope_theta": 5000}, 5000.0),
        ({"rope_scaling": {"rope_type": None}}, 10000.0),
        ({"rope_parameters": {"rope_theta": 7000.0}, "rope_theta": 5000}, 7000.0),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 5000}, 5000.0),
    ],
)
def test_open_reads_unscaled_rope(tmp_path: Path, fields: dict[str, Any], theta: float) -> None:
    params = open_checkpoint(write_plain(tmp_path, **fields)).params
    assert (params["rope_theta"], params["use_scaled_rope"]) == (theta, False)


def test_open_reads_rope_type_under_its_oldest_name(tmp_path: Path) -> None:
    params = open_checkpoint(write_plain(tmp_path, rope_scaling={"type": "llama3", **LLAMA3})).params
    assert params["rope_scaling_factor"] == 8.0


def test_open_uses_old_rope_fields_first_as_transformers_does(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    new = {"rope_type": "llama3", **LLAMA3, "rope_theta": 5000.0}
    fields: dict[str, Any] = {"rope_parameters": new, "rope_scaling": {**new, "factor": 32.0}}
    assert LlamaConfig.from_dict({**CONFIG, **fields}).rope_parameters["factor"] == 32.0
    params = open_checkpoint(write_plain(tmp_path, **fields)).params
    assert (params["rope_scaling_factor"], params["rope_theta"]) == (32.0, 5000.0)


@pytest.mark.parametrize("max_shard_size", ["5GB", SHARD_BYTES], ids=["one_file", "sharded"])
def test_open_ties_the_output_without_lm_head(tmp_path: Path, max_shard_size: int | str) -> None:
    params = tiny_params(tied_output=True)
    weights = random_weights(params)
    checkpoint = open_checkpoint(write_huggingface(tmp_path, params, weights, max_shard_size))
    assert "lm_head" not in "".join(str(load_file(path).keys()) for path, _ in checkpoint.files)
    assert checkpoint.params["tied_output"]
    assert checkpoint.n_parameters == sum(w.numel() for name, w in weights.items() if name != "output.weight")
    for rank in range(2):
        received = dict(checkpoint.dense_tensors(rank, 2))
        assert torch.equal(received["output.weight"], share(params, "output.weight", weights["output.weight"], rank, 2))


def test_open_uses_explicit_head_dim_and_width(tmp_path: Path) -> None:
    params = tiny_params(head_dim=32, hidden_dim=72)
    weights = random_weights(params)
    checkpoint = open_checkpoint(write_huggingface(tmp_path, params, weights))
    assert (checkpoint.params["head_dim"], checkpoint.params["hidden_dim"]) == (32, 72)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in checkpoint.dense_tensors())


def test_open_reads_the_vocabulary_size_from_the_embedding(tmp_path: Path) -> None:
    assert open_checkpoint(write_plain(tmp_path)).params["vocab_size"] == PARAMS["vocab_size"]


def test_open_ignores_inverse_frequencies(tmp_path: Path) -> None:
    write_plain(tmp_path)
    path = tmp_path / "model.safetensors"
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4, dtype=torch.float64)}
    save_file({**load_file(path), **buffer}, path)
    assert len(list(open_checkpoint(tmp_path).dense_tensors())) == len(WEIGHTS)


def test_open_reads_files_without_an_index(tmp_path: Path) -> None:
    write_huggingface(tmp_path, PARAMS, WEIGHTS, SHARD_BYTES)
    (tmp_path / "model.safetensors.index.json").unlink()
    received = dict(open_checkpoint(tmp_path).dense_tensors())
    assert all(torch.equal(received[name], weight) for name, weight in WEIGHTS.items())


@pytest.mark.parametrize(
    ("in_generation", "in_config", "expected"),
    [
        (128009, 1, (128009,)),
        ([128001, 128008, 128009], 1, (128001, 128008, 128009)),
        (None, [5, 6], (5, 6)),
        ("absent", 7, (7,)),
        ("absent", None, ()),
    ],
)
def test_open_reads_stop_tokens(tmp_path: Path, in_generation: Any, in_config: Any, expected: tuple[int, ...]) -> None:
    write_plain(tmp_path, eos_token_id=in_config)
    if in_generation != "absent":
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": in_generation}))
    assert open_checkpoint(tmp_path).stop_token_ids == expected


def test_write_huggingface_states_stop_tokens(tmp_path: Path) -> None:
    write_huggingface(tmp_path, PARAMS, WEIGHTS, eos_token_id=[5, 6])
    assert open_checkpoint(tmp_path).stop_token_ids == (5, 6)
