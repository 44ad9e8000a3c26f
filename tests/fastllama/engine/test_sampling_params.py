"""SamplingParams: values are checked when they are given, and the message says what was expected."""

from typing import Any

import numpy as np
import pytest

from fastllama import SamplingParams

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_gen_len": -1}, "max_gen_len must be a whole number of at least 0, got -1"),
    ({"max_gen_len": 1.5}, "max_gen_len must be a whole number of at least 0, got 1.5"),
    ({"temperature": -0.1}, "temperature must be 0 (the most likely token) or a positive number, got -0.1"),
    ({"temperature": "hot"}, "temperature must be 0 (the most likely token) or a positive number, got 'hot'"),
    ({"top_p": -1}, "top_p must be a number from 0 (the most likely token) to 1 (the whole vocabulary), got -1"),
    ({"top_k": -1}, "top_k must be a whole number from 0 to 2147483647, got -1"),
    ({"top_k": 2**70}, "top_k must be a whole number from 0 to 2147483647, got 1180591620717411303424"),
    ({"min_p": 1.1}, "min_p must be a number from 0 to 1, got 1.1"),
    ({"min_p": float("nan")}, "min_p must be a number from 0 to 1, got nan"),
    ({"seed": 2**64}, "a seed must be a whole number from -9223372036854775808 to 18446744073709551615"),
    ({"n": 0}, "n must be a whole number from 1 to 1024, got 0"),
    ({"stop": ["a", ""]}, "stop must be texts that are not empty, got ''"),
    ({"stop": [3]}, "stop must be texts that are not empty, got 3"),
    ({"stop": 3}, "stop must be a list, got 3"),
    ({"stop": [str(number) for number in range(65)]}, "stop must be at most 64 texts, got 65"),
    ({"stop_token_ids": [-1]}, "a stop token id must be a whole number of at least 0, got -1"),
    ({"stop_token_ids": "12"}, "stop_token_ids must be a list, got str ('12')"),
    ({"ignore_eos": "no"}, "ignore_eos must be True or False, got str ('no')"),
    ({"echo": "no"}, "echo must be True or False, got str ('no')"),
    ({"min_tokens": -1}, "min_tokens must be a whole number from 0 to 2147483647, got -1"),
    ({"min_tokens": 5, "max_gen_len": 4}, "min_tokens must be at most max_gen_len, got 5 and 4"),
    ({"logprobs": 21}, "logprobs must be a whole number from 0 to 20, got 21"),
    ({"logprobs": True}, "logprobs must be a whole number from 0 to 20, got True"),
    ({"prompt_logprobs": -1}, "prompt_logprobs must be a whole number from 0 to 20, got -1"),
    ({"repetition_penalty": 0}, "repetition_penalty must be a number from 0.001 to 1000, got 0"),
    ({"presence_penalty": 2.5}, "presence_penalty must be a number from -2 to 2, got 2.5"),
    ({"frequency_penalty": -2.5}, "frequency_penalty must be a number from -2 to 2, got -2.5"),
    ({"logit_bias": [1]}, "logit_bias must be a mapping of token ids to numbers, got [1]"),
    ({"logit_bias": {-1: 0}}, "a token id in logit_bias must be a whole number of at least 0, got -1"),
    ({"logit_bias": {"x": 0}}, "a token id in logit_bias must be a whole number of at least 0, got 'x'"),
    ({"logit_bias": {1: 101}}, "a value in logit_bias must be a number from -100 to 100, got 101"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[str(given)[:50] for given, _ in REFUSED])
def test_a_value_out_of_range_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        SamplingParams(**given)
    assert str(error.value).startswith(message)


def test_values_are_kept_as_plain_numbers_and_tuples() -> None:
    ids: Any = np.array([1, 2])
    biases: Any = {"7": 1}  # as JSON has them
    params = SamplingParams(
        max_gen_len=np.int64(4).item(), top_p=3, stop=["a", "b", "a"], stop_token_ids=ids, logit_bias=biases, seed=-1
    )
    assert (params.max_gen_len, params.top_p, params.stop, params.stop_token_ids) == (4, 1.0, ("a", "b"), (1, 2))
    assert params.logit_bias == {7: 1.0} and params.seed == 2**64 - 1
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=None).stop == ()  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        params.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "given",
    [
        {"top_k": 1},
        {"min_p": 0.1},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"min_tokens": 1},
        {"logit_bias": {1: 1.0}},
    ],
    ids=str,
)
def test_only_what_changes_logits_needs_controls(given: dict[str, Any]) -> None:
    assert SamplingParams(**given).needs_controls
    plain = SamplingParams(temperature=0.3, top_p=0.5, logprobs=5, stop="x", stop_token_ids=[3], echo=True, n=4)
    assert not plain.needs_controls and not plain.is_greedy
    assert SamplingParams(temperature=0).is_greedy and SamplingParams(top_p=0).is_greedy


def test_token_ids_outside_the_vocabulary_are_refused() -> None:
    SamplingParams(stop_token_ids=[575], logit_bias={575: 1}).check_vocabulary(576)
    with pytest.raises(ValueError, match="stop_token_ids must have token ids from 0 to 575, got 576"):
        SamplingParams(stop_token_ids=[576]).check_vocabulary(576)
    with pytest.raises(ValueError, match="logit_bias must have token ids from 0 to 575, got 900"):
        SamplingParams(logit_bias={900: 1}).check_vocabulary(576)
