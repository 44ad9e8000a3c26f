"""The GGUF file for llama.cpp holds the model's weights and sizes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from fastllama.benchmarks.models import ModelSpec
from tests.benchmarks.cases import ARGS, SOURCE, SPEC

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")

from fastllama.benchmarks.peers.gguf_file import write_gguf  # noqa: E402

NAMES = {
    "tok_embeddings.weight": "token_embd.weight",
    "layers.1.attention.wq.weight": "blk.1.attn_q.weight",
    "layers.1.attention.wk.weight": "blk.1.attn_k.weight",
    "layers.0.feed_forward.w2.weight": "blk.0.ffn_down.weight",
    "layers.0.ffn_norm.weight": "blk.0.ffn_norm.weight",
    "norm.weight": "output_norm.weight",
    "output.weight": "output.weight",
}


def read(spec: ModelSpec, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields and the tensors of the file that holds the weights of `spec`."""
    path = folder / "model.gguf"
    write_gguf(spec, path)
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_write_gguf_keeps_the_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    spec = dataclasses.replace(SPEC, dtype=dtype)
    _, stored = read(spec, tmp_path)
    weights = dict(spec.tensors())
    assert len(stored) == len(weights)
    for name, stored_name in NAMES.items():
        expected, tensor = weights[name], stored[stored_name]
        stored_dtype = torch.float32 if expected.ndim == 1 else dtype
        data = torch.from_numpy(tensor.data.copy()).view(stored_dtype).reshape(expected.shape)
        assert tensor.shape.tolist() == list(expected.shape)[::-1]
        assert torch.equal(data, expected.to(stored_dtype)), name


def test_write_gguf_names_the_sizes(tmp_path: Path) -> None:
    fields, _ = read(SPEC, tmp_path)
    expected = {
        "general.architecture": "llama",
        "llama.vocab_size": ARGS.vocab_size,
        "llama.embedding_length": ARGS.dim,
        "llama.block_count": ARGS.n_layers,
        "llama.feed_forward_length": ARGS.hidden_dim,
        "llama.attention.head_count": ARGS.n_heads,
        "llama.attention.head_count_kv": ARGS.n_kv_heads,
        "llama.attention.key_length": ARGS.head_dim,
        "llama.rope.freq_base": ARGS.rope_theta,
    }
    assert {name: fields[name] for name in expected} == expected
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(ARGS.norm_eps)


def test_write_gguf_takes_linear_rope(tmp_path: Path) -> None:
    shape = SOURCE.shape | {"rope_type": "linear", "rope_scaling_factor": 4.0}
    _, stored = read(dataclasses.replace(SPEC, source=dataclasses.replace(SOURCE, shape=shape)), tmp_path)
    assert stored["rope_freqs.weight"].data.tolist() == [4.0] * (ARGS.head_dim // 2)


def test_write_gguf_takes_scaled_rope_and_tied_output(tmp_path: Path) -> None:
    shape = SOURCE.shape | {"use_scaled_rope": True, "rope_scaling_factor": 32.0, "tied_output": True}
    spec = dataclasses.replace(SPEC, source=dataclasses.replace(SOURCE, shape=shape))
    _, stored = read(spec, tmp_path)
    assert "output.weight" not in stored
    factors = stored["rope_freqs.weight"].data
    assert factors.shape == (ARGS.head_dim // 2,)
    # The shortest wavelength is unscaled, the longest one is scaled by the complete factor.
    assert (factors[0], factors[-1]) == (1.0, pytest.approx(32.0))
