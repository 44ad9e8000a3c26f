"""Everything that can be wrong with a checkpoint: an error of the promised type that names the file and the field."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastllama.checkpoint import open_checkpoint
from tests.checkpoints import huggingface_weights, random_weights, tiny_params, write_meta

PARAMS = tiny_params()
WEIGHTS = random_weights(PARAMS, seed=3)
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": PARAMS["vocab_size"],
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_meta(tmp_path_factory.mktemp("good"), PARAMS, WEIGHTS, shards=2)


@pytest.fixture(autouse=True)
def next_call_works(good: Path) -> Iterator[None]:
    """After every error a good checkpoint opens as ever."""
    yield
    assert len(list(open_checkpoint(good).tensors())) == len(WEIGHTS)


def refused(folder: Path, *mentions: str, error: type[Exception] = ValueError) -> str:
    """The message of the one-line error that opening raises; it must contain all of `mentions`."""
    with pytest.raises(error) as caught:
        open_checkpoint(folder)
    assert type(caught.value) is error
    message = str(caught.value)
    assert "\n" not in message
    for mention in mentions:
        assert mention in message
    return message


def meta(folder: Path, shards: int = 1, **params_json: Any) -> Path:
    return write_meta(folder, PARAMS, WEIGHTS, shards=shards, **params_json)


def edit_shard(folder: Path, edit: Callable[[dict[str, Any]], Any], shard: int = 0) -> Path:
    """Rewrites a shard after `edit`, which changes the dict in place or returns something else to save."""
    path = folder / f"consolidated.{shard:02d}.pth"
    content = torch.load(path)
    replacement = edit(content)
    torch.save(content if replacement is None else replacement, path)
    return folder


def without(name: str) -> Callable[[dict[str, Any]], None]:
    def edit(tensors: dict[str, Any]) -> None:
        del tensors[name]

    return edit


def huggingface(folder: Path, **fields: Any) -> Path:
    """One file and config.json; a field given as `...` is left out."""
    config = {key: value for key, value in {**CONFIG, **fields}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(huggingface_weights(PARAMS, WEIGHTS), folder / "model.safetensors")
    return folder


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def indexed(folder: Path, **changes: Any) -> Path:
    """Two files with an index; `changes` replace entries of its weight map."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tensors = huggingface_weights(PARAMS, WEIGHTS)
    halves = list(tensors)[::2], list(tensors)[1::2]
    for file, part in zip(SHARDS, halves, strict=True):
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in zip(SHARDS, halves, strict=True) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**weight_map, **changes}}))
    return folder


# Nothing to open


@pytest.mark.parametrize("name", ["nowhere", "x" * 300], ids=["missing", "long"])
def test_open_rejects_a_missing_folder(tmp_path: Path, name: str) -> None:
    refused(tmp_path / name, name, "does not exist", error=AssertionError)


def test_open_rejects_a_file(tmp_path: Path) -> None:
    meta(tmp_path)
    refused(tmp_path / "consolidated.00.pth", "pass the folder", error=AssertionError)


def test_open_rejects_an_empty_folder(tmp_path: Path) -> None:
    refused(tmp_path, str(tmp_path), "*.pth", "*.safetensors", "holds nothing", error=AssertionError)


def test_open_says_what_a_folder_without_weights_holds(tmp_path: Path) -> None:
    (tmp_path / "original").mkdir()
    (tmp_path / "params.json").write_text("{}")
    refused(tmp_path, "it holds original/, params.json", error=AssertionError)


def test_open_says_how_to_convert_pickled_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    refused(tmp_path, "pytorch_model.bin", "to safetensors", error=AssertionError)


@pytest.mark.parametrize("name", ["params.json", "config.json"])
def test_open_rejects_weights_without_their_json(tmp_path: Path, name: str) -> None:
    (meta if name == "params.json" else huggingface)(tmp_path)
    (tmp_path / name).unlink()
    refused(tmp_path, name, "No such file")


# JSON


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"dim": 64,}', b"\xff\xfe\x00", b"[1, 2]", b"3", b"null", b"[" * 100_000, b'{"dim": ' + b"9" * 5000],
    ids=["empty", "cut", "comma", "binary", "list", "number", "null", "deep", "long"],
)
@pytest.mark.parametrize("name", ["params.json", "config.json", "model.safetensors.index.json"])
def test_open_rejects_broken_json(tmp_path: Path, name: str, content: bytes) -> None:
    {"params.json": meta, "config.json": huggingface}.get(name, indexed)(tmp_path)
    (tmp_path / name).write_bytes(content)
    assert len(refused(tmp_path, name, "JSON")) < 1000


