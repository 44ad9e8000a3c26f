"""Configuration against weights: what transformers makes of it, token by token, or an error that names both."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastllama import Llama
from fastllama.checkpoint import open_checkpoint
from tests.bad_checkpoints import CONFIG, PARAMS, SHARDS, WEIGHTS, edit_shard, edit_tensors, huggingface, indexed, meta
from tests.checkpoints import huggingface_weights, tiny_params, write_meta, write_tokenizer

PROMPTS = [[5, 250, 17, 300, 41], [9], [101, 3, 77, 512]]
MAX_GEN_LEN = 24
THEIRS = huggingface_weights(PARAMS, WEIGHTS)
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LENGTH = {"original_max_position_embeddings": 16}


def answers(folder: Path) -> list[list[int]]:
    """Greedy tokens for PROMPTS, with no stop tokens."""
    tokenizer = folder if (folder / "tokenizer.model").exists() else write_tokenizer(folder)
    llm = Llama.build(str(folder), str(tokenizer), 64, len(PROMPTS), device="cpu")
    llm.tokenizer.stop_tokens = set()
    return llm.generate(PROMPTS, MAX_GEN_LEN, temperature=0)[0]


def their_answers(folder: Path) -> list[list[int]]:
    """What transformers generates from the same folder."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    outputs = []
    with torch.inference_mode():
        for prompt in PROMPTS:
            tokens = model.generate(torch.tensor([prompt]), max_new_tokens=MAX_GEN_LEN, do_sample=False)
            outputs.append(tokens[0, len(prompt) :].tolist())
    return outputs


