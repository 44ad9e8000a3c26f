"""Folders that `write_quantized` writes: read back by fastllama, and by transformers with compressed-tensors."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastllama import Llama
from fastllama.checkpoint import open_checkpoint
from fastllama.checkpoint.quantized_writer import write_quantized
from fastllama.checkpoint.quantized_writer_config import model_config
from fastllama.checkpoint.quantized_writer_files import write_other_files
from fastllama.kernels.quantized import QuantizedWeight
from fastllama.quantization import CHOICES, quantized
from fastllama.tokenizer_open import open_tokenizer
from tests.support.checkpoints import (
    Params,
    random_weights,
    tiny_params,
    write_huggingface,
    write_meta,
    write_tokenizer,
)
from tests.support.pipelines import byte_level, write_pipeline

ROOT = Path(__file__).resolve().parents[3]
PARAMS: Params = tiny_params(dim=256, hidden_dim=384, n_kv_heads=4, vocab_size=580)
WEIGHTS = random_weights(PARAMS, seed=8, dtype=torch.bfloat16)
TEXTS = ("Once upon", "  The 12 dogs\n", "naïve 🙂")

# Loads every folder given as an argument, and writes its logits and weights. In a process of its own, because
# transformers loads with uninitialised memory, which the tests fill with NaN.
TRANSFORMERS = """
import sys, torch, warnings
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
tokens = torch.arange(18).view(2, 9) * 31 % 580
for folder in sys.argv[1:]:
    dequantized = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    for name, how in (("default", {}), ("dequantized", dequantized)):
        if name == "default" and "int4" in folder:
            continue  # transformers 5.23 and compressed-tensors 0.20 do not load zero points so
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()
        with torch.no_grad():
            logits = model(tokens).logits
        weights = {key: value for key, value in model.state_dict().items() if key.endswith("_proj.weight")}
        torch.save((logits, weights), f"{folder}/{name}.out")
