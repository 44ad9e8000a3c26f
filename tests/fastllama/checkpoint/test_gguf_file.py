"""GGUF files, written by the package gguf: weights of every type, slices, and split files."""

import json
import logging
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from fastllama import Llama
from fastllama.checkpoint import open_checkpoint
from fastllama.cli import main
from fastllama.kernels.quantized import QuantizedWeight
from fastllama.tokenizer_gguf import GgufTokenizer
from tests.support.checkpoints import (
    random_weights,
    share,
    tiny_params,
    write_huggingface,
    write_meta,
)
from tests.support.pipelines import byte_level, write_pipeline

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")

from tests.support.gguf_files import (  # noqa: E402
    FIELDS,
    PARAMS,
    WEIGHTS,
    byte_level_fields,
    metadata,
    quantised,
    stored_name,
    write,
    write_gguf,
    write_split,
)

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}
# Types that the package quantises, and those that it only dequantises.
WRITTEN = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
READ_ONLY = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ2_XXS", "IQ3_S", "TQ1_0", "MXFP4"]


def dequantised(path: Path) -> dict[str, torch.Tensor]:
    """The weights as the package reads and dequantises them, by llama.cpp's name."""
    tensors = gguf.GGUFReader(path).tensors
    return {
        one.name: torch.from_numpy(gguf.quants.dequantize(one.data, one.tensor_type).copy()).view(
            *reversed(one.shape.tolist())
        )
        for one in tensors
    }