def stored(folder: Path, tensors: dict[str, Tensor], **fields: Any) -> Path:
    """A folder with just these tensors under CONFIG and `fields`; a field given as `...` is left out."""
    config = {key: value for key, value in {**CONFIG, **fields}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    copies = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(copies, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def refused(folder: Path, message: str) -> None:
    """Opening is refused with just this message, in which {} is the folder."""
    with pytest.raises(ValueError, match=f"^{re.escape(message.format(folder))}$"):
        open_checkpoint(folder)


def without(*names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in THEIRS.items() if name not in names}


# The output and the embedding

TIED: dict[str, tuple[dict[str, Tensor], dict[str, Any], bool]] = {
    "both stored, different": (THEIRS, {"tie_word_embeddings": True}, False),
    "both stored, one row different": (
        {**THEIRS, OUTPUT: torch.cat([THEIRS[EMBEDDING][:-1], THEIRS[OUTPUT][-1:]])},
        {"tie_word_embeddings": True},
        False,
    ),
    "both stored, the same": ({**THEIRS, OUTPUT: THEIRS[EMBEDDING]}, {"tie_word_embeddings": True}, True),
    "the same, not tied": ({**THEIRS, OUTPUT: THEIRS[EMBEDDING]}, {"tie_word_embeddings": False}, False),
    "embedding alone": (without(OUTPUT), {"tie_word_embeddings": True}, True),
    "output alone": (without(EMBEDDING), {"tie_word_embeddings": True}, True),
    "not said to be tied": (THEIRS, {"tie_word_embeddings": ...}, False),
    "one stored wider": ({**THEIRS, OUTPUT: THEIRS[EMBEDDING].half()}, {"tie_word_embeddings": True}, False),
    "one stored wider, the same": (
        {**THEIRS, EMBEDDING: THEIRS[EMBEDDING].half().float(), OUTPUT: THEIRS[EMBEDDING].half()},
        {"tie_word_embeddings": True},
        True,
    ),
}


@pytest.mark.parametrize("case", TIED)
def test_a_tied_output_is_what_transformers_takes(tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    tensors, fields, tied = TIED[case]
    folder = stored(tmp_path, tensors, **fields)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.params["tied_output"] == tied
    assert checkpoint.n_parameters == sum(w.numel() for name, w in THEIRS.items() if not (tied and name == OUTPUT))
    warning = (
        f"{folder}/config.json: tie_word_embeddings is true, but lm_head.weight is stored and is not "
        "model.embed_tokens.weight; the stored one is used, as in transformers"
    )
    assert caplog.messages == [warning] * (fields["tie_word_embeddings"] is True and not tied)
    assert answers(folder) == their_answers(folder)


@pytest.mark.parametrize("fields", [{"tie_word_embeddings": False}, {"tie_word_embeddings": ...}])
def test_an_output_that_is_not_there_must_be_tied(tmp_path: Path, fields: dict[str, Any]) -> None:
    start = "{}: the tensors are not those of this Llama; 1 missing: "
    why = "config.json does not say tie_word_embeddings true, so there must be an output"
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
    received = dict(checkpoint.tensors())
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
    stored(tmp_path, {**THEIRS, **BUFFERS})
    assert answers(tmp_path) == their_answers(tmp_path)


@pytest.mark.parametrize(("listed_in", "stored_in"), [(0, [0]), (0, []), (None, [1]), (0, [1]), (0, [0, 1])])
def test_an_index_need_not_be_right_about_derived_buffers(
    tmp_path: Path, listed_in: int | None, stored_in: list[int]
) -> None:
    indexed(tmp_path, **({} if listed_in is None else dict.fromkeys(BUFFERS, SHARDS[listed_in])))
    for path in [tmp_path / SHARDS[part] for part in stored_in]:
        save_file({**load_file(path), **BUFFERS}, path)
    assert dict(open_checkpoint(tmp_path).tensors()).keys() == WEIGHTS.keys()


def test_an_index_may_list_a_tied_output_that_is_not_stored(tmp_path: Path) -> None:
    indexed(tmp_path)
    for path in [tmp_path / name for name in SHARDS]:
        save_file({name: tensor for name, tensor in load_file(path).items() if name != OUTPUT}, path)
    refused(tmp_path, f"{{}}/model.safetensors.index.json: lists 1 tensors that are not there: {OUTPUT} in {SHARDS[0]}")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": True}))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.params["tied_output"]
    received = dict(checkpoint.tensors())
    assert torch.equal(received["output.weight"], WEIGHTS["tok_embeddings.weight"])


def test_metas_derived_buffers_are_ignored(tmp_path: Path) -> None:
    buffers = {
        "rope.freqs": torch.ones(4, dtype=torch.complex64),
        "freqs_cis": torch.ones(8, 4, dtype=torch.complex128),
        "layers.0.attention.inner_attention.rope.freqs": torch.ones(4, dtype=torch.int64),
    }
    edit_shard(meta(tmp_path, shards=2), lambda shard: shard.update(buffers))  # and only in one shard
    assert dict(open_checkpoint(tmp_path).tensors()).keys() == WEIGHTS.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rope", [{}, {"rope_scaling": {**LLAMA3, **LENGTH}}], ids=["plain", "scaled"])
@pytest.mark.parametrize("theta", [5e5, 1e4])
def test_frequencies_of_another_rope_are_warned_of(
    tmp_path: Path, dtype: torch.dtype, rope: dict[str, Any], theta: float, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = json.loads(json.dumps({**CONFIG, "rope_theta": theta, **rope}))  # transformers changes what it is given
    frequencies = LlamaRotaryEmbedding(LlamaConfig(**config)).inv_freq.to(dtype)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    stored(tmp_path, {**THEIRS, name: frequencies}, **rope)
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
        ({**BASE, OUTPUT: THEIRS[OUTPUT]}, False),
        ({**without(OUTPUT), f"model.{OUTPUT}": THEIRS[OUTPUT]}, False),
        ({**THEIRS, **{name: BASE[name] for name in list(BASE)[:3]}}, None),
    ],
    ids=["base", "base and output", "output inside", "both names"],
)
def test_names_of_a_base_model_are_taken_as_transformers_does(
    tmp_path: Path, tensors: dict[str, Tensor], tied: bool | None
) -> None:
    stored(tmp_path, tensors, tie_word_embeddings=bool(tied))
    if tied is None:
        with pytest.raises(ValueError, match=r"model.safetensors: '.*' and '.*' are the same tensor's names$"):
            open_checkpoint(tmp_path)
        return
    assert answers(tmp_path) == their_answers(tmp_path)


def test_biases_that_the_config_denies_are_refused(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    edit_tensors(huggingface(tmp_path), lambda tensors: tensors.update({name: torch.ones(64)}))
    refused(
        tmp_path,
        f"{{}}: the tensors are not those of this Llama; 1 unexpected: {name}; "
        "config.json says nothing of biases (attention_bias, mlp_bias), and Llama 3 has none",
    )
    edit_tensors(tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.bias": tensors.pop(name)}))
    refused(tmp_path, "{}: the tensors are not those of this Llama; 1 unexpected: model.layers.0.self_attn.bias")


@pytest.mark.parametrize("stated", [1, 3])
def test_another_number_of_layers_is_named(tmp_path: Path, stated: int) -> None:
    for folder, field in ((meta(tmp_path / "meta"), "n_layers"), (tmp_path, "num_hidden_layers")):
        path = huggingface(tmp_path) / "config.json" if folder is tmp_path else folder / "params.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), field: stated}))
        with pytest.raises(ValueError, match=rf"9 .*; {path.name} says {field}={stated}, the files have 2 layers$"):
            open_checkpoint(folder)


def test_names_of_other_programs_are_explained(tmp_path: Path) -> None:
    stored(tmp_path, {f"module.{name}": tensor for name, tensor in THEIRS.items()})
    with pytest.raises(ValueError, match=r"; names begin with 'module.', which another program has put there: remove"):
        open_checkpoint(tmp_path)
    stored(tmp_path, WEIGHTS)
    with pytest.raises(ValueError, match=r"; these are Meta's names; save them with torch.save as consolidated.00.pth"):
        open_checkpoint(tmp_path)


# Rope in config.json

ROPES: list[dict[str, Any]] = [
    {},
    {"rope_theta": ...},
    {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 70.0}},
    {"rope_theta": ..., "rope_parameters": {"rope_theta": 70.0}, "rope_scaling": {"rope_type": "default"}},
    {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 70.0}, "rope_scaling": {}},
    {"rope_theta": 5e5, "rope_parameters": {**LLAMA3, **LENGTH}, "rope_scaling": {"rope_theta": 70.0}},
    {"rope_scaling": LLAMA3, "max_position_embeddings": 32},
    {"rope_scaling": LLAMA3},
    {"rope_scaling": {**LLAMA3, **LENGTH}, "original_max_position_embeddings": 256},
    {"rope_scaling": {**LLAMA3, **LENGTH, "rope_theta": 70.0}},
    {"rope_scaling": {"factor": 8.0}},
    {"rope_scaling": {"rope_type": "default", "type": "llama3", "factor": 8.0}},
    {"rope_scaling": {**LLAMA3, **LENGTH, "type": "linear", "attention_factor": 3.0}},
]


@pytest.mark.parametrize("fields", ROPES, ids=range(len(ROPES)))
def test_rope_is_read_as_transformers_reads_it(tmp_path: Path, fields: dict[str, Any]) -> None:
    from transformers import LlamaConfig

    path = stored(tmp_path, THEIRS, **fields) / "config.json"
    theirs = LlamaConfig.from_pretrained(tmp_path)
    theirs.standardize_rope_params()  # as its rotary embedding does
    rope = theirs.rope_parameters
    ours = open_checkpoint(tmp_path).params
    scaled = rope["rope_type"] == "llama3"
    assert (ours["rope_theta"], ours["use_scaled_rope"]) == (rope["rope_theta"], scaled)
    if scaled:
        assert ours["rope_original_max_seq_len"] == rope["original_max_position_embeddings"]
        assert ours["rope_scaling_factor"] == rope["factor"]
        if "type" not in fields["rope_scaling"]:
            assert answers(tmp_path) == their_answers(tmp_path)
    assert path.exists()


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5}}, None),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
            "rope_parameters.rope_theta=500000 is used, not rope_theta=10000, as in transformers",
        ),
        (
            {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"rope_type": "default"}},
            "rope_scaling and rope_parameters differ; rope_scaling is used, as in transformers",
        ),
        (
            {"rope_scaling": {**LLAMA3, **LENGTH}, "original_max_position_embeddings": 256},
            "original_max_position_embeddings=256 is used, not rope_scaling.original_max_position_embeddings=16, "
            "as in transformers",
        ),
        (
            {"rope_scaling": {"factor": 8.0, "beta": None}},
            "rope_scaling.factor has no effect with rope_type 'default'",
        ),
    ],
)
def test_rope_fields_that_lose_are_warned_of(
    tmp_path: Path, fields: dict[str, Any], warning: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    open_checkpoint(huggingface(tmp_path, **fields))
    assert caplog.messages == ([f"{tmp_path}/config.json: {warning}"] if warning else [])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor': expected 1 (Llama rotates whole heads), got 0.5"),
        (
            {"partial_rotary_factor": 1.0, "rope_scaling": {"partial_rotary_factor": 0.25}},
            "'rope_scaling.partial_rotary_factor': expected 1 (Llama rotates whole heads), got 0.25",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
            "'rope_parameters.full_attention': expected a number or a name (Llama's layers all rotate alike), "
            "got {'rope_theta': 1.0}",
        ),
    ],
)
def test_rope_that_llama_has_not_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    folder = huggingface(tmp_path, **fields)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{folder}/config.json: field {message}')}$"):
        open_checkpoint(folder)


