"""The complete model on an NVIDIA GPU: the CPU's tokens on both backends, graphs, streams and CUDA's defaults."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fastllama import Llama, SamplingParams
from fastllama.decode_graph import Decoder
from tests.support.checkpoints import random_weights, tiny_params, write_meta, write_tokenizer
from tests.support.comparisons import assert_same_answers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU: torch.cuda.is_available() is False"),
]
PROMPTS = [[5, 250, 17, 300, 41], [9], list(range(100, 140)), [31, 32]]
MAX_GEN_LEN = 20
RUNS = 100
CALLS = [(PROMPTS, 0.0), (PROMPTS[::-1], 1.0), (PROMPTS[1:3], 0.7)]


@pytest.fixture(autouse=True)
def nan_in_empty_memory() -> None:
    """Disable the fixture: it adds launches, and these tests run the model as users do."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpu")
    write_meta(path, tiny_params(), random_weights(tiny_params(), seed=3))
    write_tokenizer(path)
    return path


def build(folder: Path, device: str | None, dtype: str | None, backend: str | None = None) -> Llama:
    return Llama.build(str(folder), str(folder / "tokenizer.model"), 64, 4, device=device, dtype=dtype, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_float32_matches_the_cpu(folder: Path, backend: str) -> None:
    expected = build(folder, "cpu", "float32", "reference").generate(
        PROMPTS, MAX_GEN_LEN, temperature=0, logprobs=True, echo=True
    )
    ours = build(folder, "cuda", "float32", backend).generate(
        PROMPTS, MAX_GEN_LEN, temperature=0, logprobs=True, echo=True
    )
    assert ours[0] == expected[0]
    for scores, expected_scores in zip(ours[1] or [], expected[1] or [], strict=True):
        torch.testing.assert_close(torch.tensor(scores), torch.tensor(expected_scores), atol=1e-3, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_seeded_draws_match_the_cpu(folder: Path, backend: str) -> None:
    expected = build(folder, "cpu", "float32", "reference").generate(PROMPTS, 8, seed=11)
    assert build(folder, "cuda", "float32", backend).generate(PROMPTS, 8, seed=11) == expected


def test_defaults_are_the_fused_backend_and_half_precision(folder: Path) -> None:
    llm = build(folder, None, None)
    assert llm.model.device.type == "cuda" and llm.model.ops.__name__ == "fastllama.kernels.fused"
    assert llm.model.dtype == (
        torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    )


@pytest.mark.parametrize("rows", [1, 4])
def test_greedy_is_deterministic(folder: Path, rows: int) -> None:
    """Greedy tokens and log-probabilities are bit-identical in a hundred runs."""
    llm = build(folder, None, None)
    first = llm.generate(PROMPTS[:rows], MAX_GEN_LEN, temperature=0, logprobs=True)
    assert all(llm.generate(PROMPTS[:rows], MAX_GEN_LEN, temperature=0, logprobs=True) == first for _ in range(RUNS))


@pytest.mark.parametrize("unroll", [1, 3])
def test_replays_like_eager(folder: Path, unroll: int) -> None:
    """Tokens and log-probabilities are bit-identical: a graph has the same launches."""
    llm = build(folder, None, None)
    assert llm.decoder.graphs.captured_sizes == [1, 4], "build captures the graphs of one row and of all"
    answers = []
    for decoder in (Decoder(llm.model, graphs=False), Decoder(llm.model, unroll=unroll)):
        llm.decoder = decoder
        answers.append([llm.generate(rows, MAX_GEN_LEN, t, logprobs=True, seed=7) for rows, t in CALLS * 3])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("kind", ["lookup", "draft"])
@pytest.mark.parametrize("n_guesses", [3, "auto"])
def test_steps_that_check_guesses_give_the_same(folder: Path, kind: str, n_guesses: int | str) -> None:
    """float32, where kernels of several tokens differ by rounding only; eager and replayed, alone and in the engine."""
    options: dict[str, Any] = {"dtype": "float32", "n_guesses": n_guesses, "speculate": kind}
    draft = str(folder) if kind == "draft" else None
    plain = build(folder, None, "float32")
    llm = Llama.build(str(folder), str(folder / "tokenizer.model"), 64, 4, draft=draft, **options)
    llm.tokenizer.stop_tokens = plain.tokenizer.stop_tokens
    expected = [plain.generate(rows, MAX_GEN_LEN, t, logprobs=True, seed=7) for rows, t in CALLS]
    for _ in range(3):
        found = [llm.generate(rows, MAX_GEN_LEN, t, logprobs=True, seed=7) for rows, t in CALLS]
        for ours, wanted in zip(found, expected, strict=True):
            assert_same_answers(ours, wanted)
    stats = llm.speculation
    assert stats is not None and stats.tokens == stats.steps + stats.accepted
    if kind == "draft" and n_guesses == 3:
        assert stats.accepted > stats.steps and stats.guess_seconds > 0
    many = [one.answer.tokens for one in llm.generate_many(PROMPTS * 3, SamplingParams(temperature=0, max_gen_len=9))]
    assert many == [
        one.answer.tokens for one in plain.generate_many(PROMPTS * 3, SamplingParams(temperature=0, max_gen_len=9))
    ]


def test_a_stream_yields_the_tokens_of_generate(folder: Path) -> None:
    llm = build(folder, None, None)
    expected, _ = llm.generate(PROMPTS, MAX_GEN_LEN, seed=7)
    streamed: list[list[int]] = [[] for _ in PROMPTS]
    for increment in llm.stream(PROMPTS, MAX_GEN_LEN, seed=7):
        streamed[increment.row] += increment.tokens
    assert streamed == expected


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_the_host_waits_for_results_only(folder: Path) -> None:
    """In sync debug mode, torch raises an error for every call that makes the host wait for the device."""
    llm = build(folder, None, None)
    expected = llm.generate(PROMPTS, MAX_GEN_LEN, temperature=0)
    try:
        torch.cuda.set_sync_debug_mode("error")
        assert llm.generate(PROMPTS, MAX_GEN_LEN, temperature=0) == expected
        assert list(llm.stream(PROMPTS[:1], MAX_GEN_LEN, seed=3))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_other_weights_get_other_graphs(folder: Path) -> None:
    llm = build(folder, None, None)
    before = llm.generate(PROMPTS, MAX_GEN_LEN, temperature=0)
    weights = llm.model.state_dict()
    llm.model.load_state_dict({name: -weight for name, weight in weights.items()})
    assert llm.generate(PROMPTS, MAX_GEN_LEN, temperature=0) != before
    llm.model.load_state_dict(weights)
    assert llm.generate(PROMPTS, MAX_GEN_LEN, temperature=0) == before