def test_open_rejects_a_broken_generation_config(tmp_path: Path) -> None:
    huggingface(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    refused(tmp_path, "generation_config.json", "'eos_token_id'", "'</s>'")
    (tmp_path / "generation_config.json").write_text("{")
    refused(tmp_path, "generation_config.json", "JSON")


WRONG_INTEGERS: list[Any] = [0, -1, 64.0, 1.5, "64", True, [64], {}, 2**31, 10**400]
WRONG_NUMBERS: list[Any] = [0, -1e-5, "1e-5", False, [1.0], float("nan"), float("inf"), 1e31, 10**400]


def refused_fields(path: Path, field: str, values: list[Any], expected: str) -> None:
    """Every one of the values is refused when it stands in a JSON file that is otherwise right."""
    right = json.loads(path.read_text())
    for value in values:
        path.write_text(json.dumps({**right, field: value}))
        refused(path.parent, path.name, f"'{field}'", expected)


@pytest.mark.parametrize("field", ["dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "head_dim", "hidden_dim"])
def test_open_rejects_wrong_integers_in_params(tmp_path: Path, field: str) -> None:
    refused_fields(meta(tmp_path) / "params.json", field, WRONG_INTEGERS, "an integer from 1 to")


@pytest.mark.parametrize("field", ["norm_eps", "rope_theta", "ffn_dim_multiplier", "rope_scaling_factor"])
def test_open_rejects_wrong_numbers_in_params(tmp_path: Path, field: str) -> None:
    refused_fields(meta(tmp_path) / "params.json", field, WRONG_NUMBERS, "a positive number")


@pytest.mark.parametrize("field", ["dim", "n_layers", "n_heads"])
def test_open_rejects_absent_fields_in_params(tmp_path: Path, field: str) -> None:
    refused_fields(meta(tmp_path) / "params.json", field, [None], "it is missing")


@pytest.mark.parametrize(
    ("fields", "mention"),
    [
        ({"vocab_size": -2}, "'vocab_size'"),
        ({"vocab_size": "-1"}, "'vocab_size'"),
        ({"use_scaled_rope": 1}, "'use_scaled_rope': expected true or false"),
        ({"n_layers": 10_001}, "'n_layers'"),
        ({"n_experts": 8, "dims": 1}, "unknown fields dims, n_experts"),
        ({"vision_chunk_size": 448}, "vision model"),
        ({"quantization_args": {"scheme": "int4"}}, "quantization_args"),
        ({"lora_args": {"rank": 16}}, "lora_args"),
        ({"n_kv_heads": 3}, "n_heads=8, n_kv_heads=3"),
        ({"n_heads": 7, "n_kv_heads": 7}, "64 and 7 heads"),
        ({"head_dim": 7}, "even head_dim, got 7"),
        ({"ffn_dim_multiplier": 1e-9}, "'ffn_dim_multiplier'"),
        ({"ffn_dim_multiplier": 1e30}, "'ffn_dim_multiplier'"),
        ({"ffn_dim_multiplier": 1.7e308}, "'ffn_dim_multiplier'"),
    ],
)
def test_open_rejects_nonsense_in_params(tmp_path: Path, fields: dict[str, Any], mention: str) -> None:
    refused(meta(tmp_path, **fields), "params.json", mention)


@pytest.mark.parametrize("field", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"])
def test_open_rejects_wrong_integers_in_config(tmp_path: Path, field: str) -> None:
    refused_fields(huggingface(tmp_path) / "config.json", field, [*WRONG_INTEGERS, None], "an integer from 1 to")


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("fields", "mention"),
    [
        ({"model_type": "mistral"}, "expected a Llama model (model_type 'llama'), got 'mistral'"),
        ({"model_type": ...}, "got None"),
        ({"quantization_config": {"quant_method": "fbgemm_fp8"}}, "quantised checkpoint (quant_method 'fbgemm_fp8')"),
        ({"quantization_config": "gptq"}, "'quantization_config'"),
        ({"attention_bias": True}, "'attention_bias'"),
        ({"mlp_bias": True}, "'mlp_bias'"),
        ({"attention_bias": "no"}, "'attention_bias'"),
        ({"hidden_act": "gelu"}, "'hidden_act': expected 'silu', got 'gelu'"),
        ({"num_key_value_heads": 3}, "n_heads=8, n_kv_heads=3"),
        ({"num_key_value_heads": 0}, "'num_key_value_heads'"),
        ({"num_attention_heads": 7, "num_key_value_heads": 7}, "64 and 7 heads"),
        ({"head_dim": 7}, "even head_dim, got 7"),
        ({"vocab_size": -1}, "'vocab_size'"),
        ({"rms_norm_eps": 0}, "'rms_norm_eps'"),
        ({"rope_theta": "big"}, "'rope_theta'"),
        ({"tie_word_embeddings": "yes"}, "'tie_word_embeddings'"),
        ({"eos_token_id": [1, "2"]}, "'eos_token_id'"),
        ({"eos_token_id": -1}, "'eos_token_id'"),
        ({"rope_scaling": "llama3"}, "'rope_scaling': expected an object"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'rope_scaling.type'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "got 'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "got 'dynamic'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "'rope_parameters.partial_rotary_factor'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "'rope_scaling.low_freq_factor'"),
        ({"rope_scaling": {**LLAMA3, "factor": -8}}, "'rope_scaling.factor'"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "'rope_scaling.high_freq_factor'"),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 0.5}}, "original_max_position_embeddings"),
    ],
)
def test_open_rejects_nonsense_in_config(tmp_path: Path, fields: dict[str, Any], mention: str) -> None:
    refused(huggingface(tmp_path, **fields), "config.json", mention)


# Damaged and hostile files


@pytest.mark.parametrize("kept", [0, 1, 3, 1000, -1, -200, 0.5, 0.99])
@pytest.mark.parametrize("layout", ["pth", "safetensors"])
def test_open_rejects_truncated_files(tmp_path: Path, layout: str, kept: float) -> None:
    (meta if layout == "pth" else huggingface)(tmp_path)
    path = next(tmp_path.glob(f"*.{layout}"))
    size = path.stat().st_size
    os.truncate(path, int(kept * size) if isinstance(kept, float) else kept % size)
    refused(tmp_path, path.name)


@pytest.mark.parametrize("layout", ["pth", "safetensors"])
def test_open_rejects_other_content(tmp_path: Path, layout: str) -> None:
    (meta if layout == "pth" else huggingface)(tmp_path)
    path = next(tmp_path.glob(f"*.{layout}"))
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 16060617592\n")
    refused(tmp_path, path.name, "git lfs pull")
    path.write_bytes(b"<!DOCTYPE html><html>404</html>")
    refused(tmp_path, path.name)
    path.unlink()
    path.symlink_to(tmp_path / "blob that is not there")
    refused(tmp_path, path.name)
    path.unlink()
    path.mkdir()
    refused(tmp_path, path.name)


def test_open_never_executes_a_pickle(tmp_path: Path) -> None:
    trace = tmp_path / "executed"

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(trace),)

    meta(tmp_path)
    edit_shard(tmp_path, lambda shard: shard.update(extra=Hostile()))
    refused(tmp_path, "consolidated.00.pth", "nothing in it is executed", "mkdir")
    torch.save({"extra": Hostile()}, tmp_path / "consolidated.00.pth", _use_new_zipfile_serialization=False)
    refused(tmp_path, "consolidated.00.pth", "not a zip archive")
    assert not trace.exists()


