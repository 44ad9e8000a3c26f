"""The complete model with quantised weights on the native backend, against the reference backend."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import Llama, ModelArgs, Transformer
from fastllama.benchmarks.tolerances import assert_matches
from fastllama.decode_graph import Decoder
from fastllama.kernels.native import library
from fastllama.kernels.native.graph import NativeGraph
from fastllama.kernels.quantized import QuantizedWeight
from fastllama.quantization import CHOICES
from fastllama.step_graphs import PLAIN
from fastllama.tokenizer import Tokenizer
from tests.support.checkpoints import write_tokenizer
from tests.support.comparisons import assert_same_answers

pytestmark = pytest.mark.skipif(library.obstacle() is not None, reason="the native kernels were not built")

# Columns of 128 and 160, so that a model in int4 has groups of 128 and of 32.
ARGS = ModelArgs(
    dim=128, n_layers=2, n_heads=8, n_kv_heads=4, vocab_size=512, hidden_dim=160, max_seq_len=64, max_batch_size=4
)
PROMPTS = [[5, 250, 17, 300, 41], [9], list(range(100, 140)), [31, 32]]


def random_weights(seed: int) -> dict[str, Tensor]:
    """Weights that give products of about unit variance."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        for name, shape in ARGS.shapes.items()
    }


def model(backend: str, quantize: str, dtype: torch.dtype = torch.float32, args: ModelArgs = ARGS) -> Transformer:
    made = Transformer(
        copy.copy(args), device="cpu", dtype=dtype, backend=backend, init_weights=False, quantize=quantize
    )
    made.load_tensors(random_weights(7).items())
    return made


def llama(folder: Path, *which: Any) -> Llama:
    if not (folder / "tokenizer.model").exists():
        write_tokenizer(folder)
    llm = Llama(model(*which), Tokenizer(str(folder / "tokenizer.model")))
    llm.tokenizer.stop_tokens = set()
    return llm


@pytest.mark.parametrize("quantize", CHOICES)
def test_generates_the_reference_tokens(quantize: str, tmp_path: Path) -> None:
    """Greedy tokens of prompts that are one token and many, alone and together."""
    reference, native = (llama(tmp_path, backend, quantize) for backend in ("reference", "native"))
    for prompts in (PROMPTS, PROMPTS[1:2]):
        expected = reference.generate(prompts, 12, temperature=0, logprobs=True, echo=True)
        assert_same_answers(native.generate(prompts, 12, temperature=0, logprobs=True, echo=True), expected)


@pytest.mark.parametrize("quantize", ["int8", "fp8", "int4-g32"])
def test_replays_like_eager(quantize: str, tmp_path: Path) -> None:
    llm = llama(tmp_path, "native", quantize)
    llm.decoder = Decoder(llm.model, graphs=False)
    expected = llm.generate(PROMPTS, 12, temperature=0, logprobs=True)
    llm.decoder = Decoder(llm.model)
    for _ in range(2):
        assert_same_answers(llm.generate(PROMPTS, 12, temperature=0, logprobs=True), expected)
    assert isinstance(llm.decoder.graphs.captured[4, PLAIN, 0, False], NativeGraph)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_half_precision_logits_are_the_references(quantize: str) -> None:
    models = [model(backend, quantize, torch.bfloat16) for backend in ("reference", "native")]
    tokens = torch.arange(3 * 20).view(3, 20) * 7 % 512
    for begin, end in ((0, 18), (18, 19), (19, 20)):
        expected, ours = (one.forward(tokens[:, begin:end], begin) for one in models)
        assert_matches("logits", ours.to(torch.bfloat16), expected)


@pytest.mark.parametrize("quantize", CHOICES)
def test_weights_are_read_back_as_on_the_reference(quantize: str) -> None:
    states = [model(backend, quantize).state_dict() for backend in ("reference", "native")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[1][name], weight) for name, weight in states[0].items())


def test_the_head_of_an_int4_model_is_int8() -> None:
    native = model("native", "int4")
    assert isinstance(native.output, QuantizedWeight) and native.output.format == "int8"
    for one in native.packed_weights():
        weight = getattr(one.owner, one.attribute)
        if one.attribute in ("wqkv", "wo", "w13", "w2"):
            assert (weight.format, weight.group_size) == ("int4", 32 if one.attribute == "w2" else 128)