"""


def write(source: Path, folder: Path, kind: str, with_output: bool = False, **options: Any) -> Path:
    checkpoint = open_checkpoint(source)
    write_quantized(
        checkpoint,
        folder,
        kind,
        with_output=with_output,
        config=model_config(checkpoint),
        **{"copy_others": lambda place: write_other_files(checkpoint, str(source), None, place), **options},
    )
    return folder


def source(folder: Path, layout: str, params: Params = PARAMS, **options: Any) -> Path:
    """The weights in a layout -> the path to open."""
    weights = random_weights(params, seed=8, dtype=torch.bfloat16)
    if layout == "meta":
        return write_meta(folder, params, weights, shards=2)
    if layout == "huggingface":
        return write_huggingface(folder, params, weights, **options)
    pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    from tests.support.gguf_files import metadata, quantised, write_gguf

    folder.mkdir()
    stored = {name: weight for name, weight in weights.items() if not (params.get("tied_output") and "output" in name)}
    return write_gguf(folder / "model.gguf", metadata(params), quantised(stored, "BF16"))


@pytest.mark.parametrize("layout", ["meta", "huggingface", "gguf"])
@pytest.mark.parametrize("kind", ["int8", "fp8", "int4", "int4-g32"])
def test_the_folder_has_the_quantised_weights(tmp_path: Path, layout: str, kind: str) -> None:
    checkpoint = open_checkpoint(write(source(tmp_path / "source", layout), tmp_path / "out", kind))
    assert checkpoint.format == "huggingface" and checkpoint.dtype == torch.bfloat16
    for name, weight in checkpoint.tensors():
        if WEIGHTS[name].ndim == 1 or name in ("output.weight", "tok_embeddings.weight"):
            assert isinstance(weight, torch.Tensor) and torch.equal(weight.float(), WEIGHTS[name].float()), name
            continue
        expected = quantized(WEIGHTS[name], CHOICES[kind], integer_zeros=True)
        assert isinstance(weight, QuantizedWeight) and weight.format == expected.format
        for part in ("values", "scales", "offsets"):
            ours, theirs = getattr(weight, part), getattr(expected, part)
            assert ours is theirs is None or torch.equal(ours, theirs), (name, part)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("with_output", [False, True])
def test_the_output_is_quantised_if_asked(tmp_path: Path, tied: bool, with_output: bool) -> None:
    params = PARAMS | {"tied_output": tied}
    folder = write(source(tmp_path / "source", "huggingface", params), tmp_path / "out", "int4", with_output)
    checkpoint = open_checkpoint(folder)
    weights = dict(checkpoint.tensors())
    assert isinstance(weights["output.weight"], QuantizedWeight) == with_output
    assert isinstance(weights["tok_embeddings.weight"], torch.Tensor)
    assert checkpoint.params["tied_output"] == (tied and not with_output)
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) == (not tied and not with_output)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] == (tied and not with_output)


def test_groups_divide_the_columns_of_all_layers(tmp_path: Path) -> None:
    params = PARAMS | {"hidden_dim": 320}
    checkpoint = open_checkpoint(write(source(tmp_path / "source", "meta", params), tmp_path / "out", "int4"))
    assert checkpoint.precisions == ("int4 in groups of 64",)
    params |= {"hidden_dim": 200}
    with pytest.raises(ValueError, match=r"a multiple of 32, and layers\.0\.feed_forward\.w2\.weight has 200"):
        write(source(tmp_path / "odd", "meta", params), tmp_path / "none", "int4")
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_logits_in_transformers_are_ours(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed: pip install it")
    rope = {"use_scaled_rope": True, "rope_scaling_factor": 8.0}
    made = source(tmp_path / "source", "meta", PARAMS | rope)
    tokenizer = write_tokenizer(tmp_path, n_ranks=PARAMS["vocab_size"] - 256)
    folders = {kind: write(made, tmp_path / kind, kind, kind == "int8") for kind in ("int8", "fp8", "int4")}
    done = subprocess.run(
        [sys.executable, "-c", TRANSFORMERS, *map(str, folders.values())], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    tokens = torch.arange(18).view(2, 9) * 31 % 580
    options: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "backend": "reference"}
    for kind, folder in folders.items():
        llm = Llama.build(str(folder), str(tokenizer), 16, 2, **options)
        ours = llm.model.forward(tokens, 0)
        # The package multiplies int4 in the dtype of the scales, float16.
        tolerance = 2e-2 if kind == "int4" else 1e-4
        for name in ("dequantized",) if kind == "int4" else ("default", "dequantized"):
            logits, weights = torch.load(folder / f"{name}.out")
            torch.testing.assert_close(ours, logits, atol=tolerance, rtol=tolerance)
        assert weights
        up = dict(open_checkpoint(folder).dense_tensors())["layers.1.feed_forward.w3.weight"]
        theirs = weights["model.layers.1.mlp.up_proj.weight"]
        assert torch.equal(up.half().float() if kind == "int4" else up, theirs)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "beta_fast": 20.0},
        {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 8192},
    ],
    ids=lambda rope: rope["rope_type"],
)
@pytest.mark.parametrize("layout", ["meta", "huggingface"])
def test_every_rope_is_kept(tmp_path: Path, layout: str, rope: dict[str, Any]) -> None:
    made = write_huggingface(tmp_path / "hf", PARAMS, WEIGHTS, rope_parameters=rope)
    params = open_checkpoint(made).params
    if layout == "meta":
        made = write_meta(tmp_path / "meta", params, WEIGHTS)
    assert open_checkpoint(write(made, tmp_path / "out", "int8")).params == params


def test_a_rope_that_transformers_lacks_is_an_error(tmp_path: Path) -> None:
    rope = {"rope_type": "factors", "rope_factors": [1.0] * 16, "use_scaled_rope": False}
    made = write_meta(tmp_path / "meta", PARAMS | rope, WEIGHTS)
    with pytest.raises(ValueError, match="rope_type 'factors' has a factor for each frequency, which transformers'"):
        write(made, tmp_path / "out", "int8")


# Other files


def test_huggingface_files_are_copied(tmp_path: Path) -> None:
    made = source(tmp_path / "source", "huggingface", eos_token_id=[3, 5])
    write_pipeline(byte_level(), made)
    (made / "additional_chat_templates").mkdir()
    kept = ["additional_chat_templates/tool_use.jinja", "chat_template.jinja", "LICENSE.txt", "tokenizer_config.json"]
    for name in kept:
        (made / name).write_text("{}")
    (made / "optimizer.pt").write_text("")
    out = write(made, tmp_path / "out", "fp8")
    for name in (*kept, "tokenizer.json", "generation_config.json"):
        assert (out / name).read_bytes() == (made / name).read_bytes()
    assert not (out / "optimizer.pt").exists()
    assert open_checkpoint(out).stop_token_ids == (3, 5)
    config = json.loads((made / "config.json").read_text())
    written = json.loads((out / "config.json").read_text())
    assert written.pop("quantization_config") and written == config


def test_a_model_of_metas_chats_as_before(tmp_path: Path) -> None:
    made = source(tmp_path / "source", "meta")
    write_tokenizer(made, n_ranks=PARAMS["vocab_size"] - 256)
    options: dict[str, Any] = {"device": "cpu", "backend": "reference"}
    before = Llama.build(str(made), None, 64, 1, **options)
    after = Llama.build(str(write(made, tmp_path / "out", "int8")), None, 64, 1, **options)
    dialog: Any = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi <|eot_id|>"}]
    assert after.formatter.encode_dialog_prompt(dialog) == before.formatter.encode_dialog_prompt(dialog)
    assert after.tokenizer.stop_tokens == before.tokenizer.stop_tokens


def test_the_tokenizer_of_a_gguf_file_is_written(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    from tests.support.gguf_files import byte_level_fields, metadata, quantised, write_gguf

    tokenizer = byte_level()
    params = PARAMS | {"vocab_size": tokenizer.get_vocab_size()}
    template = "{{ messages[0]['content'] }}"
    for begins in (True, False):
        fields = metadata(params) | byte_level_fields(tokenizer, "smollm", add_bos_token=begins)
        fields |= {"tokenizer.chat_template": template, "tokenizer.chat_template.../evil": "{{ 1 }}"}
        path = write_gguf(tmp_path / "model.gguf", fields, quantised(random_weights(params), "F16"))
        out = write(path, tmp_path / f"out-{begins}", "int8")
        before, after = open_tokenizer(path), open_tokenizer(out)
        for text in TEXTS:
            expected = before.encode(text, bos=True, eos=True)
            assert after.encode(text, bos=True, eos=True) == expected and after.decode(expected) == before.decode(
                expected
            )
        assert (after.bos_id, after.eos_id) == (before.bos_id, before.eos_id)
        assert (out / "chat_template.jinja").read_text() == template
    assert not list(tmp_path.rglob("evil*"))
    # The same tokenizer for a Hugging Face folder that has none, whose own generation_config.json stays.
    made = source(tmp_path / "source", "huggingface", params)
    (made / "generation_config.json").write_text('{"eos_token_id": 3}')
    (place := tmp_path / "place").mkdir()
    write_other_files(open_checkpoint(made), str(made), str(path), place)
    assert open_tokenizer(place).encode(TEXTS[0], bos=True, eos=True) == before.encode(TEXTS[0], bos=True, eos=True)
    assert json.loads((place / "generation_config.json").read_text()) == {"eos_token_id": 3}