def test_open_rejects_files_of_old_torch(tmp_path: Path) -> None:
    torch.save(WEIGHTS, meta(tmp_path) / "consolidated.00.pth", _use_new_zipfile_serialization=False)
    refused(tmp_path, "consolidated.00.pth", "save it again")


@pytest.mark.parametrize("damage", ["compressed", "short", "no_pickle"])
def test_open_rejects_repacked_archives(tmp_path: Path, damage: str) -> None:
    path = meta(tmp_path) / "consolidated.00.pth"
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    method = zipfile.ZIP_DEFLATED if damage == "compressed" else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries.items():
            if damage != "no_pickle" or not name.endswith("data.pkl"):
                archive.writestr(name, data[:10] if damage == "short" else data)
    refused(tmp_path, "consolidated.00.pth", "compress" if damage == "compressed" else "damaged")


@pytest.mark.parametrize(
    ("content", "mention"),
    [
        ([torch.ones(2)], "got a list"),
        (torch.ones(2), "got a Tensor"),
        ({"model": WEIGHTS}, "got 'model' with a dict"),
        ({0: torch.ones(2)}, "got 0 with a Tensor"),
        ({**WEIGHTS, "step": 7}, "got 'step' with a int"),
    ],
)
def test_open_rejects_a_pth_that_is_no_flat_dict(tmp_path: Path, content: Any, mention: str) -> None:
    refused(edit_shard(meta(tmp_path), lambda _: content), "consolidated.00.pth", mention)


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
    refused(tmp_path, "layers.1.attention.wk.weight: expected (16, 64), got (", "of 1 joined shards")


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


