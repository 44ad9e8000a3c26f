"""Pages that can be found again hold what their tokens say: after an interrupt, and whatever is called in between."""

import pytest
import torch

from fastllama import Llama, SamplingParams
from tests.support.comparisons import assert_same_logits

PROMPT = [(7 * place) % 320 for place in range(200)]


def streamed(llm: Llama, prompt: list[int]) -> list[int]:
    increments = llm.stream([prompt], 8, 0.0, reuse_prefix=True)
    return [token for increment in increments for token in increment.tokens]


def test_a_prefill_that_was_interrupted_is_not_found(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = llm.generate([PROMPT], 8, 0.0)
    hidden, calls = llm.model.hidden, []

    def interrupted(batch: object) -> torch.Tensor:
        calls.append(batch)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return hidden(batch)  # type: ignore[arg-type]

    llm.model.cache.release()
    llm.model.cache.pool.forget()
    llm.model.cache.k.zero_()
    llm.model.cache.v.zero_()
    monkeypatch.setattr(llm.model, "hidden", interrupted)
    with pytest.raises(KeyboardInterrupt):
        streamed(llm, PROMPT)
    assert streamed(llm, PROMPT) == expected[0]


def test_forward_writes_to_no_page_that_is_shared_or_found_again(llm: Llama) -> None:
    """Two rows of a stream share their first pages, which later prompts find."""
    prompts = [[*PROMPT[:150], row] for row in range(2)]
    for _ in llm.stream(prompts, 4, 0.0, reuse_prefix=True):
        pass
    others = torch.tensor([[(3 * place + row) % 320 for place in range(150)] for row in range(2)])
    found = llm.model.forward(others, 0)
    for row in range(2):
        assert_same_logits(found[row], llm.model.forward(others[row : row + 1], 0)[0])
    assert streamed(llm, prompts[0]) == llm.generate([prompts[0]], 8, 0.0)[0][0]


def test_weights_cannot_be_loaded_while_there_are_requests(llm: Llama) -> None:
    weights = llm.model.state_dict()
    request = llm.engine().submit(PROMPT, SamplingParams(max_gen_len=3))
    with pytest.raises(RuntimeError, match="this model is busy"):
        llm.model.load_state_dict(weights)
    request.result()
    llm.model.load_state_dict(weights)
