"""Masks of a grammar, against its definition: a token may follow if some text of the grammar goes on with it."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastllama.engine.grammar import Grammar
from fastllama.engine.grammar_matcher import MOST_COMPILED, GrammarMatcher, grammar_matcher
from fastllama.kernels.sampling.masks import allowed_tokens
from fastllama.tokenizer import Tokenizer
from fastllama.tokenizer_base import BaseTokenizer
from tests.support.checkpoints import write_tokenizer


class Pieces(BaseTokenizer):
    """Bytes of a few characters, some pairs, a second token with the text of the first, and special tokens."""

    tokens = (b"a", b"b", b"{", b"}", b'"', b" ", b"\xc3", b"\xa9", b"ab", b"ba", b'{"', b'"}', b"a", b"\xa9a")
    tokens += (b"<|end|>", b"<|tool|>")  # type: ignore[assignment]
    n_words = len(tokens)
    bos_id = eos_id = pad_id = END = 14
    TOOL = 15

    def __init__(self) -> None:
        self.special_tokens = {"<|end|>": self.END, "<|tool|>": self.TOOL}
        self.stop_tokens = {self.END}
        self.n_decoded = 0

    def _encode_text(self, s: str, *, is_first: bool) -> list[int]:
        raise AssertionError("masks need no encoding")

    def _join(self, ids: list[int]) -> bytes:
        self.n_decoded += 1
        return b"".join(self.tokens[token] for token in ids)


PIECES = Pieces()
SIZES = (16, 31, 32, 33, 70)  # of the model's vocabulary
STOPS = frozenset({Pieces.END})


def matcher_of(
    grammar: Grammar | str, vocab_size: int = 31, stops: frozenset[int] = STOPS, min_tokens: int = 0
) -> GrammarMatcher:
    grammar = Grammar.lark(grammar) if isinstance(grammar, str) else grammar
    return grammar_matcher(grammar, PIECES, vocab_size, stops, min_tokens)


def allowed_in(matcher: GrammarMatcher, vocab_size: int = 31) -> set[int]:
    words = allowed_tokens(matcher.mask, 32 * len(matcher.mask))
    assert matcher.mask.dtype == torch.int32 and len(matcher.mask) == -(-vocab_size // 32)
    assert not words[vocab_size:].any(), "bits beyond the vocabulary"
    return set(words.nonzero().flatten().tolist())


TEXTS = st.lists(st.text(alphabet='ab{}" é', min_size=0, max_size=7), min_size=1, max_size=6)


@given(
    texts=TEXTS,
    size=st.sampled_from(SIZES),
    stops=st.sampled_from([STOPS, frozenset({1, 9}), frozenset[int](), frozenset({3, Pieces.END, Pieces.TOOL})]),
    min_tokens=st.integers(0, 4),
    choices=st.lists(st.integers(0, 99), min_size=8, max_size=8),
)
def test_masks_are_the_definition(
    texts: list[str], size: int, stops: frozenset[int], min_tokens: int, choices: list[int]
) -> None:
    """A random walk through a grammar of a few texts."""
    language = {text.encode() for text in texts}
    matcher = _built("start: " + " | ".join(map(json.dumps, texts)), language, size, stops, min_tokens)
    prefix, n_tokens = b"", 0
    while matcher is not None:
        words = {
            token
            for token, text in enumerate(Pieces.tokens)
            if token not in (Pieces.END, Pieces.TOOL) and any(one.startswith(prefix + text) for one in language)
        } - stops
        may_end = prefix in language
        assert matcher.is_complete == (may_end and not words)
        assert (matcher.error is not None) == (not may_end and not words)
        ends = stops if may_end and n_tokens >= min_tokens else frozenset[int]()
        assert allowed_in(matcher, size) == words | ends
        if not words or n_tokens == len(choices):
            break
        token = sorted(words)[choices[n_tokens] % len(words)]
        matcher.accept(token)
        prefix, n_tokens = prefix + Pieces.tokens[token], n_tokens + 1


def _built(lark: str, language: set[bytes], size: int, stops: frozenset[int], min_tokens: int) -> GrammarMatcher | None:
    """None for a grammar that no token can begin."""
    try:
        return matcher_of(lark, size, stops, min_tokens)
    except ValueError as error:
        assert "allows no token after 0 tokens" in str(error) and b"" not in language
        return None


def test_special_tokens_are_not_their_names() -> None:
    matcher = matcher_of("start: /[<>|a-z]+/")
    assert allowed_in(matcher) == {0, 1, 8, 9, 12}
    matcher = matcher_of('start: /a+/ <|tool|> "b"')
    assert allowed_in(matcher) == {0, 12}
    matcher.accept(0)
    assert allowed_in(matcher) == {0, 12, Pieces.TOOL}
    matcher.accept(Pieces.TOOL)
    assert allowed_in(matcher) == {1} and not matcher.is_complete
    matcher.accept(1)
    assert matcher.is_complete and allowed_in(matcher) == STOPS


def test_an_unknown_special_token_is_refused() -> None:
    with pytest.raises(ValueError, match=r'the grammar does not fit this model: .*unknown special token: "<\|no\|>"'):
        matcher_of('start: "a" <|no|>')


@pytest.mark.parametrize(
    "make",
    [
        lambda: Grammar.lark("start: unknown"),
        lambda: Grammar.lark("start: /(/"),
        lambda: Grammar.lark(""),
        lambda: Grammar.json_schema({"type": "strin"}),
        lambda: Grammar.json_schema({"enum": []}),
        lambda: Grammar.json_schema({"type": "object", "unevaluatedProperties": 3}),
    ],
)
def test_bad_grammars_are_refused_at_construction(make: Any) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        make()


def test_a_text_that_no_token_has_is_refused() -> None:
    with pytest.raises(ValueError, match="allows no token after 0 tokens: no token has the text that it wants"):
        matcher_of('start: "xyz"')
    matcher = matcher_of('start: "a" "xyz"')
    matcher.accept(0)
    assert "allows no token after 1 tokens" in str(matcher.error) and "(14)" in str(matcher.error)
    assert not matcher.is_complete and not matcher.mask.any()


def test_a_stop_token_is_no_text() -> None:
    """The text can be written with other tokens."""
    matcher = matcher_of('start: "ab"', stops=frozenset({8}))
    assert allowed_in(matcher) == {0, 12}
    with pytest.raises(ValueError, match="only tokens that end the answer have it"):
        matcher_of('start: "}"', stops=frozenset({3, 11}))


def test_a_grammar_of_the_empty_text_is_complete_at_once() -> None:
    assert matcher_of('start: ""').is_complete
    assert not matcher_of('start: "a"?').is_complete


def test_without_stop_tokens_an_answer_goes_on_as_long_as_its_grammar() -> None:
    matcher = matcher_of("start: /a{1,3}/", stops=frozenset())
    for _ in range(3):
        assert allowed_in(matcher) == {0, 12} and not matcher.is_complete
        matcher.accept(0)
    assert matcher.is_complete and not matcher.mask.any()


def test_copies_go_their_own_ways() -> None:
    first = matcher_of('start: "ab" | "bab"')
    other = first.copy()
    first.accept(0)
    assert allowed_in(first) == {1} and allowed_in(other) == {0, 1, 8, 9, 12}
    other.accept(1)
    assert allowed_in(other) == {0, 8, 12} and allowed_in(first) == {1}


def test_json_schemas_and_lark_force_no_tokens() -> None:
    """Forced text may be written in any tokens: `ab` as one, or as two."""
    for grammar in (Grammar.json_schema({"const": "ab"}), Grammar.lark('start: "\\"ab\\""')):
        matcher = matcher_of(grammar)
        matcher.accept(4)
        assert allowed_in(matcher) == {0, 8, 12}


def test_other_sources_may_force_tokens() -> None:
    """Several grammars in one source stay as they are, and what they force is written in the longest tokens."""
    source = {"grammars": [{"lark_grammar": "start: @inner"}, {"name": "inner", "lark_grammar": 'start: "abba"'}]}
    matcher = matcher_of(Grammar(json.dumps(source)))
    assert allowed_in(matcher) == {8}
    for token in (8, 9):
        assert allowed_in(matcher) == {token}
        matcher.accept(token)
    assert matcher.is_complete


def test_a_grammar_beyond_the_limits_ends_with_an_error() -> None:
    """Thousands of rules that are possible at once."""
    rules = [
        f'r{number}: "a" "b"* "{chr(97 + number % 2)}" t{number}\nt{number}: "a" r{number}' for number in range(2100)
    ]
    lark = 'start: "b" (' + " | ".join(f"r{number}" for number in range(2100)) + ")\n" + "\n".join(rules)
    matcher = matcher_of(lark)
    steps = 0
    while matcher.error is None and steps < 9:
        matcher.accept(1 if steps == 0 else 0)
        steps += 1
    assert matcher.error is not None and "the grammar could not be followed after" in matcher.error
    assert "<" not in matcher.error and "\n" not in matcher.error, "what it says, without the parser's state"
    assert not matcher.mask.any() and not matcher.is_complete


def test_a_tokenizer_is_read_once() -> None:
    tokenizer = Pieces()
    threads = [
        threading.Thread(target=grammar_matcher, args=(Grammar.lark("start: /a+/"), tokenizer, 40, STOPS))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tokenizer.n_decoded == Pieces.n_words
    grammar_matcher(Grammar.lark("start: /b+/"), tokenizer, 41, STOPS)
    assert tokenizer.n_decoded == 2 * Pieces.n_words, "a model of another size"


def test_a_grammar_is_compiled_once_and_each_answer_has_its_own_place(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def noted(source: str) -> str:
        made.append(source)
        time.sleep(0.01)  # so that others ask meanwhile
        return source

    monkeypatch.setattr("fastllama.engine.grammar_matcher._unforced", noted)
    tokenizer, grammar = Pieces(), Grammar.lark("start: /ba{3}/")
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: grammar_matcher(grammar, tokenizer, 40, STOPS), range(8)))
    assert len(made) == 1
    before = found[1].mask.clone()
    found[0].accept(min(allowed_in(found[0], 40)))
    assert torch.equal(found[1].mask, before) and not torch.equal(found[0].mask, before)
    for number in range(1, MOST_COMPILED + 1):
        grammar_matcher(Grammar.lark(f"start: /ba{{{number + 3}}}/"), tokenizer, 40, STOPS)
    grammar_matcher(grammar, tokenizer, 40, STOPS)
    assert len(made) == MOST_COMPILED + 2, "the oldest was dropped"


def test_llama3s_special_tokens_have_names(tmp_path: Path) -> None:
    tokenizer = Tokenizer(str(write_tokenizer(tmp_path)))
    stops = frozenset(tokenizer.stop_tokens)
    named = grammar_matcher(
        Grammar.lark('start: <|reserved_special_token_7|> "x"'), tokenizer, tokenizer.n_words, stops
    )
    only = allowed_tokens(named.mask, tokenizer.n_words).nonzero().flatten().tolist()
    assert only == [tokenizer.special_tokens["<|reserved_special_token_7|>"]]
    text = grammar_matcher(Grammar.lark("start: /.+/"), tokenizer, tokenizer.n_words, stops)
    allowed = set(allowed_tokens(text.mask, tokenizer.n_words).nonzero().flatten().tolist())
    assert not allowed & set(tokenizer.special_tokens.values()) and ord("x") in allowed
