"""What two processes say to each other: one that has an engine, and one that submits requests to it.

Each counts for itself: `number` is the one that the submitting process has given to a request or a question.
"""

from typing import Literal, NamedTuple

from fastllama.engine.commands import Cancellation, NewRequest
from fastllama.engine.sequence import Increment
from fastllama.engine.stats import Stats
from fastllama.token_scores import TokenScore

Subject = Literal["stats", "close"]

# To the engine.


class Submission(NamedTuple):
    """A checked request. One with a grammar is replied to; one without only if it is refused."""

    number: int
    request: NewRequest


class Question(NamedTuple):
    """How the engine is, or whether it has closed: it is to close, and replies once it has."""

    number: int
    subject: Subject


class Listening(NamedTuple):
    """The submitting process is ready."""


ToEngine = Submission | Cancellation | Question | Listening


# From the engine.


class Update(NamedTuple):
    """What has come of a request since its last update. Times are in seconds of time.perf_counter."""

    number: int
    increments: list[Increment]
    first_token: float | None
    token_times: list[float]  # of the first answer
    end: float | None
    prompt_scores: list[TokenScore]
    cached_tokens: int
    errors: dict[int, str]  # by the number of an answer
    failure: str | None  # of the engine


class Reply(NamedTuple):
    """To a submission or a question."""

    number: int
    stats: Stats | None = None
    refusal: Exception | None = None


class Failure(NamedTuple):
    """The engine cannot go on."""

    reason: str


class Stop(NamedTuple):
    """The submitting process is to end, once what runs has ended or at once."""

    at_once: bool


FromEngine = Update | Reply | Failure | Stop
