"""Scaled rope of GGUF files: tables against transformers and plain formulas, logits against a Hugging Face folder."""

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from fastllama import Llama, ModelArgs
from fastllama.checkpoint import open_checkpoint
from fastllama.cli import main
from fastllama.rope import rope_frequencies, rope_table
from tests.support.checkpoints import random_weights, write_huggingface
from tests.support.comparisons import assert_same_logits
from tests.support.pipelines import byte_level, write_pipeline

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")

from tests.support.gguf_files import (  # noqa: E402
    FIELDS,
    PARAMS,
    WEIGHTS,
    byte_level_fields,
    metadata,
    quantised,
    write_gguf,
)

N_POSITIONS = 256
HALF = 16  # frequencies
ROPE = "llama.rope."
SCALING = ROPE + "scaling."
F32 = gguf.GGMLQuantizationType.F32
LINEAR = {SCALING + "type": "linear", SCALING + "factor": 4.0}
YARN = {SCALING + "type": "yarn", SCALING + "factor": 4.0, SCALING + "original_context_length": 16}
FACTORS = np.concatenate((np.linspace(1, 8, 8), np.linspace(3, 0.5, 8))).astype(np.float32)


def opened(folder: Path, fields: dict[str, Any], factors: np.ndarray | None = None) -> ModelArgs:
    """The arguments of a file with these fields, and with these factors in its tensor."""
    tensors = quantised(WEIGHTS, "F32")
    if factors is not None:
        tensors["rope_freqs.weight"] = (factors, F32)
    checkpoint = open_checkpoint(write_gguf(folder / "model.gguf", FIELDS | fields, tensors))
    return ModelArgs(**checkpoint.params, max_seq_len=N_POSITIONS)


