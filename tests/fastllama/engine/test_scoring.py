"""Scores of continuations and of documents, against the logits of the model's forward pass."""

import random
from typing import Any

import pytest
import torch

from fastllama import Llama
from fastllama.engine.scoring import Score, document_windows, score_pairs, score_token_pairs
from tests.fastllama.engine.llamas import MAX_SEQ_LEN, TOLERANCE, logits_of

TEXTS = [
    ("a story about ", "a cat"),
    ("a story about", " a dog"),
    ("", "once upon"),
    ("a story", ""),
    ("the cat ", "sat"),
]


def ids(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(320), k=count)


def assert_score(llm: Llama, score: Score, context: list[int], tokens: list[int]) -> None:
    """Assert that a score is the model's for these tokens after this context."""
    logits = logits_of(llm, (context + tokens)[:-1])[len(context) - 1 :]
    expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert score.tokens == tokens
    torch.testing.assert_close(torch.tensor(score.logprobs), expected, atol=TOLERANCE, rtol=0)
    assert score.greedy == (logits.argmax(-1) == torch.tensor(tokens)).tolist()
    assert score.is_greedy == all(score.greedy) and score.total == pytest.approx(float(expected.sum()), abs=0.01)


def test_continuations_have_the_models_log_probabilities_in_the_order_of_the_pairs(llm: Llama) -> None:
    pairs = [
        (ids(length, length), ids(count, 1000 + count))
        for length, count in ((150, 5), (1, 1), (64, 64), (65, 3), (20, 180))
    ]
    for score, (context, tokens) in zip(llm.score(pairs), pairs, strict=True):
        assert_score(llm, score, context, tokens)


def test_texts_are_encoded_together(llm: Llama) -> None:
    encode = llm.tokenizer.encode
    for score, (context, continuation) in zip(llm.score(TEXTS), TEXTS, strict=True):
        whole = encode(context + continuation, bos=True, eos=False)
        before = encode(context.rstrip(), bos=True, eos=False)
        assert score.tokens == whole[len(before) :]
        if score.tokens:
            assert_score(llm, score, before, score.tokens)
        else:
            assert (score.total, score.is_greedy) == (0, True)


def test_an_empty_context_stands_for_the_begin_of_a_text(llm: Llama) -> None:
    begin = llm.tokenizer.bos_id
    text, spaces = llm.score([("", "ab"), ("  ", "ab")])
    assert_score(llm, text, [begin], llm.tokenizer.encode("ab", bos=False, eos=False))
    assert_score(llm, spaces, [begin], llm.tokenizer.encode("  ab", bos=False, eos=False))
    assert_score(llm, llm.score([([], [97, 98])])[0], [begin], [97, 98])


def test_the_greedy_continuation_is_recognised(llm: Llama) -> None:
    prompt = ids(30, 1)
    tokens, logprobs = llm.generate([prompt], 8, temperature=0, logprobs=True)
    assert logprobs is not None
    greedy, other = llm.score([(prompt, tokens[0]), (prompt, [*tokens[0][:-1], (tokens[0][-1] + 1) % 320])])
    assert greedy.is_greedy and not other.is_greedy and other.greedy[:-1] == [True] * 7
    torch.testing.assert_close(torch.tensor(greedy.logprobs), torch.tensor(logprobs[0]), atol=TOLERANCE, rtol=0)


def test_answers_to_one_question_share_its_pages(llm: Llama) -> None:
    engine = llm.engine()
    question = ids(140, 2)
    score_pairs(engine, [(question, [answer, 5]) for answer in range(6)], None)
    assert engine.stats.cached_tokens == 5 * 128
    assert llm.score([]) == []


def test_a_pair_may_have_one_token_more_than_the_context(llm: Llama) -> None:
    context, tokens = ids(200, 3), ids(MAX_SEQ_LEN + 1 - 200, 4)
    assert_score(llm, llm.score([(context, tokens)])[0], context, tokens)
    with pytest.raises(
        ValueError, match="pair 1 has 258 tokens, and at most 257 can be scored: shorten it, or build with a larger"
    ):
        llm.score([(context, tokens), (context, [*tokens, 1])])
    with pytest.raises(ValueError, match="pair 0 has 301 tokens, and at most 257 can be scored"):
        llm.score([([1], ids(300, 5))])


