"""Follows answers through their grammars on the host: which tokens may come next, as bits, and where an answer ends.

A grammar is about text, a mask about tokens. llguidance knows the text of every token, special ones apart, and finds
those that may follow. It is told nothing else of a tokenizer: a text that can be written in several ways may be written
in any of them, as the model likes it. Masks depend only on the grammar and the tokens so far, so all processes that
share a model compute the same.
"""

import contextlib
import copy
import json
import threading
from collections import OrderedDict
from collections.abc import Set as AbstractSet
from concurrent.futures import Future
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from fastllama.engine.grammar import Grammar
from fastllama.kernels.sampling.masks import WORD_BITS, n_words
from fastllama.tokenizer_base import BaseTokenizer

UNFORCED = '%llguidance {"no_forcing": true}'  # in Lark: forced text, too, is written in tokens that the model chooses
NO_TOKEN_FITS = "NoExtensionBias"  # llguidance's message where a text can go on, but with no token
MOST_COMPILED = 32  # grammars that are kept for later requests
MAX_PROBLEM = 300  # characters of a message of llguidance's, which may list all special tokens


class GrammarMatcher:
    """One answer's place in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int, stop_ids: AbstractSet[int], min_tokens: int) -> None:
        """At the beginning. matcher: llguidance's, for a vocabulary with one token more.

        stop_ids: tokens that end the answer, allowed where the grammar may end. min_tokens: not before so many tokens.
        """
        self._matcher, self._min_tokens = matcher, min_tokens
        is_stop = torch.zeros(vocab_size, dtype=torch.bool)
        is_stop[sorted(stop_ids)] = True
        self._stop_ids, self._stops, self._text = stop_ids, _packed(is_stop), _packed(~is_stop)
        self._n_tokens = 0
        self.error: str | None = None  # why it cannot go on
        self.is_complete = False  # the answer follows the grammar, and no token can be added to its text
        self.mask: Tensor = self._next_mask()  # (W,) int32 on the CPU, as in TokenMasks: tokens that may follow

    def copy(self) -> "GrammarMatcher":
        """Another answer at the same place."""
        other = copy.copy(self)
        other._matcher = self._matcher.deep_copy()
        return other

    def accept(self, token: int) -> None:
        """The next token of the answer, which the mask allowed and which is no stop token."""
        self._n_tokens += 1
        self._matcher.consume_token(token)
        self.mask = self._next_mask()

    def _next_mask(self) -> Tensor:
        matcher = self._matcher
        may_end = not matcher.get_error() and matcher.is_accepting()
        words = torch.frombuffer(bytearray(matcher.compute_bitmask()), dtype=torch.int32)
        words = words[: len(self._text)] & self._text
        if not words.any():
            self.is_complete = may_end
            self.error = None if may_end else self._problem()
        if may_end and self._n_tokens >= self._min_tokens:
            words |= self._stops
        return words

    def _problem(self) -> str:
        problem = _first_line(self._matcher.get_error())
        if problem and problem != NO_TOKEN_FITS:
            return f"the grammar could not be followed after {self._n_tokens} tokens: {problem}"
        return (
            f"the grammar allows no token after {self._n_tokens} tokens: no token has the text that it wants, or only "
            f"tokens that end the answer have it ({', '.join(map(str, sorted(self._stop_ids))) or 'there are none'})"
        )


def prepare(grammar: Grammar, tokenizer: BaseTokenizer, vocab_size: int) -> None:
    """Compile a grammar in a thread of its own, for a `grammar_matcher` that comes soon and has its errors."""

    def compile_for_later() -> None:
        with contextlib.suppress(ValueError):
            _grammars_of(tokenizer).compiled(grammar, vocab_size)

    threading.Thread(target=compile_for_later, name="fastllama grammar", daemon=True).start()


def grammar_matcher(
    grammar: Grammar, tokenizer: BaseTokenizer, vocab_size: int, stop_ids: AbstractSet[int], min_tokens: int = 0
) -> GrammarMatcher:
    """The matcher of a grammar for a model with vocab_size tokens, at the beginning.

    ValueError for a grammar that names unknown special tokens, or that no token can begin. The first grammar of a
    tokenizer takes up to some seconds.
    """
    matcher = _grammars_of(tokenizer).compiled(grammar, vocab_size).deep_copy()
    found = GrammarMatcher(matcher, vocab_size, stop_ids, min_tokens)
    if found.error is not None:
        raise ValueError(found.error)
    return found


class _Vocabulary:
    """A tokenizer as llguidance wants it: the text of every token, and a token of its own for the end of a text."""

    bos_token_id = None

    def __init__(self, tokenizer: BaseTokenizer, vocab_size: int) -> None:
        known = min(tokenizer.n_words, vocab_size)
        self.tokens = [tokenizer.decode_bytes([token]) for token in range(known)]
        self.tokens += [b""] * (vocab_size - known) + [b"<end>"]
        self.eos_token_id = vocab_size
        special = {token for token in tokenizer.special_tokens.values() if token < known}
        self.special_token_ids = sorted(special | {self.eos_token_id})
        self._ids = {text: token for token, text in enumerate(self.tokens) if token not in self.special_token_ids}

    def __call__(self, text: bytes) -> list[int]:
        """Tokens of a text that is forced: the longest that fit. Only for a grammar that `_unforced` does not know."""
        tokens: list[int] = []
        while text:
            size = next((size for size in range(min(len(text), 64), 0, -1) if text[:size] in self._ids), 0)
            if not size:
                break
            tokens.append(self._ids[text[:size]])
            text = text[size:]
        return tokens


class _Grammars:
    """The newest compiled grammars for one tokenizer. One that several want is compiled once."""

    def __init__(self, tokenizer: BaseTokenizer) -> None:
        self._tokenizer = ref(tokenizer)
        self._lock = threading.Lock()  # never held for long
        self._vocabulary_lock = threading.Lock()
        self._vocabularies: dict[int, Any] = {}
        self._compiled: OrderedDict[tuple[Grammar, int], Future[Any]] = OrderedDict()

    def compiled(self, grammar: Grammar, vocab_size: int) -> Any:
        """llguidance's matcher at the beginning of a grammar, to be copied. Raises ValueError."""
        key = grammar, vocab_size
        with self._lock:
            is_new = key not in self._compiled
            future: Future[Any] = self._compiled.setdefault(key, Future())
            self._compiled.move_to_end(key)
            if len(self._compiled) > MOST_COMPILED:
                self._compiled.popitem(last=False)
        if is_new:
            try:
                future.set_result(self._compile(grammar, vocab_size))
            except BaseException as error:
                future.set_exception(error)
                with self._lock:
                    self._compiled.pop(key, None)
        return future.result()

    def _compile(self, grammar: Grammar, vocab_size: int) -> Any:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(verbose_errors=False)
        vocabulary = self._vocabulary(vocab_size)
        matcher = LLMatcher(vocabulary, _unforced(grammar.source), log_level=0, limits=limits)
        if matcher.is_error():
            raise ValueError(f"the grammar does not fit this model: {_first_line(matcher.get_error())}")
        return matcher

    def _vocabulary(self, vocab_size: int) -> Any:
        """llguidance's tokenizer for a model with vocab_size tokens."""
        with self._vocabulary_lock:
            if vocab_size not in self._vocabularies:
                from llguidance import LLTokenizer, TokenizerWrapper

                tokenizer = self._tokenizer()
                assert tokenizer is not None  # whoever asks holds it
                self._vocabularies[vocab_size] = LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, vocab_size)))
            return self._vocabularies[vocab_size]


