"""Models whose projections have biases, in every layout and on every backend, against transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import Llama, ModelArgs, Transformer
from fastllama.checkpoint import open_checkpoint
from fastllama.kernels.attention import scratch
from fastllama.kernels.native import library
from tests.support.checkpoints import (
    huggingface_model,
    random_weights,
    share,
    tiny_params,
    write_huggingface,
    write_meta,
    write_tokenizer,
)
from tests.support.tiers import parameters

KINDS: dict[str, dict[str, Any]] = {
    "attention": {"attention_bias": True},
    "mlp": {"mlp_bias": True},
    "both": {"attention_bias": True, "mlp_bias": True},
}
BOTH = tiny_params(**KINDS["both"])
TOKENS = torch.arange(2 * 22).view(2, 22) * 7 % BOTH["vocab_size"]
BACKENDS = ("reference", "native", "fused")


def stepped_logits(model: Transformer, device: torch.device) -> Tensor:
    """Logits of TOKENS: a prompt that is too long for the matrix–vector kernels, a short chunk, a single token."""
    pieces = [model.forward(TOKENS[:, begin:end].to(device), begin) for begin, end in ((0, 18), (18, 21), (21, 22))]
    return torch.cat(pieces, 1).cpu()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", parameters({name: name for name in KINDS}, quick=("both",)))
def test_logits_are_those_of_transformers(
    kind: str, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "native" and (library.obstacle() is not None or device.type != "cpu"):
        pytest.skip("the native kernels were not built, or the tests run on a GPU")
    monkeypatch.setattr(scratch, "NUM_SPLITS", 4)
    params = tiny_params(**KINDS[kind])
    weights = random_weights(params, seed=5)
    args = ModelArgs(max_batch_size=2, max_seq_len=32, **params)
    model = Transformer(args, device=device, dtype=torch.float32, backend=backend, init_weights=False)
    model.load_tensors(weights.items())
    with torch.inference_mode():
        expected = huggingface_model(params, weights)(TOKENS).logits
    torch.testing.assert_close(stepped_logits(model, device), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", ["huggingface", "meta", "meta in 2 shards", "meta in 8 shards"])
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_slices_are_the_same_in_every_layout(layout: str, world_size: int, tmp_path: Path) -> None:
    weights = random_weights(BOTH, seed=6)
    if layout == "huggingface":
        write_huggingface(tmp_path, BOTH, weights)
    else:
        write_meta(tmp_path, BOTH, weights, shards=int(layout.split()[-2]) if layout != "meta" else 1)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.n_parameters == sum(weight.numel() for weight in weights.values())
    for rank in range(world_size):
        received = dict(checkpoint.dense_tensors(rank, world_size))
        assert list(received) == list(ModelArgs(**BOTH).shapes)
        for name, tensor in received.items():
            assert torch.equal(tensor, share(BOTH, name, weights[name], rank, world_size)), name


def test_gguf_file_with_biases_gives_the_same_weights(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    from tests.support.gguf_files import metadata, quantised, write_gguf

    params = tiny_params(dim=256, hidden_dim=512, **KINDS["both"])
    weights = random_weights(params, seed=6)
    path = write_gguf(tmp_path / "model.gguf", metadata(params), quantised(weights, "F32"))
    checkpoint = open_checkpoint(path)
    assert checkpoint.params["attention_bias"] and checkpoint.params["mlp_bias"]
    for name, tensor in checkpoint.dense_tensors():
        assert torch.equal(tensor, weights[name]), name


def test_saved_weights_load_again(tmp_path: Path) -> None:
    """state_dict has the biases by the names that Meta's layout takes; random weights have them, too."""
    cpu, args = torch.device("cpu"), ModelArgs(max_batch_size=2, max_seq_len=32, **BOTH)
    model = Transformer(args, device=cpu, dtype=torch.float32, backend="reference")
    state = model.state_dict()
    assert list(state) == list(ModelArgs(**BOTH).shapes)
    assert all(tensor.std() > 0.01 for name, tensor in state.items() if name.endswith(".bias"))
    write_tokenizer(tmp_path)
    (tmp_path / "params.json").write_text(json.dumps(BOTH))
    torch.save(state, tmp_path / "consolidated.00.pth")
    loaded = Llama.build(str(tmp_path), None, 32, 2, device="cpu", dtype="float32", backend="reference").model
    assert torch.equal(stepped_logits(loaded, cpu), stepped_logits(model, cpu))


@pytest.mark.parametrize(
    ("stated", "stored", "message"),
    [
        ({}, "attention", "attention_bias for self_attn, mlp_bias for mlp"),
        ({"mlp_bias": True}, "attention", "missing: model.layers.0.mlp.gate_proj.bias"),
        ({"attention_bias": "no"}, "attention", "field 'attention_bias': expected true or false, got 'no'"),
    ],
)
def test_biases_must_be_those_of_the_configuration(
    stated: dict[str, Any], stored: str, message: str, tmp_path: Path
) -> None:
    params = tiny_params(**KINDS[stored])
    write_huggingface(tmp_path, params, random_weights(params))
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"attention_bias": False, "mlp_bias": False, **stated}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as caught:
        open_checkpoint(tmp_path)
    assert message in str(caught.value)