def test_wrong_pairs_are_refused_and_the_next_call_works(llm: Llama) -> None:
    with pytest.raises(ValueError, match="a pair must be two texts or two lists of token ids, got one of each"):
        llm.score([("a", [1])])
    with pytest.raises(ValueError, match="must be a whole number from 0 to 575, got 576"):
        llm.score([([1], [576])])
    assert len(llm.score([([1], [2])])) == 1


@pytest.mark.parametrize("length", [0, 1, 2, MAX_SEQ_LEN - 1, MAX_SEQ_LEN, MAX_SEQ_LEN + 1, 700])
@pytest.mark.parametrize("stride", [None, 1, 100, MAX_SEQ_LEN])
def test_documents_are_scored_in_windows(llm: Llama, length: int, stride: int | None) -> None:
    if stride == 1:
        length = min(length, MAX_SEQ_LEN + 20)
    tokens = ids(length, length)
    (score,) = llm.score_documents([tokens], stride=stride)
    assert score.tokens == tokens and len(score.logprobs) == len(score.greedy) == length
    whole = [llm.tokenizer.bos_id, *tokens]
    for begin in range(1, len(whole), stride or MAX_SEQ_LEN):
        end = min(begin + (stride or MAX_SEQ_LEN), len(whole))
        first = max(0, end - MAX_SEQ_LEN - 1)
        if stride == 1 and begin % 50 != 1:
            continue
        part = slice(begin - 1, end - 1)
        window = Score(score.tokens[part], score.logprobs[part], score.greedy[part])
        assert_score(llm, window, whole[first:begin], whole[begin:end])


def test_several_documents_and_texts_keep_their_order(llm: Llama) -> None:
    encode = llm.tokenizer.encode
    documents: list[Any] = ["a cat", "", ids(100, 6), "the end of a story"]
    for score, document in zip(llm.score_documents(documents), documents, strict=True):
        tokens = encode(document, bos=False, eos=False) if isinstance(document, str) else document
        if tokens:
            assert_score(llm, score, [llm.tokenizer.bos_id], tokens)
        else:
            assert score == Score([], [], [])
    with pytest.raises(ValueError, match=f"stride must be a whole number from 1 to {MAX_SEQ_LEN}, got 0"):
        llm.score_documents(["a"], stride=0)


def test_logits_that_are_not_numbers_are_an_error(llm: Llama) -> None:
    weights = llm.model.state_dict()
    broken = {**weights, "tok_embeddings.weight": weights["tok_embeddings.weight"].clone()}
    broken["tok_embeddings.weight"][7] = torch.nan
    try:
        llm.model.load_state_dict(broken)
        try:
            llm.score([([5], [6]), ([7], [6])])
            raise AssertionError("no error")
        except ValueError as error:  # the model is free inside this block, too
            assert "the logits of the prompt are not finite numbers; the weights, or their" in str(error)
            assert_score(llm, llm.score([([5], [6, 8])])[0], [5], [6, 8])
        assert_score(llm, llm.score([([5], [6, 8])])[0], [5], [6, 8])
    finally:
        llm.model.load_state_dict(weights)


def test_answers_that_differ_in_their_last_token_are_one_request(llm: Llama) -> None:
    context = [(5 * place) % 320 for place in range(100)]
    pairs = [(context, [token]) for token in (3, 9, 77)] + [(context, [8, token]) for token in (4, 5)]
    engine = llm.engine()
    scores = score_token_pairs(engine, pairs, progress=False)
    assert engine.stats.finished_requests == 2
    for (_, continuation), score in zip(pairs, scores, strict=True):
        assert_score(llm, score, context, continuation)
    best = int(llm.model.forward(torch.tensor([context]), 0)[0, -1].argmax())
    found = llm.score([(context, [3]), (context, [best]), (context, [9])])
    assert [score.is_greedy for score in found] == [False, True, False]


@pytest.mark.parametrize("most", [1, 4, 7, 10, 30])
def test_windows_score_each_token_once_with_the_context_that_fits(most: int) -> None:
    windows = list(document_windows(list(range(11)), most))
    assert [token for _, scored in windows for token in scored] == list(range(1, 11))
    for context, scored in windows:
        whole = [*context, *scored]
        assert len(context) >= 1 and len(whole) <= most + 1
        assert whole == list(range(whole[0], whole[0] + len(whole)))
    assert len(windows[-1][0]) + len(windows[-1][1]) == min(most, 10) + 1
    assert list(document_windows([0], most)) == []