_grammars: WeakKeyDictionary[BaseTokenizer, _Grammars] = WeakKeyDictionary()
_grammars_lock = threading.Lock()


def _grammars_of(tokenizer: BaseTokenizer) -> _Grammars:
    with _grammars_lock:
        if tokenizer not in _grammars:
            _grammars[tokenizer] = _Grammars(tokenizer)
        return _grammars[tokenizer]


def _unforced(source: str) -> str:
    """A grammar in Lark that forces no tokens; unchanged if it is neither Lark nor one JSON schema."""
    if source.lstrip().startswith("{"):
        grammars = json.loads(source).get("grammars", [])
        if len(grammars) != 1 or "json_schema" not in grammars[0]:
            return source
        source = f"start: %json {json.dumps(grammars[0]['json_schema'])}"
    return f"{source}\n{UNFORCED}"


def _packed(is_in: Tensor) -> Tensor:
    """Which tokens are in a set, (V,) bool, as the bits of a mask, (W,) int32."""
    bits = torch.zeros(n_words(len(is_in)) * WORD_BITS, dtype=torch.int64)
    bits[: len(is_in)] = is_in
    return (bits.view(-1, WORD_BITS) << torch.arange(WORD_BITS)).sum(-1).to(torch.int32)


def _first_line(problem: str) -> str:
    """What a message says, without the state of the parser after it."""
    return problem.partition("\n")[0][:MAX_PROBLEM]
