"""What an engine is asked to do: requests and cancellations.

A command holds no object of its process: other processes that share the model can do the same (`distributed/`), and the
commands may come from another process (`remote_engine.py`).
"""

from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

from fastllama.engine.grammar import Grammar
from fastllama.engine.grammar_matcher import GrammarMatcher
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
    is_streamed: bool = True  # whether increments are wanted as they come

    @property
    def last(self) -> int:
        """The last position that may get a token."""
        return len(self.tokens) - 1 + self.budget

    def sequences(
        self, tokenizer: BaseTokenizer, arrivals: Iterator[int], matcher: GrammarMatcher | None
    ) -> list[Sequence]:
        """Its answers. arrivals: numbers in the order of arrival. matcher: of its grammar, at the beginning."""
        params = self.params
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
                # The others find its pages.
                first_scored=self.first_scored if params.scores_prompt and index == 0 else None,
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
