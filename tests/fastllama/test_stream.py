"""`stream`: the same tokens as `generate`, complete characters only, and no effect of closing it early."""

from collections import defaultdict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastllama import Increment, Llama
from tests.support.comparisons import assert_same_logprobs
from tests.support.tiny import MAX_BATCH_SIZE, MAX_SEQ_LEN, tiny_llama

prompt_lists = st.lists(
    st.lists(st.integers(0, 575), min_size=1, max_size=MAX_SEQ_LEN), min_size=1, max_size=MAX_BATCH_SIZE
)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@given(prompts=prompt_lists, max_gen_len=st.integers(0, 12), echo=st.booleans(), logprobs=st.booleans())
def test_stream_yields_the_tokens_of_generate(
    llm: Llama, prompts: list[list[int]], max_gen_len: int, echo: bool, logprobs: bool
) -> None:
    tokens, scores = llm.generate(prompts, max_gen_len, 1.0, 1.0, logprobs, echo, seed=5)
    rows: dict[int, list[Increment]] = defaultdict(list)
    for increment in llm.stream(prompts, max_gen_len, 1.0, 1.0, logprobs, echo, seed=5):
        rows[increment.row].append(increment)
    assert sorted(rows) == list(range(len(prompts)))
    for row, increments in rows.items():
        assert [token for increment in increments for token in increment.tokens] == tokens[row]
        assert "".join(increment.text for increment in increments) == llm.tokenizer.decode(tokens[row])
        assert [increment.finish_reason for increment in increments[:-1]] == [None] * (len(increments) - 1)
        assert increments[-1].finish_reason in ("stop", "length")
        if logprobs:
            assert scores is not None
            streamed = [score for increment in increments for score in increment.logprobs or ()]
            assert_same_logprobs([streamed], [scores[row]])
        else:
            assert all(increment.logprobs is None for increment in increments)


@given(tokens=st.lists(st.integers(0, 255), min_size=1, max_size=20))
def test_text_never_splits_a_character(llm: Llama, tokens: list[int]) -> None:
    """Tokens 0 to 255 of the tiny vocabulary are single bytes, so a token may be part of a character."""
    (increment,) = llm.stream([tokens], 0, echo=True)
    assert increment.text == llm.tokenizer.decode(tokens)


def test_characters_of_several_tokens_are_not_split(tmp_path: Path) -> None:
    llm = tiny_llama(tmp_path, backend="reference")  # whose steps run eagerly
    euro = list("€".encode())  # three tokens
    _force_next_tokens(llm, [*euro, 65, *euro[:2], llm.tokenizer.eos_id])
    texts = [increment.text for increment in llm.stream([[1]], 10, temperature=0)]
    assert texts == ["", "", "€", "A", "", "", "\ufffd"]


def _force_next_tokens(llm: Llama, tokens: list[int]) -> None:
    """Make these tokens the model's argmax, one in each step."""
    steps = iter(tokens)

    def logits(h: torch.Tensor, batch: object) -> torch.Tensor:
        row = torch.zeros(h.shape[0], llm.model.vocab_size)
        row[:, next(steps)] = 1.0
        return row

    llm.model.logits = logits  # type: ignore[method-assign]


def test_finish_reason_is_stop_or_length(tmp_path: Path) -> None:
    llm = tiny_llama(tmp_path, backend="reference")  # whose steps run eagerly
    _force_next_tokens(llm, [65, llm.tokenizer.eos_id])
    stopped = list(llm.stream([[1]], 10, temperature=0))
    assert [(i.tokens, i.finish_reason) for i in stopped] == [([65], None), ([], "stop")]
    _force_next_tokens(llm, [65, 66])
    ended = list(llm.stream([[1]], 2, temperature=0))
    assert [(i.tokens, i.finish_reason) for i in ended] == [([65], None), ([66], "length")]
    _force_next_tokens(llm, [65, llm.tokenizer.eos_id])  # a stop token at the last position is "stop"
    last = list(llm.stream([[1]], 2, temperature=0))
    assert [(i.tokens, i.finish_reason) for i in last] == [([65], None), ([], "stop")]


def test_closing_early_does_not_affect_the_next_call(llm: Llama) -> None:
    expected = llm.generate([[1, 2, 3], [9]], 8, temperature=0)
    stream = llm.stream([[4, 5], [6], [7]], 8)
    next(stream)
    stream.close()
    assert llm.generate([[1, 2, 3], [9]], 8, temperature=0) == expected
    next(llm.stream([[4, 5]], 8))  # dropped without being closed
    assert llm.generate([[1, 2, 3], [9]], 8, temperature=0) == expected
    llm.stream([[4, 5]], 8)  # never started
    assert llm.generate([[1, 2, 3], [9]], 8, temperature=0) == expected


def test_increments_come_row_by_row_in_every_step(llm: Llama) -> None:
    """Every step yields one increment for each row that has not ended."""
    llm_stop, llm.tokenizer.stop_tokens = llm.tokenizer.stop_tokens, set()
    try:
        order = [increment.row for increment in llm.stream([[1], [2] * 46, [3]], 4, temperature=0)]
    finally:
        llm.tokenizer.stop_tokens = llm_stop
    assert order == [0, 1, 2, 0, 1, 2, 0, 2, 0, 2]


def test_a_stream_does_not_leave_inference_mode_on(llm: Llama) -> None:
    stream = llm.stream([[1, 2]], 4)
    next(stream)
    assert not torch.is_inference_mode_enabled()
    list(stream)
