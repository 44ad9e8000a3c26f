"""Linear and YaRN rope of Hugging Face's folders against transformers: tables, tokens and logits."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from fastllama import Llama, ModelArgs
from fastllama.checkpoint import open_checkpoint
from fastllama.checkpoint.huggingface_config import model_params
from fastllama.checkpoint.json_config import JsonConfig
from fastllama.rope import rope_frequencies, rope_table
from tests.support.bad_checkpoints import CONFIG
from tests.support.checkpoints import (
    huggingface_model,
    random_weights,
    tiny_params,
    write_huggingface,
    write_meta,
    write_tokenizer,
)
from tests.support.comparisons import assert_same_logits

N_POSITIONS = 256
ABSENT: Any = ...
# The values of each field from which the cases are drawn. ABSENT: the field is left out.
COMMON: dict[str, list[Any]] = {
    "head_dim": [ABSENT, 2, 6, 64, 128],
    "max_position_embeddings": [ABSENT, 64, 4096],
    "rope_theta": [ABSENT, 2.0, 1e4, 5e5],
}
FACTORS = [0.5, 1, 4.0, 40.0]
YARN: dict[str, list[Any]] = {
    "factor": [*FACTORS, None],
    "original_max_position_embeddings": [ABSENT, 1, 16, 1000, 8192, 2**31 - 1],
    "attention_factor": [ABSENT, None, 1.3],
    "beta_fast": [ABSENT, None, 0, 24, 1e30],
    "beta_slow": [ABSENT, None, 1e-30, 2.5, 24],
    "mscale": [ABSENT, 0, 0.707, 1.5],
    "mscale_all_dim": [ABSENT, None, 0.0, 1],
    "truncate": [ABSENT, None, True, False],
}
N_YARN_CASES = 150


def drawn(rng: random.Random, values: dict[str, list[Any]]) -> dict[str, Any]:
    picked = {key: rng.choice(choices) for key, choices in values.items()}
    return {key: value for key, value in picked.items() if value is not ABSENT}


def yarn_case(seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields outside and inside the section. beta_fast is not below beta_slow, which we refuse."""
    rng = random.Random(seed)
    outside, rope = drawn(rng, COMMON), {"rope_type": "yarn", **drawn(rng, YARN)}
    if (rope.get("beta_fast") or 32) < (rope.get("beta_slow") or 1):
        del rope["beta_slow"]
    return outside, rope