@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("kind", WRITTEN)
def test_slices_are_those_of_the_packages_weights(tmp_path: Path, kind: str, world_size: int) -> None:
    path = write(tmp_path, kind)
    expected = dequantised(path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.format == "gguf"
    assert checkpoint.dtype == DTYPES.get(kind, torch.float32)
    for rank in range(world_size):
        received = dict(checkpoint.dense_tensors(rank, world_size))
        assert list(received) == list(WEIGHTS)
        for name, tensor in received.items():
            whole = expected[stored_name(name)]
            assert tensor.dtype == (checkpoint.dtype if whole.ndim > 1 else torch.float32)
            assert torch.equal(tensor.float(), share(PARAMS, name, whole, rank, world_size)), name


@pytest.mark.parametrize(("kind", "in_memory"), [("Q8_0", "int8"), ("Q4_0", "int4"), ("Q4_1", "int4"), ("Q5_0", "")])
def test_blocks_of_32_keep_their_bits(tmp_path: Path, kind: str, in_memory: str) -> None:
    path = write(tmp_path, kind)
    checkpoint = open_checkpoint(path)
    assert checkpoint.precisions == ((f"{in_memory} in groups of 32",) if in_memory else ())
    for name, weight in checkpoint.tensors():
        is_kept = bool(in_memory) and WEIGHTS[name].ndim > 1 and name != "tok_embeddings.weight"
        assert isinstance(weight, QuantizedWeight) == is_kept, name
        if isinstance(weight, QuantizedWeight):
            assert (weight.format, weight.group_size, weight.scales.dtype) == (in_memory, 32, torch.float16)
            assert (weight.offsets is not None, weight.has_zeros) == (in_memory == "int4", kind == "Q4_0")
            assert weight.n_bytes == weight.values.numel() + weight.scales.nbytes * (1 + (in_memory == "int4"))


@pytest.mark.parametrize(("kind", "byte"), [("Q8_0", 1), ("Q4_0", 1), ("Q4_1", 1), ("Q4_1", 3)])
def test_scales_and_minima_that_are_not_finite_are_errors(tmp_path: Path, kind: str, byte: int) -> None:
    """byte: the high one of a block's scale or minimum."""
    tensors = quantised(WEIGHTS, kind)
    data = tensors["blk.1.ffn_up.weight"][0]
    for high in (0x7C, 0x7E, 0xFC):  # infinite, not a number, infinite
        data[3, byte] = high
        data[3, byte - 1] = 0
        path = write_gguf(tmp_path / "model.gguf", FIELDS, tensors)
        with pytest.raises(ValueError, match=r"model\.gguf: blk\.1\.ffn_up\.weight has scales that are not finite"):
            dict(open_checkpoint(path).tensors())


def test_a_quantised_embedding_is_also_the_output(tmp_path: Path) -> None:
    """Looked up dense, and multiplied with the file's bits; counted once."""
    weights = {name: weight for name, weight in WEIGHTS.items() if name != "output.weight"}
    for kind in ("Q8_0", "Q6_K", "F16"):
        tensors = quantised(weights, "Q8_0")
        if kind == "Q6_K":
            tensors["token_embd.weight"] = (
                np.zeros((PARAMS["vocab_size"], 210), np.uint8),
                gguf.GGMLQuantizationType.Q6_K,
            )
        if kind == "F16":
            tensors |= {"token_embd.weight": quantised(weights, "F16")["token_embd.weight"]}
        checkpoint = open_checkpoint(write_gguf(tmp_path / "model.gguf", FIELDS, tensors))
        received = dict(checkpoint.tensors(1, 2))
        output, embedding = received["output.weight"], received["tok_embeddings.weight"]
        assert isinstance(embedding, torch.Tensor) and isinstance(output, QuantizedWeight) == (kind == "Q8_0")
        assert checkpoint.params["tied_output"] == (kind != "Q8_0")
        dense = output.dequantized() if isinstance(output, QuantizedWeight) else output
        assert torch.equal(dense, embedding)
        assert checkpoint.n_parameters == sum(weight.numel() for weight in weights.values())


def test_weights_whose_blocks_slices_would_cut_are_dequantised(tmp_path: Path) -> None:
    params = PARAMS | {"hidden_dim": 96}
    path = write_gguf(tmp_path / "model.gguf", metadata(params), quantised(random_weights(params), "Q4_0"))
    checkpoint, name = open_checkpoint(path), "layers.1.feed_forward.w2.weight"
    parts = [dict(checkpoint.tensors(rank, 2))[name] for rank in range(2)]
    assert all(isinstance(part, torch.Tensor) for part in parts)
    assert torch.equal(torch.cat(cast(list[torch.Tensor], parts), 1), dict(checkpoint.dense_tensors())[name])


@pytest.mark.parametrize("kind", READ_ONLY)
def test_every_type_that_the_package_dequantises_is_read(tmp_path: Path, kind: str) -> None:
    tensor_type = gguf.GGMLQuantizationType[kind]
    tensors = quantised(WEIGHTS, "F32")
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
    generator = np.random.default_rng(0)
    for name, (data, _) in tensors.items():
        if data.ndim > 1:
            n_bytes = data.shape[1] // block_size * block_bytes
            tensors[name] = (generator.integers(0, 60, (data.shape[0], n_bytes), np.uint8), tensor_type)
    path = write_gguf(tmp_path / "model.gguf", FIELDS, tensors)
    expected = dequantised(path)
    checkpoint = open_checkpoint(path)
    assert next(iter(checkpoint.bytes_by_type)) == kind
    for rank in range(8):  # a slice of w2 and wo begins inside a block
        for name, tensor in checkpoint.dense_tensors(rank, 8):
            whole = expected[stored_name(name)]
            assert torch.isfinite(whole).all()
            assert torch.equal(tensor, share(PARAMS, name, whole, rank, 8)), name


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q4_0"])
def test_tokens_are_those_of_a_huggingface_folder(tmp_path: Path, kind: str) -> None:
    tokenizer = byte_level()
    params = PARAMS | {"vocab_size": tokenizer.get_vocab_size(), "tied_output": True}
    weights = random_weights(params, seed=4)
    fields = metadata(params) | byte_level_fields(tokenizer, "smollm")
    del weights["output.weight"]
    path = write_gguf(tmp_path / "model.gguf", fields, quantised(weights, kind))
    stored = dequantised(path)
    weights = {name: stored[stored_name(name)] for name in weights}
    weights["output.weight"] = weights["tok_embeddings.weight"]
    folder = write_huggingface(tmp_path / "hf", params, weights)
    write_pipeline(tokenizer, folder)

    def answers(ckpt_dir: Path, tokenizer_path: str | None) -> list[list[int]]:
        options: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "backend": "reference"}
        llm = Llama.build(str(ckpt_dir), tokenizer_path, 64, 2, **options)
        llm.tokenizer.stop_tokens = set()
        prompts = [llm.tokenizer.encode(text, bos=True, eos=False) for text in ("Once upon", "The 12 dogs\n")]
        return [list(row) for row in llm.generate(prompts, max_gen_len=24, temperature=0.0)[0]]

    expected = answers(folder, str(folder))
    assert len(expected[0]) == 24
    assert answers(path, None) == expected
    assert answers(tmp_path, None) == expected  # the folder's only weights


