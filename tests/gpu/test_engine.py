"""The engine on an NVIDIA GPU: rows join and leave between graph replays that are queued, and no answer changes."""

import random
from pathlib import Path

import pytest
import torch

from fastllama import Engine, Llama, SamplingParams
from fastllama.decode_graph import REPLAYS_AHEAD
from tests.support.checkpoints import random_weights, tiny_params, write_meta, write_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU: torch.cuda.is_available() is False"),
]
REQUESTS = 60
ROWS, LENGTH = 8, 256
WORDS = range(300)


@pytest.fixture(autouse=True)
def nan_in_empty_memory() -> None:
    """Disable the fixture: it adds launches, and these tests run the model as users do."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine")
    write_meta(path, tiny_params(), random_weights(tiny_params(), seed=3))
    write_tokenizer(path)
    return path


def build(folder: Path, cache_tokens: int | None = None) -> Llama:
    files = str(folder), str(folder / "tokenizer.model")
    return Llama.build(*files, LENGTH, ROWS, device="cuda", dtype="float32", cache_tokens=cache_tokens)


def workload() -> list[tuple[list[int], SamplingParams]]:
    """Prompts of all lengths, some with a common beginning, greedy and drawn."""
    draw = random.Random(7)
    common = draw.choices(WORDS, k=130)
    requests = []
    for number in range(REQUESTS):
        begin = common if number % 3 == 0 else []
        prompt = begin + draw.choices(WORDS, k=draw.randint(1, 60))
        temperature, length = 0.8 * (number % 2), draw.randint(1, 60)
        requests.append((prompt, SamplingParams(max_gen_len=length, temperature=temperature, seed=number)))
    return requests


def answers(engine: Engine, requests: list[tuple[list[int], SamplingParams]]) -> list[list[int]]:
    submitted = [engine.submit(prompt, params) for prompt, params in requests]
    return [request.result().answer.tokens for request in submitted]


@pytest.mark.parametrize("cache_tokens", [None, 320], ids=["ample", "preempting"])
def test_answers_are_those_of_each_request_alone(folder: Path, cache_tokens: int | None) -> None:
    """Another batch size may decide a tie otherwise: at most one answer in twenty may differ, from some token on."""
    requests, llm = workload(), build(folder, cache_tokens)
    engine = llm.engine()
    assert llm.decoder.replays_ahead == REPLAYS_AHEAD > 0
    together = answers(engine, requests)
    assert (engine.stats.preemptions > 0) == (cache_tokens is not None) and engine.stats.cached_tokens > 0
    alone = [answers(llm.engine(reuse_prefixes=False), [request])[0] for request in requests]
    assert sum(ours != expected for ours, expected in zip(together, alone, strict=True)) <= REQUESTS // 20


def test_controls_and_likely_tokens_run_in_a_graph(folder: Path) -> None:
    """Penalties, biases and alternatives, beside requests without them."""
    llm = build(folder)
    controlled = SamplingParams(
        max_gen_len=30, temperature=0, logprobs=5, repetition_penalty=1.3, frequency_penalty=0.5, top_k=20, min_p=0.01
    )
    prompts = [[5, 250, 17], [9], list(range(100, 140))]
    requests = [
        (prompt, params) for prompt in prompts for params in (controlled, SamplingParams(max_gen_len=30, seed=1))
    ]
    cpu = Llama.build(str(folder), str(folder / "tokenizer.model"), LENGTH, ROWS, device="cpu", dtype="float32")
    assert answers(llm.engine(), requests) == answers(cpu.engine(), requests)
    assert len(set(answers(llm.engine(), [requests[0]])[0])) > 15, "the penalties had no effect"


def test_an_engine_in_a_thread_serves_many_threads(folder: Path) -> None:
    requests, llm = workload(), build(folder)
    expected = answers(llm.engine(), requests)
    with llm.engine().start() as engine:
        assert answers(engine, requests) == expected


def test_cancelled_requests_leave_the_others_alone(folder: Path) -> None:
    requests, llm = workload(), build(folder)
    expected = answers(llm.engine(reuse_prefixes=False), requests)
    engine = llm.engine(reuse_prefixes=False)
    submitted = [engine.submit(prompt, params) for prompt, params in requests]
    for number, request in enumerate(submitted):
        engine.step()
        if number % 4 == 0:
            request.cancel()
    found = [request.result().answer for request in submitted]
    assert any(answer.finish_reason == "cancelled" for answer in found)
    kept = [(answer.tokens, wanted) for answer, wanted in zip(found, expected, strict=True)]
    assert all(tokens == wanted[: len(tokens)] for tokens, wanted in kept)
    assert engine.stats.used_pages == 0