def transformers_rope(theta: float, rope: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """transformers' frequencies and attention factor for heads of 32 numbers."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=8,
        head_dim=2 * HALF,
        max_position_embeddings=131072,
        rope_parameters={**rope, "rope_theta": theta},
    )
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    return frequencies, attention_factor


def check_table(args: ModelArgs, frequencies: torch.Tensor, attention_factor: float) -> None:
    torch.testing.assert_close(rope_frequencies(args), frequencies.float(), rtol=2e-6, atol=0)
    angles = torch.outer(torch.arange(N_POSITIONS).double(), frequencies.double())
    expected = torch.stack((angles.cos(), angles.sin()), -1) * attention_factor
    tolerance = 2e-6 * (1 + N_POSITIONS * frequencies.max().item()) * attention_factor
    torch.testing.assert_close(rope_table(args).double(), expected, rtol=0, atol=tolerance)


def plain_frequencies(theta: float = 500000.0) -> torch.Tensor:
    return theta ** (-torch.arange(0, 2 * HALF, 2).double() / (2 * HALF))


@pytest.mark.parametrize("factor", [0.5, 2.5, 4.0, 40.0])
def test_linear_tables_are_those_of_transformers(tmp_path: Path, factor: float) -> None:
    for theta in (2.0, 1e4, 5e5):
        expected = transformers_rope(theta, {"rope_type": "linear", "factor": factor})
        spellings: list[dict[str, Any]] = [
            {SCALING + "type": "linear", SCALING + "factor": factor},
            {SCALING + "factor": factor},
            {ROPE + "scale_linear": factor},
            {SCALING + "factor": factor, ROPE + "scale_linear": 3.0},
        ]
        for number, fields in enumerate(spellings):
            folder = tmp_path / f"{theta}-{number}"
            folder.mkdir()
            args = opened(folder, {**fields, ROPE + "freq_base": theta})
            assert args.rope_type == "linear"
            check_table(args, *expected)


@pytest.mark.parametrize("theta", [2.0, 1e4, 5e5])
@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0, 40.0])
def test_yarn_tables_are_those_of_transformers(tmp_path: Path, theta: float, factor: float) -> None:
    choices = itertools.product((16, 1000, 8192), (None, 24.0), (None, 2.5), (None, 1.3))
    for number, (length, fast, slow, multiple) in enumerate(choices):
        stated = {"yarn_beta_fast": fast, "yarn_beta_slow": slow, "attn_factor": multiple}
        fields: dict[str, Any] = {SCALING + key: value for key, value in stated.items()}
        fields |= {SCALING + "type": "yarn", SCALING + "factor": factor, SCALING + "original_context_length": length}
        folder = tmp_path / str(number)
        folder.mkdir()
        rope = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}
        rope |= {key: value for key, value in (("beta_fast", fast), ("beta_slow", slow)) if value is not None}
        frequencies, attention_factor = transformers_rope(theta, rope)
        args = opened(folder, {**fields, ROPE + "freq_base": theta})
        assert args.rope_type == "yarn"
        check_table(args, frequencies, attention_factor * (multiple or 1.0))


def test_yarns_length_is_the_context_length_if_it_is_not_stated(tmp_path: Path) -> None:
    for original in (None, 0):
        fields = {**YARN, SCALING + "original_context_length": original, "llama.context_length": 500}
        assert opened(tmp_path, fields).rope_original_max_seq_len == 500
    assert opened(tmp_path, {**YARN, "llama.context_length": 500}).rope_original_max_seq_len == 16


def test_yarns_betas_are_used_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "fastllama")
    opened(tmp_path, {**YARN, SCALING + "yarn_beta_fast": 32.0, SCALING + "yarn_beta_slow": 1.0})
    assert not caplog.messages
    opened(tmp_path, {**YARN, SCALING + "yarn_beta_fast": 24.0})
    assert "YaRN's betas 24 and 1 are used, as stated; llama.cpp does not read them" in caplog.text


@pytest.mark.parametrize(
    "values",
    [{"yarn_ext_factor": 1.0}, {"yarn_ext_factor": -1.0}, {"yarn_attn_factor": 1.0}, {"yarn_attn_factor": 1.13863}],
)
def test_yarns_usual_values_may_be_stated(tmp_path: Path, values: dict[str, float]) -> None:
    stated = opened(tmp_path, YARN | {SCALING + key: value for key, value in values.items()})
    assert stated == opened(tmp_path, YARN)


@pytest.mark.parametrize(
    "fields",
    [
        {SCALING + "type": "none", SCALING + "factor": 4.0},
        {SCALING + "type": "linear", SCALING + "factor": 1.0},
        {SCALING + "type": "linear", SCALING + "factor": 0.0},
        {SCALING + "attn_factor": 1.0},
    ],
)
def test_unscaled_positions_may_be_named(tmp_path: Path, fields: dict[str, Any]) -> None:
    assert opened(tmp_path, fields) == opened(tmp_path, {})
    assert opened(tmp_path, fields, np.ones(HALF, np.float32)) == opened(tmp_path, {})


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_factors_of_llama3s_form_are_scaled_rope(tmp_path: Path, factor: float) -> None:
    smooth = ((8192 * plain_frequencies() / (2 * torch.pi) - 1) / 3).clamp(0, 1)
    factors = (1 / (smooth + (1 - smooth) / factor)).float().numpy()
    args = opened(tmp_path, {}, factors)
    assert (args.rope_type, args.rope_scaling_factor) == ("llama3", factor)
    assert args.rope_factors is None
    # With a further scaling, they are factors as any others.
    assert opened(tmp_path, LINEAR, factors).rope_type == "factors"


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("factors", [FACTORS, np.full(HALF, 3.0, np.float32), np.float32(1e-20) * FACTORS])
def test_factors_divide_the_frequencies_before_any_scaling(tmp_path: Path, theta: float, factors: np.ndarray) -> None:
    base = {ROPE + "freq_base": theta}
    expected = plain_frequencies(theta) / torch.from_numpy(factors).double()
    args = opened(tmp_path, base, factors)
    assert args.rope_type == "factors"
    torch.testing.assert_close(rope_frequencies(args).double(), expected, rtol=2e-6, atol=0)
    linear = opened(tmp_path, base | LINEAR, factors)
    torch.testing.assert_close(rope_frequencies(linear).double(), expected / 4, rtol=2e-6, atol=0)
    fields = {SCALING + "attn_factor": 1.5, SCALING + "original_context_length": 1000}
    yarn = opened(tmp_path, base | YARN | fields, factors)
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000}
    scaled, attention_factor = transformers_rope(theta, rope)
    expected = scaled.double() / torch.from_numpy(factors).double()
    torch.testing.assert_close(rope_frequencies(yarn).double(), expected, rtol=2e-6, atol=0)
    assert yarn.rope_attention_factor == pytest.approx(1.5 * attention_factor)
    torch.testing.assert_close(
        rope_table(yarn)[0], torch.tensor([[1.5 * attention_factor, 0.0]]).expand(HALF, 2), rtol=1e-6, atol=0
    )
    for every in (args, linear, yarn):
        assert torch.isfinite(rope_table(every)).all()


ROPES: dict[str, tuple[dict[str, Any], np.ndarray | None, dict[str, Any]]] = {
    "linear": (LINEAR, None, {"rope_type": "linear", "factor": 4.0}),
    "linear, of which factors are a part": (
        {SCALING + "factor": 2.0},
        np.full(HALF, 2.0, np.float32),
        {"rope_type": "linear", "factor": 4.0},
    ),
    "yarn": (YARN, None, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
    "yarn, with betas": (
        {**YARN, SCALING + "yarn_beta_fast": 4.0, SCALING + "yarn_beta_slow": 0.25},
        None,
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 4.0,
            "beta_slow": 0.25,
        },
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_tokens_and_logits_are_those_of_a_huggingface_folder(tmp_path: Path, name: str) -> None:
    """Beyond the original context of 16 positions."""
    fields, factors, rope = ROPES[name]
    tokenizer = byte_level()
    params = PARAMS | {"vocab_size": tokenizer.get_vocab_size()}
    weights = random_weights(params, seed=5)
    tensors = quantised(weights, "F32")
    if factors is not None:
        tensors["rope_freqs.weight"] = (factors, F32)
    write_gguf(tmp_path / "model.gguf", metadata(params) | byte_level_fields(tokenizer, "smollm") | fields, tensors)
    folder = write_huggingface(tmp_path / "hf", params, weights, rope_parameters=rope)
    write_pipeline(tokenizer, folder)
    plain = write_huggingface(tmp_path / "plain", params, weights)
    write_pipeline(tokenizer, plain)
    ours, theirs, unscaled = (
        Llama.build(str(place), None, 64, 1, device="cpu", dtype=torch.float32)
        for place in (tmp_path / "model.gguf", folder, plain)
    )
    for llm in (ours, theirs):
        llm.tokenizer.stop_tokens = set()
    prompt = [5, 250, 17, 30, 41, 101, 3, 77, 51, 8, 19, 26, 44, 91, 200, 15, 2, 9, 31, 32]
    answer = ours.generate([prompt], 40, temperature=0.0)[0][0]
    assert list(answer) == list(theirs.generate([prompt], 40, temperature=0.0)[0][0])
    tokens = torch.tensor([prompt + list(answer)])
    logits = ours.model.forward(tokens, 0)
    assert_same_logits(logits, theirs.model.forward(tokens, 0))
    assert (logits - unscaled.model.forward(tokens, 0)).abs().max() > 0.1


def test_factors_allow_long_contexts_and_can_be_replaced(tmp_path: Path) -> None:
    tokenizer = byte_level()
    params = PARAMS | {"vocab_size": tokenizer.get_vocab_size()}
    tensors = quantised(random_weights(params), "F32") | {"rope_freqs.weight": (FACTORS, F32)}
    fields = metadata(params) | byte_level_fields(tokenizer, "smollm")
    path = write_gguf(tmp_path / "model.gguf", fields, tensors)
    llm = Llama.build(str(path), None, 9000, 1, device="cpu")
    assert (llm.model.params.rope_type, llm.model.params.rope_factors) == ("factors", tuple(FACTORS.tolist()))
    replaced = Llama.build(str(path), None, 16, 1, device="cpu", rope_scaling_factor=8.0).model.params
    assert (replaced.rope_type, replaced.rope_scaling_factor) == ("llama3", 8.0)
    described = CliRunner().invoke(main, ["inspect", str(path), "--json"], catch_exceptions=False).output
    found = {name: value for name, value in json.loads(described)["architecture"].items() if "rope" in name}
    assert found == {
        "rope_theta": 500000.0,
        "use_scaled_rope": False,
        "rope_type": "factors",
        "rope_attention_factor": 1.0,
        "rope_factors": FACTORS.tolist(),
    }
    text = CliRunner().invoke(main, ["inspect", str(path)], catch_exceptions=False).output
    assert "  rope_factors           16 from 0.5 to 8\n" in text
