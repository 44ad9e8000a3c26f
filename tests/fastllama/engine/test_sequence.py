"""Sequence: tokens become increments of text, cut at stop strings together with their log-probabilities."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastllama.engine import Increment, SamplingParams
from fastllama.engine.sequence import Sequence
from fastllama.tokenizer import Tokenizer
from fastllama.tokenizer_base import TextStream
from tests.support.checkpoints import write_tokenizer

STOP_ID = 400


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """All bytes, then pairs of letters."""
    return Tokenizer(str(write_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def sequence_of(tokenizer: Tokenizer, budget: int = 100, **params: Any) -> Sequence:
    given = SamplingParams(logprobs=0, **params)
    return Sequence(0, 0, given, [1, 2], 2, 1 + budget, (0, 0, 0), frozenset({STOP_ID}), TextStream(tokenizer))


def pushed(sequence: Sequence, tokens: list[int]) -> list[Increment]:
    """The increments of these tokens, up to the end of the answer."""
    increments: list[Increment] = []
    for number, token in enumerate(tokens):
        if sequence.finish_reason is None:
            increments.append(sequence.add_token(token, -float(number), []))
    return increments


def joined(increments: list[Increment]) -> tuple[str, list[int], list[float]]:
    return (
        "".join(one.text for one in increments),
        [token for one in increments for token in one.tokens],
        [logprob for one in increments for logprob in one.logprobs or []],
    )


def test_a_stop_string_may_cross_tokens_and_end_inside_one(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("ab cd ef", bos=False, eos=False)
    increments = pushed(sequence_of(tokenizer, stop="d e"), tokens)
    text, kept, logprobs = joined(increments)
    assert text == "ab c" and increments[-1].finish_reason == "stop" and increments[-1].stop_reason == "d e"
    assert tokenizer.decode(kept).startswith(text), "a token stays whose text begins before the stop string"
    assert "d e" not in tokenizer.decode(kept) and logprobs == [-float(number) for number in range(len(kept))]


def test_a_stop_token_ends_the_answer_and_is_not_in_it(tokenizer: Tokenizer) -> None:
    (first, last) = pushed(sequence_of(tokenizer), [97, STOP_ID, 98])
    assert (first.text, first.tokens, first.finish_reason) == ("a", [97], None)
    assert (last.text, last.tokens, last.finish_reason, last.stop_reason) == ("", [], "stop", STOP_ID)


def test_an_answer_ends_at_its_budget_with_what_was_held_back(tokenizer: Tokenizer) -> None:
    increments = pushed(sequence_of(tokenizer, budget=2, stop="abc"), [97, 98, 99])
    assert [(one.text, one.tokens) for one in increments] == [("", []), ("ab", [97, 98])]
    assert (increments[-1].finish_reason, increments[-1].stop_reason) == ("length", None)


def test_a_character_is_never_split_nor_its_tokens(tokenizer: Tokenizer) -> None:
    euro = list("€".encode())
    increments = pushed(sequence_of(tokenizer), [97, *euro, 98])
    assert [one.text for one in increments] == ["a", "", "", "€", "b"]
    assert [one.tokens for one in increments] == [[97], [], [], euro, [98]]


def test_a_stop_string_of_bytes_cuts_all_of_its_tokens(tokenizer: Tokenizer) -> None:
    euro = list("€".encode())
    increments = pushed(sequence_of(tokenizer, stop="€"), [97, *euro, 98])
    assert joined(increments) == ("a", [97], [0.0]) and increments[-1].stop_reason == "€"


def test_the_rest_of_a_character_may_complete_a_stop_string(tokenizer: Tokenizer) -> None:
    increments = pushed(sequence_of(tokenizer, budget=2, stop="\N{REPLACEMENT CHARACTER}"), [97, 0xE2])
    assert joined(increments) == ("a", [97], [0.0])
    assert (increments[-1].finish_reason, increments[-1].stop_reason) == ("stop", "\N{REPLACEMENT CHARACTER}")


def test_an_answer_that_is_ended_gives_out_everything(tokenizer: Tokenizer) -> None:
    sequence = sequence_of(tokenizer, stop="abc")
    increments = [*pushed(sequence, [97, 98, 0xE2]), sequence.end("cancelled")]
    assert joined(increments) == ("ab\N{REPLACEMENT CHARACTER}", [97, 98, 0xE2], [0.0, -1.0, -2.0])
    assert increments[-1].finish_reason == "cancelled"


def test_alternatives_are_as_many_as_were_asked_for(tokenizer: Tokenizer) -> None:
    top = [(7, -1.0), (8, -2.0), (9, -3.0)]
    params = SamplingParams(logprobs=2)
    sequence = Sequence(0, 0, params, [1], 1, 9, (0, 0, 0), frozenset(), TextStream(tokenizer))
    assert sequence.add_token(97, -0.5, top).top_logprobs == [top[:2]]
    without = Sequence(0, 0, SamplingParams(), [1], 1, 9, (0, 0, 0), frozenset(), TextStream(tokenizer))
    increment = without.add_token(97, -0.5, top)
    assert increment.logprobs is None and increment.top_logprobs is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(
    pieces=st.lists(
        st.sampled_from([*range(97, 100), *range(0xC2, 0xC4), 0xA9, 0xA4, 257, 283, 300, STOP_ID]), max_size=20
    ),
    stops=st.lists(st.sampled_from(["a", "ab", "bca", "é", "cé", "ä"]), max_size=2),
    budget=st.integers(1, 20),
)
def test_any_tokens_give_what_their_whole_text_gives(
    tokenizer: Tokenizer, pieces: list[int], stops: list[str], budget: int
) -> None:
    increments = pushed(sequence_of(tokenizer, budget=budget, stop=stops), pieces)
    text, tokens, logprobs = joined(increments)
    generated = pieces[:budget]
    if STOP_ID in generated:
        generated = generated[: generated.index(STOP_ID)]
    ended = bool(increments) and increments[-1].finish_reason is not None
    whole = tokenizer.decode(generated)
    assert tokens == generated[: len(tokens)] and len(logprobs) == len(tokens)
    if ended and isinstance(increments[-1].stop_reason, str):
        stop = increments[-1].stop_reason
        assert whole.startswith(text + stop) and not any(one in (text + stop)[:-1] for one in stops)
        complete = tokenizer.decode(tokens)  # the last token's text may go on inside the stop string
        assert complete.startswith(text) and (not tokens or len(tokenizer.decode(tokens[:-1])) <= len(text))
    elif ended:
        assert (text, tokens) == (whole, generated) and not any(one in whole for one in stops)
    else:
        assert whole.startswith(text)
        for number in range(1, len(increments) + 1):
            so_far, given_out, _ = joined(increments[:number])
            assert len(tokenizer.decode(given_out)) <= len(so_far) + 1