def test_split_files_are_one_model(tmp_path: Path) -> None:
    paths = write_split(tmp_path / "model.gguf", FIELDS, quantised(WEIGHTS, "F16"), 3)
    for place in (*paths, tmp_path):
        checkpoint = open_checkpoint(place)
        assert [path for path, _ in checkpoint.files] == paths
        for name, tensor in checkpoint.dense_tensors():
            assert torch.equal(tensor, WEIGHTS[name].half() if tensor.ndim > 1 else WEIGHTS[name]), name
    paths[1].rename(tmp_path / "other")
    with pytest.raises(ValueError, match=r"the model has 3 files, and model-00002-of-00003\.gguf is not beside it"):
        open_checkpoint(paths[0])
    paths[2].rename(paths[1])
    (tmp_path / "other").rename(paths[2])
    with pytest.raises(ValueError, match=r"expected file 2 of 3, as its name says, but its metadata says split\.no=2"):
        open_checkpoint(paths[0])


def test_a_split_model_must_have_all_tensors(tmp_path: Path) -> None:
    fields = FIELDS | {"split.tensors.count": 99}
    path = write_gguf(tmp_path / "model.gguf", fields, quantised(WEIGHTS, "F32"))
    with pytest.raises(ValueError, match=r"split\.tensors\.count is 99, and the files hold 21 tensors"):
        open_checkpoint(path)


def test_one_of_several_models_in_a_folder(tmp_path: Path) -> None:
    write(tmp_path).rename(tmp_path / "a.gguf")
    write(tmp_path).rename(tmp_path / "b.gguf")
    assert open_checkpoint(tmp_path / "b.gguf").files[0][0] == tmp_path / "b.gguf"


def test_other_weights_in_a_folder_go_first(tmp_path: Path) -> None:
    params = tiny_params()
    write(tmp_path)
    write_meta(tmp_path / "original", params, random_weights(params))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.format == "meta"
    assert checkpoint.passed_over == ((tmp_path / "model.gguf", "in another format"),)
    write_huggingface(tmp_path, params, random_weights(params))
    assert open_checkpoint(tmp_path).format == "huggingface"


def test_the_log_names_the_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fastllama")
    open_checkpoint(write(tmp_path))
    assert caplog.messages == [f"checkpoint: {tmp_path}, model.gguf"]


def test_a_file_of_any_name_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    """As in Ollama's store."""
    tokenizer = byte_level()
    params = PARAMS | {"vocab_size": tokenizer.get_vocab_size()}
    path = tmp_path / f"sha256-{'0a' * 32}"
    fields = metadata(params) | byte_level_fields(tokenizer, "smollm")
    write_gguf(path, fields, quantised(random_weights(params), "F16"))
    llm = Llama.build(str(path), None, 16, 1, device="cpu")
    assert isinstance(llm.tokenizer, GgufTokenizer) and llm.generate([[1, 2]], 2)[0]
    assert open_checkpoint(path).files[0][0] == path


def test_inspect_shows_types_and_tokenizer(tmp_path: Path) -> None:
    tokenizer = byte_level()
    params = PARAMS | {"vocab_size": tokenizer.get_vocab_size()}
    fields = metadata(params) | byte_level_fields(tokenizer, "smollm")
    path = write_gguf(tmp_path / "model.gguf", fields, quantised(random_weights(params), "Q8_0"))
    for place in (path, tmp_path):
        result = CliRunner().invoke(main, ["inspect", str(place), "--json"], catch_exceptions=False)
        description = json.loads(result.output)
        assert (description["format"], description["stored_dtype"]) == ("gguf", "Q8_0")
        n_floats = 5 * PARAMS["dim"]  # the norms
        n_matrices = sum(weight.numel() for weight in random_weights(params).values()) - n_floats
        assert description["bytes_by_type"] == {"Q8_0": n_matrices // 32 * 34, "F32": n_floats * 4}
        assert description["quantized"] == ["int8 in groups of 32"]
        assert description["memory"]["dtype"] == "float32"
        assert description["tokenizer"]["path"] == str(path)
        assert description["tokenizer"]["n_words"] == tokenizer.get_vocab_size()
    text = CliRunner().invoke(main, ["inspect", str(write(tmp_path, "Q8_0"))], catch_exceptions=False).output
    assert "stored in Q8_0 (99.7%), F32 (0.3%)" in text
    assert "quantised  int8 in groups of 32\n" in text
    assert "tokenizer: none in the checkpoint" in text
