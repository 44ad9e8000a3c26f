"""generate_many: any number of prompts, in order, with bounded memory."""

import itertools
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest

from fastllama import Llama, SamplingParams
from fastllama.engine.many import HELD_PER_ROW, UNFINISHED_PER_ROW
from tests.fastllama.engine.llamas import ROWS, answer_alone

PARAMS = SamplingParams(max_gen_len=12, temperature=1.0, seed=5)


def prompts_of(count: int) -> list[list[int]]:
    return [[number % 320, 7, number // 320] for number in range(count)]


def test_results_come_in_the_order_of_the_prompts(llm: Llama) -> None:
    prompts = prompts_of(40)
    params = [SamplingParams(max_gen_len=1 + 7 * number % 30, temperature=1.0, seed=number) for number in range(40)]
    results = list(llm.generate_many(prompts, params))
    assert [result.prompt_tokens for result in results] == prompts
    for result, one in zip(results, params, strict=True):
        assert result.answer.tokens == answer_alone(llm, result.prompt_tokens, one)[0]


def test_texts_and_dialogs_are_prompts_too(llm: Llama) -> None:
    dialog: Any = [{"role": "user", "content": "a cat"}]
    results = list(llm.generate_many(["a cat", dialog, [1, 2]], PARAMS))
    assert [len(result.answer.tokens) for result in results] == [12, 12, 12]
    assert list(llm.generate_many([], PARAMS)) == []
    assert len(next(llm.generate_many(["a cat"])).answer.tokens) > 12, "by default up to the end of the context"


def test_of_an_endless_iterator_only_a_few_prompts_are_read_ahead(llm: Llama) -> None:
    read = itertools.count()
    last = [0]

    def endless() -> Iterator[list[int]]:
        for number in read:
            last[0] = number + 1
            yield [number % 320, 9]

    results = llm.generate_many(endless(), PARAMS)
    for count in range(1, 31):
        next(results)
        assert last[0] <= count + UNFINISHED_PER_ROW * ROWS + ROWS
    results.close()  # type: ignore[attr-defined]
    assert len(list(islice(llm.generate_many(endless(), PARAMS), 5))) == 5


def test_results_that_wait_for_a_long_one_are_bounded(llm: Llama) -> None:
    read: list[int] = []

    def prompts() -> Iterator[list[int]]:
        for number in range(3000):
            read.append(number)
            yield [number % 320, 3]

    params = itertools.chain(
        [SamplingParams(max_gen_len=250, seed=1)], (SamplingParams(max_gen_len=1, seed=1) for _ in range(2999))
    )
    results = llm.generate_many(prompts(), params)
    next(results)
    assert len(read) <= HELD_PER_ROW * ROWS + 1
    results.close()  # type: ignore[attr-defined]


def test_an_error_names_the_prompt_and_frees_the_model(llm: Llama) -> None:
    results = llm.generate_many([[1], [2], [9] * 300, [3]], PARAMS)
    with pytest.raises(ValueError, match="prompt 2: the prompt has 300 tokens, more than the max_seq_len of 256"):
        list(results)
    llm.model.check_idle()
    with pytest.raises(ValueError, match=r"prompts must be a list or another iterable of prompts: for one prompt pass"):
        llm.generate_many("a cat")
    for params, shorter, count in (([PARAMS], "params", 1), ([PARAMS] * 3, "prompts", 2)):
        message = f"there must be one SamplingParams for each prompt, and the {shorter} end after {count}"
        with pytest.raises(ValueError, match=message):
            list(llm.generate_many([[1], [2]], params))
    llm.model.check_idle()


def test_closing_the_iterator_early_frees_the_model(llm: Llama) -> None:
    results = llm.generate_many(prompts_of(30), PARAMS)
    next(results)
    with pytest.raises(RuntimeError, match="this model is busy"):
        llm.generate([[5]], 3)
    results.close()  # type: ignore[attr-defined]
    assert len(llm.generate([[5]], 3)[0][0]) == 3


def test_a_bar_counts_the_prompts(llm: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    list(llm.generate_many(prompts_of(3), PARAMS, progress=True))
    shown = capsys.readouterr().err
    assert "answering" in shown and "3/3" in shown
    list(llm.generate_many(prompts_of(3), PARAMS))
    list(llm.generate_many(prompts_of(3), PARAMS, progress=False))
    assert capsys.readouterr().err == ""