def check_against_transformers(config: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    args = ModelArgs(**model_params(JsonConfig(Path("config.json"), config)), max_seq_len=N_POSITIONS)
    theirs = LlamaRotaryEmbedding(LlamaConfig(**json.loads(json.dumps(config))))  # it changes its arguments
    frequencies = rope_frequencies(args)
    torch.testing.assert_close(frequencies, theirs.inv_freq, rtol=2e-6, atol=0)
    cos, sin = theirs(torch.zeros(1), torch.arange(N_POSITIONS)[None])
    half = args.head_dim // 2
    expected = torch.stack((cos[0, :, :half], sin[0, :, :half]), dim=-1)
    largest_angle = N_POSITIONS * frequencies.max().item()
    tolerance = 2e-6 * (1 + largest_angle) * args.rope_attention_factor
    torch.testing.assert_close(rope_table(args), expected, rtol=0, atol=tolerance)


def with_rope(outside: dict[str, Any], rope: dict[str, Any], layout: str) -> dict[str, Any]:
    """config.json with these fields in one of the layouts, of which the oldest says `type`."""
    if layout == "new":
        moved = {key: outside[key] for key in ("rope_theta",) if key in outside}
        rest = {key: value for key, value in {**CONFIG, **outside}.items() if key != "rope_theta"}
        return {**rest, "rope_parameters": {**rope, **moved}}
    if layout == "oldest":
        rope = {"type" if key == "rope_type" else key: value for key, value in rope.items()}
    return {**CONFIG, **outside, "rope_scaling": rope}


@pytest.mark.parametrize("layout", ["new", "old", "oldest"])
@pytest.mark.parametrize("factor", FACTORS)
def test_linear_tables_are_those_of_transformers(layout: str, factor: float) -> None:
    for values in itertools.product(*COMMON.values()):
        outside = {key: value for key, value in zip(COMMON, values, strict=True) if value is not ABSENT}
        check_against_transformers(with_rope(outside, {"rope_type": "linear", "factor": factor}, layout))


@pytest.mark.parametrize("layout", ["new", "old", "oldest"])
def test_yarn_tables_are_those_of_transformers(layout: str) -> None:
    cases = [yarn_case(seed) for seed in range(N_YARN_CASES)]
    for outside, rope in cases:
        check_against_transformers(with_rope(outside, rope, layout))
    for key, choices in YARN.items():  # every value was drawn
        assert {repr(rope.get(key, ABSENT)) for _, rope in cases} == {repr(choice) for choice in choices}


def test_the_length_outside_the_section_goes_first(caplog: pytest.LogCaptureFixture) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    config = {**CONFIG, "rope_scaling": rope, "original_max_position_embeddings": 256}
    check_against_transformers(config)
    assert "original_max_position_embeddings=256 is used" in caplog.text


@pytest.mark.parametrize("field", ["factor", "attention_factor", "beta_fast", "mscale", "mscale_all_dim"])
@pytest.mark.parametrize("value", [1e30, 1e-30])
def test_extreme_numbers_give_a_table(field: str, value: float) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_slow": 1e-30, field: value}
    for theta in (1.0000000000000002, 1e30):
        params = model_params(JsonConfig(Path("config.json"), {**CONFIG, "rope_theta": theta, "rope_scaling": rope}))
        table = rope_table(ModelArgs(**params, max_seq_len=4))
        assert table.shape == (4, 4, 2) and table.isfinite().all()


def test_numbers_that_give_no_finite_angles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'rope_scaling\.factor': expected a number of at least 1e-30, got 1e-300"):
        model_params(JsonConfig(Path("a"), {**CONFIG, "rope_scaling": {"type": "linear", "factor": 1e-300}}))
    fields: dict[str, Any] = {
        "rope_theta": 1e-30,
        "rope_type": "linear",
        "rope_scaling_factor": 1e-30,
        "use_scaled_rope": False,
    }
    write_meta(tmp_path, tiny_params(), random_weights(tiny_params()), **fields)
    write_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="rope_theta=1e-30, .* give angles that are not finite at position 15"):
        Llama.build(str(tmp_path), None, 16, 1, device="cpu")


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn-fields": {
        "rope_type": "yarn",
        "factor": 3.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 4.0,
        "beta_slow": 0.25,
        "mscale": 0.707,
        "mscale_all_dim": 1.0,
        "truncate": False,
    },
    "yarn-attention": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "attention_factor": 1.5,
    },
}


@pytest.mark.parametrize("old_fields", [False, True], ids=["new", "old"])
@pytest.mark.parametrize("rope", ROPES)
def test_tokens_and_logits_are_those_of_transformers(tmp_path: Path, rope: str, old_fields: bool) -> None:
    """Beyond the original context of 16 positions."""
    params = tiny_params()
    weights = random_weights(params, seed=5)
    write_huggingface(tmp_path, params, weights, old_fields=old_fields, rope_parameters=ROPES[rope])
    llm = Llama.build(str(tmp_path), str(write_tokenizer(tmp_path)), 64, 2, device="cpu")
    llm.tokenizer.stop_tokens = set()
    model = huggingface_model(params, weights, ROPES[rope])
    model.generation_config.eos_token_id = None
    prompts = [[5, 250, 17, 300, 41], [101, 3, 77, 512, 8, 19, 260, 44, 91, 200, 15, 2, 9, 31, 32, 7, 401, 55, 6, 90]]
    answers, _ = llm.generate(prompts, 40, temperature=0)
    plain = huggingface_model(params, weights)
    with torch.inference_mode():
        for prompt, answer in zip(prompts, answers, strict=True):
            tokens = torch.tensor([prompt + answer])
            expected = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)
            assert torch.equal(tokens, expected)
            logits = llm.model.forward(tokens, 0)
            assert_same_logits(logits, model(tokens).logits)
            assert (logits - plain(tokens).logits).abs().max() > 0.1  # so this rope is not the default one


@pytest.mark.parametrize("stated", ["float16", "bfloat16", "auto", None, 7])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_dtype_in_config_json_has_no_effect(tmp_path: Path, key: str, stated: Any) -> None:
    params = tiny_params()
    path = write_huggingface(tmp_path, params, random_weights(params)) / "config.json"
    config = {name: value for name, value in json.loads(path.read_text()).items() if name != "dtype"}
    path.write_text(json.dumps({**config, key: stated}))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.dtype == torch.float32
    assert {tensor.dtype for _, tensor in checkpoint.dense_tensors()} == {torch.float32}