# params.json


@pytest.mark.parametrize("field", ["rope_scaling_factor", "rope_original_max_seq_len", "rope_high_freq_factor"])
def test_a_scaling_that_no_one_switched_on_is_refused(tmp_path: Path, field: str) -> None:
    refused(
        meta(tmp_path, **{field: 32}),
        f"{{}}/params.json: field 'use_scaled_rope': expected true or false beside {field}, it is missing",
    )


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ({"use_scaled_rope": False, "rope_original_max_seq_len": 4096, "rope_scaling_factor": 1.0}, None),
        (
            {"use_scaled_rope": False, "rope_scaling_factor": 32},
            "use_scaled_rope is false, so rope_scaling_factor=32.0 has no effect",
        ),
        ({"hidden_dim": 176, "ffn_dim_multiplier": 1.0}, None),
        (
            {"hidden_dim": 176, "ffn_dim_multiplier": 1.3},
            "hidden_dim=176 is used; ffn_dim_multiplier and multiple_of would give 224",
        ),
    ],
)
def test_fields_of_params_that_lose_are_warned_of(
    tmp_path: Path, fields: dict[str, Any], warning: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    params = open_checkpoint(meta(tmp_path, **fields)).params
    assert params["hidden_dim"] == 176 and not params["use_scaled_rope"]
    assert caplog.messages == ([f"{tmp_path}/params.json: {warning}"] if warning else [])


def test_the_arguments_of_a_model_may_be_its_params(tmp_path: Path) -> None:
    from fastllama.args import ModelArgs

    args = vars(ModelArgs(**tiny_params()))
    assert dict(open_checkpoint(meta(tmp_path, **args)).tensors()).keys() == WEIGHTS.keys()


def test_rope_factors_in_the_wrong_order_are_refused(tmp_path: Path) -> None:
    refused(
        meta(tmp_path, use_scaled_rope=True, rope_low_freq_factor=4.0),
        "{}/params.json: expected rope_high_freq_factor above rope_low_freq_factor, got 4.0 and 4.0",
    )


# A key that stands twice


@pytest.mark.parametrize("name", ["params.json", "config.json", "generation_config.json"])
def test_a_key_with_two_values_is_refused(tmp_path: Path, name: str) -> None:
    (meta if name == "params.json" else huggingface)(tmp_path)
    path = tmp_path / name
    right = path.read_text() if path.exists() else '{"eos_token_id": 5}'
    path.write_text(right.replace("{", '{"a": {"b": 1, "b": 1}, "rope_theta": 1, "rope_theta": 2.5, ', 1))
    refused(
        tmp_path, f"{{}}/{name}: 'rope_theta' stands there twice, as 1 and as 2.5; remove the one that is not meant"
    )
    path.write_text(right.replace("{", '{"pad_token_id": {"b": true, "b": 1}, ', 1))
    refused(tmp_path, f"{{}}/{name}: 'b' stands there twice, as True and as 1; remove the one that is not meant")
    first = right.removeprefix("{").split(",")[0].rstrip("}")
    path.write_text(right.replace("{", "{" + first + ", ", 1))
    assert open_checkpoint(tmp_path).params["dim"] == 64


def test_an_index_that_places_a_tensor_twice_is_refused(tmp_path: Path) -> None:
    path = indexed(tmp_path) / "model.safetensors.index.json"
    path.write_text(path.read_text().replace('{"weight_map": {', '{"weight_map": {"lm_head.weight": "b.safetensors", '))
    with pytest.raises(ValueError, match=r"index.json: 'lm_head.weight' stands there twice, as 'b.safetensors' and as"):
        open_checkpoint(tmp_path)
