"""Weights that contradict the configuration give transformers' tokens, or an error that names both."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastllama.checkpoint import open_checkpoint
from tests.support.bad_checkpoints import (
    CONFIG,
    PARAMS,
    SHARDS,
    WEIGHTS,
    edit_shard,
    edit_tensors,
    huggingface,
    indexed,
    meta,
)
from tests.support.checkpoints import write_meta
from tests.support.contradictions import (
    EMBEDDING,
    HF_WEIGHTS,
    LENGTH,
    LLAMA3,
    OUTPUT,
    answers,
    refused,
    stored,
    transformers_answers,
    without,
)

# The output and the embedding

TIED: dict[str, tuple[dict[str, Tensor], dict[str, Any], bool]] = {
    "both stored, different": (HF_WEIGHTS, {"tie_word_embeddings": True}, False),
    "both stored, one row different": (
        {**HF_WEIGHTS, OUTPUT: torch.cat([HF_WEIGHTS[EMBEDDING][:-1], HF_WEIGHTS[OUTPUT][-1:]])},
        {"tie_word_embeddings": True},
        False,
    ),
    "both stored, the same": ({**HF_WEIGHTS, OUTPUT: HF_WEIGHTS[EMBEDDING]}, {"tie_word_embeddings": True}, True),
    "the same, not tied": ({**HF_WEIGHTS, OUTPUT: HF_WEIGHTS[EMBEDDING]}, {"tie_word_embeddings": False}, False),
    "embedding alone": (without(OUTPUT), {"tie_word_embeddings": True}, True),
    "output alone": (without(EMBEDDING), {"tie_word_embeddings": True}, True),
    "not said to be tied": (HF_WEIGHTS, {"tie_word_embeddings": ...}, False),
    "one stored wider": ({**HF_WEIGHTS, OUTPUT: HF_WEIGHTS[EMBEDDING].half()}, {"tie_word_embeddings": True}, False),
    "one stored wider, the same": (
        {**HF_WEIGHTS, EMBEDDING: HF_WEIGHTS[EMBEDDING].half().float(), OUTPUT: HF_WEIGHTS[EMBEDDING].half()},
        {"tie_word_embeddings": True},
        True,
    ),
}


@pytest.mark.parametrize("case", TIED)
def test_a_tied_output_is_read_as_in_transformers(tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    tensors, fields, tied = TIED[case]
    folder = stored(tmp_path, tensors, **fields)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.params["tied_output"] == tied
    assert checkpoint.n_parameters == sum(w.numel() for name, w in HF_WEIGHTS.items() if not (tied and name == OUTPUT))
    warning = (
        f"{folder}/config.json: tie_word_embeddings is true, but lm_head.weight is stored and is not "
        "model.embed_tokens.weight; the stored one is used, as in transformers"
    )
    assert caplog.messages == [warning] * (fields["tie_word_embeddings"] is True and not tied)
    assert answers(folder) == transformers_answers(folder)


@pytest.mark.parametrize("fields", [{"tie_word_embeddings": False}, {"tie_word_embeddings": ...}])
def test_a_missing_output_must_be_tied(tmp_path: Path, fields: dict[str, Any]) -> None:
    start = "{}: the tensors do not match this Llama; 1 missing: "
    why = "config.json does not set tie_word_embeddings to true, so there must be an output"
    alone = "a base model alone (LlamaModel) has none"
    refused(stored(tmp_path, without(OUTPUT), **fields), f"{start}lm_head.weight; {why}: {alone}")
    refused(stored(tmp_path, without(EMBEDDING), **fields), f"{start}model.embed_tokens.weight")


@pytest.mark.parametrize(("shards", "embedding_axis"), [(1, 0), (2, 0), (2, 1), (4, 0)])
@pytest.mark.parametrize("same", [True, False])
def test_metas_tied_output_is_compared(
    tmp_path: Path, shards: int, embedding_axis: int, same: bool, caplog: pytest.LogCaptureFixture
) -> None:
    output = WEIGHTS["tok_embeddings.weight"].clone()
    output[-1, -1] += 0 if same else 1
    weights = {**WEIGHTS, "output.weight": output}
    write_meta(tmp_path / "stated", PARAMS, weights, shards, embedding_axis, tied_output=True)
    write_meta(tmp_path / "plain", PARAMS, weights, shards, embedding_axis)
    checkpoint = open_checkpoint(tmp_path / "stated")
    assert checkpoint.params["tied_output"] == same
    warning = (
        f"{tmp_path}/stated/params.json: tied_output is true, but output.weight is stored and is not "
        "tok_embeddings.weight; the stored one is used"
    )
    assert caplog.messages == [warning] * (not same)
    received = dict(checkpoint.dense_tensors())
    assert all(torch.equal(received[name], weight) for name, weight in weights.items())
    if shards == 2 and embedding_axis == 0:
        assert answers(tmp_path / "stated") == answers(tmp_path / "plain")


# Names: derived buffers, base models, biases, layers

BUFFERS: dict[str, Tensor] = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4, dtype=torch.float64),
    "model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(1, 1, 8, 8),
    "model.layers.1.self_attn.rotary_emb.sin_cached": torch.ones(1, 1, 8, 8, dtype=torch.float64),
    "model.rotary_emb.inv_freq": torch.ones(0),
    "model.rotary_emb.original_inv_freq": torch.zeros(4),
    "model.layers.1.self_attn.rotary_emb._cos_cached_64": torch.ones(8, 8),
    "model.rotary_emb.Sin-cached2": torch.ones(8, 8),
    "rotary_emb.cos_cached": torch.ones(3, dtype=torch.int64),
    "model.layers.0.self_attn.masked_bias": torch.tensor(-1e9),
    "model.layers.0.self_attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
    "model.causal_mask": torch.ones(0, dtype=torch.bool),
    "model.position_ids": torch.ones(1, 8, dtype=torch.int32),
}


def test_derived_buffers_are_ignored(tmp_path: Path) -> None:
    stored(tmp_path, {**HF_WEIGHTS, **BUFFERS})
    assert answers(tmp_path) == transformers_answers(tmp_path)


@pytest.mark.parametrize(("listed_in", "stored_in"), [(0, [0]), (0, []), (None, [1]), (0, [1]), (0, [0, 1])])
def test_an_index_may_be_wrong_about_derived_buffers(
    tmp_path: Path, listed_in: int | None, stored_in: list[int]
) -> None:
    indexed(tmp_path, **({} if listed_in is None else dict.fromkeys(BUFFERS, SHARDS[listed_in])))
    for path in [tmp_path / SHARDS[part] for part in stored_in]:
        save_file({**load_file(path), **BUFFERS}, path)
    assert dict(open_checkpoint(tmp_path).dense_tensors()).keys() == WEIGHTS.keys()


def test_an_index_may_list_a_tied_output_that_is_not_stored(tmp_path: Path) -> None:
    indexed(tmp_path)
    for path in [tmp_path / name for name in SHARDS]:
        save_file({name: tensor for name, tensor in load_file(path).items() if name != OUTPUT}, path)
    refused(tmp_path, f"{{}}/model.safetensors.index.json: lists 1 tensors that are not there: {OUTPUT} in {SHARDS[0]}")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": True}))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.params["tied_output"]
    received = dict(checkpoint.dense_tensors())
    assert torch.equal(received["output.weight"], WEIGHTS["tok_embeddings.weight"])


def test_metas_derived_buffers_are_ignored(tmp_path: Path) -> None:
    buffers = {
        "rope.freqs": torch.ones(4, dtype=torch.complex64),
        "freqs_cis": torch.ones(8, 4, dtype=torch.complex128),
        "layers.0.attention.inner_attention.rope.freqs": torch.ones(4, dtype=torch.int64),
    }
    edit_shard(meta(tmp_path, shards=2), lambda shard: shard.update(buffers))  # and only in one shard
    assert dict(open_checkpoint(tmp_path).dense_tensors()).keys() == WEIGHTS.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rope", [{}, {"rope_scaling": {**LLAMA3, **LENGTH}}], ids=["plain", "scaled"])
@pytest.mark.parametrize("theta", [5e5, 1e4])
def test_frequencies_of_another_rope_give_a_warning(
    tmp_path: Path, dtype: torch.dtype, rope: dict[str, Any], theta: float, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = json.loads(json.dumps({**CONFIG, "rope_theta": theta, **rope}))  # transformers changes its arguments
    frequencies = LlamaRotaryEmbedding(LlamaConfig(**config)).inv_freq.to(dtype)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    stored(tmp_path, {**HF_WEIGHTS, name: frequencies}, **rope)
    scaled = {"use_scaled_rope": True, "rope_original_max_seq_len": 16} if rope else {}
    folder = meta(tmp_path / "meta", shards=2, **scaled)
    for shard in range(2):
        edit_shard(folder, lambda content: content.update({"rope.freqs": frequencies}), shard)
    for place, message in (
        (tmp_path, f"{tmp_path}: rotary_emb.inv_freq"),
        (folder, f"{folder}/consolidated.00.pth: rope.freqs"),
    ):
        caplog.clear()
        open_checkpoint(place)
        warning = (
            "is not what the configuration gives (rope_theta=500000); the configuration is used, as in transformers"
        )
        assert caplog.messages == ([f"{message} {warning}"] if theta != 5e5 else [])


BASE = {name.removeprefix("model."): tensor for name, tensor in without(OUTPUT).items()}


@pytest.mark.parametrize(
    ("tensors", "tied"),
    [
        (BASE, True),
        ({**BASE, OUTPUT: HF_WEIGHTS[OUTPUT]}, False),
        ({**without(OUTPUT), f"model.{OUTPUT}": HF_WEIGHTS[OUTPUT]}, False),
        ({**HF_WEIGHTS, **{name: BASE[name] for name in list(BASE)[:3]}}, None),
    ],
    ids=["base", "base and output", "output inside", "both names"],
)
def test_names_of_a_base_model_are_read_as_in_transformers(
    tmp_path: Path, tensors: dict[str, Tensor], tied: bool | None
) -> None:
    stored(tmp_path, tensors, tie_word_embeddings=bool(tied))
    if tied is None:
        with pytest.raises(ValueError, match=r"model.safetensors: '.*' and '.*' are names of the same tensor$"):
            open_checkpoint(tmp_path)
        return
    assert answers(tmp_path) == transformers_answers(tmp_path)


def test_biases_that_the_config_excludes_are_refused(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    edit_tensors(huggingface(tmp_path), lambda tensors: tensors.update({name: torch.ones(64)}))
    refused(
        tmp_path,
        f"{{}}: the tensors do not match this Llama; 1 unexpected: {name}; "
        "config.json says which biases there are: attention_bias for self_attn, mlp_bias for mlp",
    )
    edit_tensors(tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.bias": tensors.pop(name)}))
    refused(tmp_path, "{}: the tensors do not match this Llama; 1 unexpected: model.layers.0.self_attn.bias")


@pytest.mark.parametrize("stated", [1, 3])
def test_a_wrong_number_of_layers_is_named(tmp_path: Path, stated: int) -> None:
    for folder, field in ((meta(tmp_path / "meta"), "n_layers"), (tmp_path, "num_hidden_layers")):
        path = huggingface(tmp_path) / "config.json" if folder is tmp_path else folder / "params.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), field: stated}))
        with pytest.raises(ValueError, match=rf"9 .*; {path.name} says {field}={stated}, the files have 2 layers$"):
            open_checkpoint(folder)


def test_names_of_other_programs_are_explained(tmp_path: Path) -> None:
    stored(tmp_path, {f"module.{name}": tensor for name, tensor in HF_WEIGHTS.items()})
    with pytest.raises(ValueError, match=r"; names begin with 'module.', a prefix of another program: remove it$"):
        open_checkpoint(tmp_path)
    stored(tmp_path, WEIGHTS)
    with pytest.raises(ValueError, match=r"; these are Meta's names; save them with torch.save as consolidated.00.pth"):
        open_checkpoint(tmp_path)
