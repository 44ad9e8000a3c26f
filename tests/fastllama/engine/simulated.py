"""An engine without tensors: its device is a dictionary, in which every wrong page is an error.

A "model" whose next token follows from all tokens before it, as in a real one. Its cache holds, for each position, the
token, and a number for all tokens up to it. A step that reads a page of another prefix, or writes to a page that is
shared or can be found again, fails. Launches run in the order in which they are enqueued, and the host sees their
output as late as with a GPU. A row with a grammar draws from its mask. Pages have 4 positions.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastllama import page_pool
from fastllama.distributed.model_parallel import SINGLE_PROCESS
from fastllama.engine import Engine, SamplingParams, core, scheduler
from fastllama.engine.grammar import Grammar
from fastllama.engine.model_runner import NewToken
from fastllama.engine.sequence import Sequence as Answering
from fastllama.kernels import paged_cache
from fastllama.kernels.sampling.masks import allowed_tokens
from fastllama.page_pool import PagePool
from fastllama.token_scores import TokenScore
from fastllama.tokenizer_base import BaseTokenizer

PAGE = 4
VOCABULARY = 16
EOS = 15
ROOT = 1  # the number of no tokens
LETTERS_IN_GRAMMAR = 13


def following(number: int, token: int) -> int:
    """The number of a prefix with one more token."""
    return (number * 1_000_003 + token + 1) * 0x9E3779B97F4A7C15 % 2**61


def drawn(number: int, stream: int) -> int:
    """The token that follows a prefix."""
    return (number ^ stream * 0x51ED270B7) // 64 % VOCABULARY


def chosen(allowed: Sequence[int], number: int, stream: int) -> int:
    """The token that follows a prefix where only some are allowed."""
    return allowed[drawn(number, stream) % len(allowed)]


def score_of(number: int, token: int) -> float:
    """The log-probability of a token after a prefix."""
    return -(following(number, token) % 997) / 100


class Letters(BaseTokenizer):
    """Each token is a letter."""

    n_words = VOCABULARY
    bos_id = eos_id = pad_id = EOS
    special_tokens: dict[str, int] = {}  # noqa: RUF012

    def __init__(self) -> None:
        self.stop_tokens = {EOS}

    def _encode_text(self, s: str, *, is_first: bool) -> list[int]:
        return [ord(letter) - ord("a") for letter in s]

    def _join(self, ids: list[int]) -> bytes:
        return bytes(ord("a") + token for token in ids)


class Runner:
    """In place of a ModelRunner."""

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder
        decoder.runner = self
        self.pool: PagePool = decoder.model.cache.pool
        self.fails_in = ""  # the method that raises next
        # An error that comes back: whether these sequences, together in a launch, cause it.
        self.breaks: Callable[[str, list[Answering]], bool] = lambda where, together: False
        self.table: dict[tuple[int, int], int] = {}
        self.memory: dict[tuple[int, int], tuple[int, int]] = {}  # of a page and place: the prefix's number, the token
        self.begin()

    def begin(self) -> None:
        self.active: dict[int, dict[str, Any]] = {}  # the state of the rows that generate
        self.outputs: deque[list[tuple[Answering, list[int]]]] = deque()

    def recover(self) -> None:
        self.begin()

    @property
    def queued(self) -> int:
        return len(self.outputs)

    def set_pages(self, entries: dict[tuple[int, int], int]) -> None:
        self.table |= entries

    def prefill(self, chunks: Sequence[scheduler.Chunk]) -> dict[Answering, list[TokenScore]]:
        self._fail_in("prefill", [chunk.sequence for chunk in chunks])
        scores: dict[Answering, list[TokenScore]] = {}
        for sequence, begin, end in chunks:
            row, tokens = sequence.placed_row, sequence.tokens
            assert row not in self.active, "a row decodes whose prompt is being computed"
            number = self._attend(row, begin)
            for position in range(begin, end):
                self._append(row, position, number, tokens[position])
                number = following(number, tokens[position])
                first = sequence.first_scored
                if first is not None and first <= position + 1 < sequence.n_prompt:
                    score = TokenScore(score_of(number, tokens[position + 1]), False, [])
                    scores.setdefault(sequence, []).append(score)
            if sequence.first_scored is not None:
                scores.setdefault(sequence, [])
        return scores

    def start(self, sequences: Sequence[Answering]) -> None:
        for one in sequences:
            assert one.placed_row not in self.active, "a row starts that runs"
            if len(one.tokens) - 1 < one.last:
                self._activate(one, None)
            one.is_decoding = True

    def _activate(self, one: Answering, allowed: list[int] | None) -> None:
        state = {"position": len(one.tokens) - 1, "token": one.tokens[-1], "last": one.last_ahead}
        self.active[one.placed_row] = state | {"sequence": one, "allowed": allowed}

    def move(self, moves: Sequence[scheduler.Move]) -> None:
        assert not self.outputs, "a row moves whose output is not known"
        for _, source, target in moves:
            assert target not in self.active, "a row moves to one that is in use"
            if source in self.active:
                self.active[target] = self.active.pop(source)

    def stop(self, rows: Sequence[int]) -> None:
        for row in rows:
            self.active.pop(row, None)

    def step(self, sequences: Sequence[Answering]) -> None:
        self._fail_in("step", list(sequences))
        for one in sequences:
            if one.matcher is not None:
                assert one.in_flight == 0, "a mask for a token after one that is not known"
                allowed = allowed_tokens(one.matcher.mask, VOCABULARY).nonzero().flatten().tolist()
                self._activate(one, allowed)
        assert set(self.active) <= {one.placed_row for one in sequences}, "a row was not stopped"
        output: list[tuple[Answering, list[int]]] = [(one, []) for one in sequences]
        for _ in range(self.decoder.unroll):
            for one, tokens in output:
                if one.placed_row in self.active:
                    tokens += self._check_guesses(one.placed_row)
        for one in sequences:
            one.in_flight += self.decoder.unroll
            one.most_in_flight += self.decoder.most_new_tokens
        self.outputs.append(output)

    def receive(self) -> Iterable[NewToken]:
        self._fail_in("receive", [one for one, _ in self.outputs[0]])
        for sequence, tokens in self.outputs.popleft():
            sequence.in_flight -= self.decoder.unroll
            sequence.most_in_flight -= self.decoder.most_new_tokens
            for token in tokens:
                if sequence.finish_reason is None:
                    yield NewToken(sequence, token, -1.0, [])

    def _check_guesses(self, row: int) -> list[int]:
        """One row's part of a step: its next token, and those after it whose guesses were right."""
        begin, last = self.active[row]["position"], self.active[row]["last"]
        n_guesses = self.decoder.most_new_tokens - self.decoder.unroll
        tokens = [self._decode(row)]
        while row in self.active and len(tokens) <= n_guesses and (begin + tokens[-1]) % 3:
            tokens.append(self._decode(row))
        for position in range(begin + len(tokens), min(begin + n_guesses + 1, last)):
            self._append(row, position, -1, -1)  # a wrong guess
        return tokens

    def _decode(self, row: int) -> int:
        """One row's part of a step. It knows only what is on the device, beside the row's constants."""
        state = self.active[row]
        position, constants = state["position"], state["sequence"]
        number = self._attend(row, position)
        self._append(row, position, number, state["token"])
        allowed = range(VOCABULARY) if state["allowed"] is None else state["allowed"]
        token = chosen(allowed, following(number, state["token"]), constants.stream[1])
        state["position"], state["token"] = position + 1, token
        if token in constants.stop_ids or position + 1 >= state["last"]:
            del self.active[row]
        return token

    def _attend(self, row: int, length: int) -> int:
        """The number of a row's first tokens, which must follow each other in its pages."""
        number = ROOT
        for position in range(length):
            prefix, token = self.memory[self._place(row, position)]
            assert prefix == number, f"row {row} reads another prefix at position {position}"
            number = following(number, token)
        return number

    def _append(self, row: int, position: int, number: int, token: int) -> None:
        place = self._place(row, position)
        users = self.pool._users[place[0]]
        assert users == 1, f"row {row} writes to page {place[0]}, which {users} sequences use"
        assert place[0] not in self.pool._digest_of, f"row {row} writes to page {place[0]}, which others may find"
        self.memory[place] = number, token

    def _place(self, row: int, position: int) -> tuple[int, int]:
        return self.table[row, position // PAGE], position % PAGE

    def _fail_in(self, where: str, together: list[Answering]) -> None:
        if self.fails_in == where or self.breaks(where, together):
            self.fails_in = ""
            raise ArithmeticError(f"as planned, in {where}")


def simulated_engine(
    *,
    rows: int,
    pages: int,
    max_seq_len: int,
    ahead: int = 0,
    unroll: int = 1,
    n_guesses: int = 0,
    step_tokens: int = 8,
    reuse: bool = True,
) -> Engine:
    """An engine on the simulated model. Within `small_pages`."""
    params = SimpleNamespace(max_seq_len=max_seq_len, max_batch_size=rows)
    cache = SimpleNamespace(pool=PagePool(pages), max_batch_size=rows, n_row_pages=0)
    model: Any = SimpleNamespace(
        params=params, cache=cache, vocab_size=VOCABULARY, device=torch.device("cpu"), holders=0
    )
    model.group = SINGLE_PROCESS

    @contextmanager
    def exclusively() -> Iterator[None]:
        assert model.holders == 0
        model.holders += 1
        yield
        model.holders -= 1

    model.exclusively = exclusively
    decoder = SimpleNamespace(model=model, replays_ahead=ahead, unroll=unroll, most_new_tokens=unroll + n_guesses)
    decoder.mark_finished, decoder.positions_ahead = lambda row: None, decoder.most_new_tokens
    llm: Any = SimpleNamespace(model=model, tokenizer=Letters(), formatter=None, decoder=decoder)
    llm.random_streams = lambda seed, n: [(seed or 0, index, 0) for index in range(n)]
    return Engine(llm, max_tokens_per_step=step_tokens, reuse_prefixes=reuse)


@contextmanager
def small_pages() -> Iterator[None]:
    """A block with pages of 4 positions and simulated devices."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (page_pool, paged_cache, scheduler):
            patch.setattr(module, "PAGE_TOKENS", PAGE)
        patch.setattr(core, "ModelRunner", Runner)
        yield


def answer_alone(
    prompt: Sequence[int],
    params: SamplingParams,
    index: int,
    max_seq_len: int,
    lengths: tuple[int, int] | None = None,
) -> tuple[list[int], str, str | int | None]:
    """(tokens, finish reason, stop reason) of an answer, by the definition. lengths: as in `letters`."""
    number = ROOT
    for token in prompt:
        number = following(number, token)
    room = max(0, max_seq_len - len(prompt))
    budget = room if params.max_gen_len is None else min(room, params.max_gen_len)
    stops = {EOS, *params.stop_token_ids} if not params.ignore_eos else set(params.stop_token_ids)
    tokens: list[int] = []
    while len(tokens) < budget:
        allowed = list(range(VOCABULARY))
        if lengths is not None:
            words = set(range(LETTERS_IN_GRAMMAR)) - stops if len(tokens) < lengths[1] else set[int]()
            ends = stops if len(tokens) >= lengths[0] else set[int]()
            allowed = sorted(words | ends)
        token = chosen(allowed, number, index)
        if token in stops:
            return tokens, "stop", token
        tokens.append(token)
        number = following(number, token)
        text = "".join(chr(ord("a") + one) for one in tokens)
        found = [stop for stop in params.stop if text.endswith(stop)]
        if found:
            longest = max(found, key=len)
            return tokens[: len(tokens) - len(longest)], "stop", longest
        if lengths is not None and len(tokens) == lengths[1]:
            return tokens, "stop", None
    return tokens, "length", None


def letters(lengths: tuple[int, int]) -> Grammar:
    """The first letters of the alphabet, so many of them."""
    return Grammar.lark(f"start: /[a-{chr(ord('a') + LETTERS_IN_GRAMMAR - 1)}]{{{lengths[0]},{lengths[1]}}}/")
