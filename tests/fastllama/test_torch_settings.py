"""A caller's settings in torch do not change what a Llama generates, and are restored after every call and step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import Llama
from fastllama.benchmarks.tolerances import TOLERANCES
from tests.fastllama.caller_settings import SETTINGS, set_full_precision, state
from tests.support.checkpoints import random_weights, tiny_params, write_meta, write_tokenizer

PROMPTS = [[1, 2, 3], [7]]
TENSOR: Any = torch.tensor([[1, 2, 3, 4]])
TOLERANCE = TOLERANCES["divided logprobs", torch.float32]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("checkpoint")
    write_meta(path, tiny_params(), random_weights(tiny_params(), seed=7))
    write_tokenizer(path)
    return str(path)


def build(folder: str, dtype: str) -> Llama:
    return Llama.build(folder, folder, 32, 2, device="cpu", dtype=dtype)


def answers(llm: Llama) -> tuple[Any, list[float]]:
    """(values that are compared exactly, log-probabilities) from one call of every kind."""
    tokens, scores = llm.generate(PROMPTS, 5, temperature=0, logprobs=True, echo=True)
    drawn = llm.generate(TENSOR, 5, 0.9, 0.8, seed=3)
    text = llm.text_completion(["a b"], temperature=0, max_gen_len=3)
    streamed = [increment.tokens for increment in llm.stream(PROMPTS, 4, 0.7, seed=[1, 2])]
    assert scores is not None
    return (tokens, drawn, text, streamed), [score for row in scores for score in row]


@pytest.fixture(scope="module")
def built(folder: str) -> dict[str, tuple[Llama, Any, list[float]]]:
    models = {dtype: build(folder, dtype) for dtype in ("float32", "bfloat16", "float16")}
    return {dtype: (llm, *answers(llm)) for dtype, llm in models.items()}


@pytest.fixture(autouse=True, scope="module")
def full_precision() -> None:
    set_full_precision()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_callers_setting_changes_no_answer(folder: str, built: dict[str, Any], name: str) -> None:
    generator = torch.get_rng_state()
    for dtype, (llm, expected, scores) in built.items():
        with SETTINGS[name]():
            before = state()
            found = answers(llm)
            rebuilt = build(folder, dtype)
            assert state() == before
        for exact, logprobs in (found, answers(rebuilt)):
            assert exact == expected
            assert logprobs == pytest.approx(scores, abs=TOLERANCE)
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_model_built_in_inference_mode_has_ordinary_tensors(folder: str, built: dict[str, Any]) -> None:
    with torch.inference_mode():
        llm = build(folder, "float32")
    assert not llm.model.tok_embeddings.is_inference() and not llm.model.cache.k.is_inference()
    llm.model.load_state_dict({name: weight.clone() for name, weight in llm.model.state_dict().items()})
    assert answers(llm)[0] == built["float32"][1]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_callers_settings_are_in_effect_between_steps_of_a_stream(built: dict[str, Any], name: str) -> None:
    llm = built["float32"][0]
    expected = [increment.tokens for increment in llm.stream(PROMPTS, 5, 0.7, seed=1, logprobs=True)]
    outside = state()
    with SETTINGS[name]():
        inside = state()
        stream = llm.stream(PROMPTS, 5, 0.7, seed=1, logprobs=True)
        found = [next(stream).tokens]
        assert state() == inside
    assert state() == outside
    found.append(next(stream).tokens)  # each step may run under other settings
    with SETTINGS[name]():
        found += [increment.tokens for increment in stream]
        assert state() == inside
    assert found == expected
    stream = llm.stream(PROMPTS, 5)
    with SETTINGS[name]():
        next(stream)
        stream.close()
        assert state() == inside
    assert state() == outside


def test_settings_are_restored_after_an_error(built: dict[str, Any]) -> None:
    llm = built["float32"][0]
    for name in SETTINGS:
        with SETTINGS[name]():
            before = state()
            with pytest.raises(ValueError, match="^there must be at least one prompt, got an empty list$"):
                llm.generate([], 3)
            assert state() == before


def test_a_denormal_temperature_is_not_zero(built: dict[str, Any]) -> None:
    llm = built["float32"][0]
    drawn = [llm.generate(PROMPTS, 6, 1e-310, seed=1), llm.generate(PROMPTS, 6, 0, seed=1)]
    with SETTINGS["flushed-denormals"]():
        assert [llm.generate(PROMPTS, 6, 1e-310, seed=1), llm.generate(PROMPTS, 6, 0, seed=1)] == drawn
    assert drawn[0] == drawn[1]  # the logits are all different, so both draw the most likely token


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], object]] = {
    "grad": lambda function: torch.func.grad(function)(torch.ones(2)),
    "vmap": lambda function: torch.func.vmap(function)(torch.ones(2)),
    "functionalize": lambda function: torch.func.functionalize(function)(torch.ones(2)),
    "trace": lambda function: torch.jit.trace(function, torch.ones(2)),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.trace`:DeprecationWarning")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_surrounding_transforms_do_not_affect_a_call(folder: str, built: dict[str, Any], name: str) -> None:
    llm, expected, scores = built["float32"]
    found: list[Any] = []

    def function(x: Tensor) -> Tensor:
        found.extend((answers(llm), answers(build(folder, "float32"))))
        return x.sum()

    TRANSFORMS[name](function)
    for exact, logprobs in found:
        assert exact == expected
        assert logprobs == pytest.approx(scores, abs=TOLERANCE)
    assert found
