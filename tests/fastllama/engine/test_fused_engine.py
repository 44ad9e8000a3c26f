"""The engine on the Triton backend: answers as on the reference backend, with rows that join and leave."""

from pathlib import Path
from typing import Any

import pytest

from fastllama import SamplingParams
from fastllama.engine import Result
from tests.fastllama.engine.llamas import answer_alone, engine_llama, is_near_tie

PROMPTS = [[5, 250, 17], [9] * 66, [9] * 64 + [3, 4], [31]]


def results_of(folder: Path, backend: str, params: list[SamplingParams]) -> tuple[Any, list[Result], Any]:
    llm = engine_llama(folder, backend=backend, max_seq_len=128, rows=2, cache_tokens=3 * 64, n_layers=1)
    engine = llm.engine(max_tokens_per_step=40)
    requests = [engine.submit(prompt, one) for prompt, one in zip(PROMPTS, params, strict=True)]
    engine.run()
    return llm, [request.result() for request in requests], engine.stats


@pytest.mark.slow
def test_answers_are_the_reference_backends(tmp_path: Path) -> None:
    params = [
        SamplingParams(max_gen_len=8, temperature=0.0, seed=0, logprobs=2),
        SamplingParams(max_gen_len=4, temperature=1.0, seed=1, logprobs=0),
        SamplingParams(max_gen_len=4, temperature=0.8, seed=2, logprobs=0, frequency_penalty=1.0, top_k=40),
        SamplingParams(max_gen_len=6, temperature=1.0, seed=3, logprobs=0),
    ]
    _, ours, stats = results_of(tmp_path, "fused", params)
    llm, expected, _ = results_of(tmp_path, "reference", params)
    assert stats.cached_tokens == 64 and stats.used_pages == 0
    for mine, theirs, one in zip(ours, expected, params, strict=True):
        tokens, others = mine.answer.tokens, theirs.answer.tokens
        parted = next((at for at, pair in enumerate(zip(tokens, others, strict=True)) if pair[0] != pair[1]), None)
        if parted is not None:
            context = mine.prompt_tokens + others[:parted]
            assert not one.needs_controls and is_near_tie(llm, context, tokens[parted], others[parted], one)
        if not one.needs_controls:
            assert others == answer_alone(llm, mine.prompt_tokens, one)[0]
        assert mine.answer.logprobs == pytest.approx(theirs.answer.logprobs, abs=1e-4)