def test_open_rejects_kv_heads_that_are_not_there(tmp_path: Path) -> None:
    refused(meta(tmp_path, n_kv_heads=1), "attention.wk.weight: expected (8, 64), got (16, 64)")
    refused(
        meta(tmp_path, 2, n_kv_heads=4), "attention.wk.weight: expected (32, 64), got (16, 64)", "of 2 joined shards"
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
    "dtype", [torch.int8, torch.float8_e4m3fn, torch.float64, torch.complex64, torch.bool], ids=str
)
def test_open_rejects_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    name = "layers.0.attention.wq.weight"
    edit_shard(meta(tmp_path), lambda shard: shard.update({name: shard[name].to(dtype)}))
    refused(tmp_path, "consolidated.00.pth", f"{name} ({str(dtype).removeprefix('torch.')})", "bfloat16")


@pytest.mark.parametrize(
    "hollow",
    [torch.empty(0, 64), torch.empty(64, 64, device="meta"), torch.ones(64, 64).to_sparse()],
    ids=["empty", "meta", "sparse"],
)
def test_open_rejects_tensors_without_data(tmp_path: Path, hollow: torch.Tensor) -> None:
    edit_shard(meta(tmp_path), lambda shard: shard.update({"layers.0.attention.wq.weight": hollow}))
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
def test_open_rejects_an_embedding_that_tells_no_vocabulary(tmp_path: Path, shape: tuple[int, ...]) -> None:
    edit_tensors(huggingface(tmp_path, vocab_size=...), reshaped("model.embed_tokens.weight", *shape))
    refused(tmp_path, "model.embed_tokens.weight: expected (V, 64)", str(shape))


@pytest.mark.parametrize(
    ("dtype", "named"),
    [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.float64, "F64"), (torch.bool, "BOOL")],
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
def test_open_rejects_names_that_no_file_can_have(tmp_path: Path, file: str) -> None:
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
def test_open_rejects_an_index_that_points_elsewhere(tmp_path: Path, file: Any) -> None:
    indexed(tmp_path, **{"lm_head.weight": file})
    refused(tmp_path, "model.safetensors.index.json", "'weight_map.lm_head.weight'", "in the same folder")


@pytest.mark.parametrize("weight_map", [None, {}, [], "all"], ids=str)
def test_open_rejects_an_index_without_a_map(tmp_path: Path, weight_map: Any) -> None:
    (indexed(tmp_path) / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(tmp_path, "model.safetensors.index.json", "'weight_map'")


def test_open_rejects_the_same_tensor_twice(tmp_path: Path) -> None:
    (indexed(tmp_path) / "model.safetensors.index.json").unlink()
    shutil.copy(tmp_path / SHARDS[0], tmp_path / "z.safetensors")
    refused(tmp_path, "z.safetensors", f"is also in {SHARDS[0]}")


# Asking for slices


@pytest.mark.parametrize("layout", ["meta", "huggingface"])
@pytest.mark.parametrize("world_size", [3, 5, 16])
def test_tensors_rejects_a_world_that_does_not_divide(tmp_path: Path, layout: str, world_size: int) -> None:
    checkpoint = open_checkpoint((meta if layout == "meta" else huggingface)(tmp_path))
    with pytest.raises(ValueError, match=rf"world_size={world_size} .*n_heads=8 .*use one of 1, 2, 4, 8 processes"):
        checkpoint.tensors(0, world_size)
    assert len(list(checkpoint.tensors(0, 2))) == len(WEIGHTS)
