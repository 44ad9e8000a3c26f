"""One answer that is being generated: its tokens, its pages of the cache, and the text that is ready."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Literal, TypeVar

from fastllama.engine.grammar_matcher import GrammarMatcher
from fastllama.engine.sampling_params import SamplingParams
from fastllama.engine.stop_strings import StopStrings
from fastllama.page_pool import Digest
from fastllama.tokenizer_base import TextStream

FinishReason = Literal["stop", "length", "cancelled", "error"]
T = TypeVar("T")
TopLogprobs = list[tuple[int, float]]  # token ids and log-probabilities, in descending order


@dataclass(frozen=True)
class Increment:
    """What was added to one answer of a request."""

    index: int  # of the answer, 0 to n - 1
    text: str  # the text that is certain; a character is never split
    tokens: list[int]  # the tokens of this text, never a stop token
    logprobs: list[float] | None  # one per token; None if they were not requested
    top_logprobs: list[TopLogprobs] | None  # the most likely tokens at each place
    finish_reason: FinishReason | None  # in an answer's last increment
    stop_reason: int | str | None  # the stop token or stop string that ended it


@dataclass(eq=False)
class Sequence:
    """An answer: the prompt's tokens and those generated so far, as the host knows them."""

    arrival: int  # number in the order of arrival
    index: int  # of the answer in its request
    params: SamplingParams
    tokens: list[int]
    n_prompt: int
    last: int  # the last position that may get a token
    stream: tuple[int, int, int]  # random stream: (seed, stream, call)
    stop_ids: frozenset[int]
    text: TextStream
    first_scored: int | None = None  # the prompt's log-probabilities are wanted from this position on
    alternatives: tuple[int, ...] = ()  # scored, too, in place of the prompt's last token
    n_top_scored: int = 0  # and so many of the most likely tokens at each of them
    matcher: GrammarMatcher | None = None  # its place in its grammar, if it has one

    row: int | None = None  # the cache row, None while it waits
    pages: list[int] = field(default_factory=list)
    digests: list[Digest] = field(default_factory=list)  # of its full pages
    n_computed: int = 0  # tokens whose keys and values are in the cache, or will be before later launches
    is_new: bool = True  # it had no row yet
    n_cached: int = 0  # tokens that were found in the cache when it got its first row
    n_remembered: int = 0  # full pages that can be found again
    in_flight: int = 0  # steps enqueued whose output is not known; each makes a token, or several if guesses are right
    most_in_flight: int = 0  # the most tokens that they make
    is_decoding: bool = False
    has_begun: bool = False  # to decode, also if it was put back since
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    # What was not given out yet: tokens with the places where their text begins and ends.
    _pending: list[tuple[int, float, TopLogprobs, int, int]] = field(default_factory=list)
    _n_text: int = 0  # characters decoded
    _n_released: int = 0  # characters given out

    def __post_init__(self) -> None:
        self._stop_strings = StopStrings(self.params.stop)

    @property
    def n_generated(self) -> int:
        return len(self.tokens) - self.n_prompt

    @property
    def placed_row(self) -> int:
        """The cache row of a running sequence."""
        if self.row is None:
            raise RuntimeError(f"sequence {self.arrival} has no row: it is not running")
        return self.row

    @property
    def steps_to_enqueue(self) -> int:
        """Decode steps that may be enqueued for it, if each makes one token."""
        return self.last_ahead - (len(self.tokens) - 1) - self.in_flight

    @property
    def last_ahead(self) -> int:
        """The last position that may get a token before the host has seen it: with a grammar, the next one."""
        return self.last if self.matcher is None else min(self.last, len(self.tokens))

    @property
    def is_prefilled(self) -> bool:
        """Whether all tokens but the newest are in the cache: a decode step computes that one."""
        return self.n_computed >= len(self.tokens) - 1

    def count_scored(self, n_tokens: int) -> None:
        """So many more of the prompt's log-probabilities are known, and not computed again if it is put back."""
        if self.first_scored is not None:
            self.first_scored += n_tokens
            if self.first_scored >= self.n_prompt:
                self.first_scored = None

    def add_token(self, token: int, logprob: float, top: TopLogprobs) -> Increment:
        """A generated token, which may end the answer -> what is certain now."""
        self.n_computed = len(self.tokens)
        if token in self.stop_ids:
            return self._finished("stop", token)
        self.tokens.append(token)
        begin, text = self._n_text, self.text.push([token])
        self._n_text += len(text)
        self._pending.append((token, logprob, top, begin, self._n_text))
        released = self._stop_strings.push(text)
        self._n_released += len(released)
        if self._stop_strings.found is not None:
            return self._stopped(released)
        if self.matcher is not None:
            self.matcher.accept(token)
            if self.matcher.is_complete:
                return self._finished("stop", None, released)
        if len(self.tokens) - 1 >= self.last:
            return self._finished("length", None, released)
        ready = 0  # a token without text waits for that of the next, which may be in the middle of its character
        while ready < len(self._pending) and self._pending[ready][3] < self._n_released >= self._pending[ready][4]:
            ready += 1
        return self._increment(released, ready)

    def end(self, reason: FinishReason) -> Increment:
        """End the answer from outside -> all that was held back."""
        return self._finished(reason, None)

    def abandon(self) -> Increment:
        """End the answer after an error in its text -> nothing of what was held back."""
        self.finish_reason, self.stop_reason = "error", None
        return self._increment("", 0)

    def put_back(self) -> None:
        """Forget what is on the device: row, pages, and steps in flight. All tokens are computed again."""
        self.row, self.pages, self.n_computed, self.n_remembered = None, [], 0, 0
        self.in_flight = self.most_in_flight = 0
        self.is_decoding = False

    def _stopped(self, released: str) -> Increment:
        """End the answer at a stop string. A token stays whose text begins before it."""
        self._pending = [one for one in self._pending if one[3] < self._n_released]
        self.finish_reason, self.stop_reason = "stop", self._stop_strings.found
        return self._increment(released, len(self._pending))

    def _finished(self, reason: FinishReason, stop: int | None, released: str = "") -> Increment:
        # The decoder's rest, of an incomplete character, may still complete a stop string.
        rest = self._stop_strings.push(self.text.finish())
        self._n_released += len(rest)
        if self._stop_strings.found is not None and reason != "error":
            return self._stopped(released + rest)
        self.finish_reason, self.stop_reason = reason, stop
        return self._increment(released + rest + self._stop_strings.finish(), len(self._pending))

    def _increment(self, text: str, n_tokens: int) -> Increment:
        ready, self._pending = self._pending[:n_tokens], self._pending[n_tokens:]
        wanted = self.params.logprobs
        return Increment(
            index=self.index,
            text=text,
            tokens=[token for token, *_ in ready],
            logprobs=None if wanted is None else [logprob for _, logprob, *_ in ready],
            top_logprobs=[top[:wanted] for _, _, top, *_ in ready] if wanted else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


def joined(increments: Iterable[Increment]) -> list[Increment]:
    """The increments as one for each answer."""
    groups: dict[int, list[Increment]] = {}
    for one in increments:
        groups.setdefault(one.index, []).append(one)
    return [group[0] if len(group) == 1 else _as_one(group) for group in groups.values()]


def _as_one(group: list[Increment]) -> Increment:
    return replace(
        group[-1],
        text="".join(one.text for one in group),
        tokens=[token for one in group for token in one.tokens],
        logprobs=_chained(one.logprobs for one in group),
        top_logprobs=_chained(one.top_logprobs for one in group),
    )


def _chained(parts: Iterable[list[T] | None]) -> list[T] | None:
    known = [part for part in parts if part is not None]
    return list(chain.from_iterable(known)) if known else None
