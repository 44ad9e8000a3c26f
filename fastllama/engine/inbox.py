"""What an engine is asked to do, in the order in which it was asked: requests and cancellations.

Other threads put them in at any time, and the next step takes them out. So nobody waits for the step that runs. A
command holds no object of this process: another one that shares the model can do the same (`distributed/`).
"""

from collections import deque
from collections.abc import Callable, Iterator
from enum import Enum
from typing import NamedTuple

from fastllama.engine.grammar import Grammar
from fastllama.engine.grammar_matcher import GrammarMatcher
from fastllama.engine.request import Request
from fastllama.engine.sampling_params import SamplingParams
from fastllama.engine.sequence import Sequence
from fastllama.tokenizer_base import BaseTokenizer, TextStream


class NewRequest(NamedTuple):
    """A request that has been checked."""

    tokens: list[int]  # of the prompt
    params: SamplingParams
    stop_ids: frozenset[int]  # of the tokenizer and of the request
    budget: int  # the most tokens of an answer
    first_scored: int = 1
    alternatives: tuple[int, ...] = ()
    number: int = 0  # it has one when it was accepted, as it has the random stream of each answer
    streams: tuple[tuple[int, int, int], ...] = ()

    @property
    def last(self) -> int:
        """The last position that may get a token."""
        return len(self.tokens) - 1 + self.budget

    def sequences(
        self, tokenizer: BaseTokenizer, arrivals: Iterator[int], matcher: GrammarMatcher | None
    ) -> list[Sequence]:
        """Its answers. arrivals: numbers in the order of arrival. matcher: of its grammar, at the beginning."""
        params = self.params
        scored = params.prompt_logprobs is not None or (params.echo and params.logprobs is not None)
        return [
            Sequence(
                arrival=next(arrivals),
                index=index,
                params=params,
                tokens=list(self.tokens),
                n_prompt=len(self.tokens),
                last=self.last,
                stream=stream,
                stop_ids=self.stop_ids,
                # A grammar tells whether the text begins with a space.
                text=TextStream(tokenizer, strips_space=matcher is None or params.echo),
                first_scored=self.first_scored if scored and index == 0 else None,  # the others find its pages
                alternatives=self.alternatives,
                n_top_scored=max(params.prompt_logprobs or 0, params.logprobs or 0 if params.echo else 0),
                matcher=matcher and matcher.copy(),
            )
            for index, stream in enumerate(self.streams)
        ]


class Cancellation(NamedTuple):
    """A request is to end."""

    number: int


class Preparation(NamedTuple):
    """A request with this grammar comes soon. While the driver compiles it, so do other processes."""

    grammar: Grammar


Command = NewRequest | Cancellation | Preparation


class Task(Enum):
    """What an engine does after it has followed all commands."""

    NOTHING = "nothing"
    STEP = "step"
    CLOSE = "close"  # cancel all requests


class Inbox:
    """Commands with the handles of their requests.

    The caller's lock guards `put` and `gather`. What was gathered belongs to whoever runs the step.
    """

    def __init__(self) -> None:
        self._new: list[tuple[Command, Request | None]] = []
        self._gathered: deque[tuple[Command, Request | None]] = deque()  # only the step uses them

    @property
    def is_empty(self) -> bool:
        """Whether all commands have been followed. Certain for who runs the step, or holds the caller's lock."""
        return not self._new and not self._gathered

    def put(self, command: Command, request: Request | None) -> None:
        """The next command, and its request if it has one."""
        self._new.append((command, request))

    def gather(self) -> list[Command]:
        """Take in the commands that have come since the last time -> these. `follow` comes next."""
        new, self._new = self._new, []
        self._gathered.extend(new)
        return [command for command, _ in new]

    def follow(self, do: Callable[[Command, Request], None]) -> None:
        """Do what was gathered, in order. What raises an error is done again the next time, and what comes after it."""
        while self._gathered:
            command, request = self._gathered[0]
            if request is not None:  # a preparation is for other processes
                do(command, request)
            self._gathered.popleft()

    def clear(self) -> list[Request]:
        """Drop all commands -> their requests."""
        self.gather()
        requests = [request for _, request in self._gathered if request is not None]
        self._gathered.clear()
        return requests
