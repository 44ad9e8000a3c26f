"""The models of the benchmarks: the same weights from the same seed, shapes, and JSON."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from fastllama import Llama
from fastllama.benchmarks import models
from fastllama.benchmarks.models import PUBLISHED_MODELS, ModelSource, ModelSpec, random_tensors
from tests.benchmarks.cases import ARGS, CPU, SHAPE, SPEC


def test_random_tensors_repeat_and_fill_the_model() -> None:
    first = dict(random_tensors(ARGS, 5, CPU, torch.float32))
    again = dict(random_tensors(ARGS, 5, CPU, torch.float32))
    other = dict(random_tensors(ARGS, 6, CPU, torch.float32))
    assert {name: tuple(tensor.shape) for name, tensor in first.items()} == ARGS.shapes
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in first)
    assert not torch.equal(first["layers.0.attention.wk.weight"], first["layers.1.attention.wk.weight"])
    assert first["output.weight"].std().item() == pytest.approx(models.RANDOM_STD, rel=0.1)
    assert first["norm.weight"].mean().item() == pytest.approx(1.0, abs=0.05)


def test_random_176m_has_176_million_parameters() -> None:
    args = ModelSource.named("random-176m").args(1, 64)
    assert (args.hidden_dim, args.head_dim) == (3584, 64)
    assert sum(torch.Size(shape).numel() for shape in args.shapes.values()) == pytest.approx(176e6, rel=0.01)


def test_a_spec_survives_json_and_a_source_needs_one_origin() -> None:
    assert ModelSpec.from_json(**json.loads(json.dumps(SPEC.to_json()))) == SPEC
    with pytest.raises(ValueError, match="folder or from a shape"):
        ModelSource("neither")
    with pytest.raises(ValueError, match="folder or from a shape"):
        ModelSource("both", ckpt_dir="x", shape=SHAPE)
    with pytest.raises(ValueError, match=r"unknown model 'gpt'.*random-176m"):
        ModelSource.named("gpt")


def test_build_gives_random_weights_a_printable_tokenizer() -> None:
    llm = SPEC.build()
    assert llm.tokenizer.n_words == ARGS.vocab_size
    assert llm.tokenizer.decode([65, 256, 343]) == "Aaadj"
    with pytest.raises(ValueError, match="at least 512 tokens, got 300"):
        dataclasses.replace(SPEC, source=ModelSource("small", shape={**SHAPE, "vocab_size": 300})).build()


@pytest.mark.parametrize(
    "kind",
    ["Meta, Llama 2", "Hugging Face, padded vocabulary", "Hugging Face, metaspace tokenizer", "GGUF, SentencePiece"],
)
def test_a_checkpoint_of_any_kind_can_be_measured(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed: pip install sentencepiece")
    pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    from tests.support.checkpoint_kinds import KINDS

    arguments = KINDS[kind](tmp_path / "model")
    source = ModelSource.folder(arguments["ckpt_dir"], arguments["tokenizer_path"])
    llm = ModelSpec(source, CPU, torch.float32, 1, 32).build()
    expected = Llama.build(**arguments, max_seq_len=32, max_batch_size=1, device="cpu", dtype="float32")
    answers = [one.text_completion(["Once"], temperature=0, max_gen_len=8) for one in (llm, expected)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("name", "billions", "hidden_dim"),
    [
        ("llama3-8b", 8.03, 14336),
        ("llama3-70b", 70.55, 28672),
        ("llama3.1-8b", 8.03, 14336),
        ("llama3.2-1b", 1.24, 8192),
        ("llama3.2-3b", 3.21, 8192),
    ],
)
def test_published_shapes_have_the_published_sizes(name: str, billions: float, hidden_dim: int) -> None:
    args = ModelSource.named(name).args(1, 64)
    counted = [name for name in args.shapes if not (args.tied_output and name == "output.weight")]
    assert sum(torch.Size(args.shapes[name]).numel() for name in counted) / 1e9 == pytest.approx(billions, abs=0.005)
    assert args.hidden_dim == hidden_dim and name in PUBLISHED_MODELS
