"""Any number of prompts through an engine, with results in order and bounded memory."""

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence, Sized
from itertools import zip_longest
from typing import NamedTuple, cast

from tqdm import tqdm

from fastllama.engine.engine import Engine
from fastllama.engine.prompts import Prompt
from fastllama.engine.request import Request, Result
from fastllama.engine.sampling_params import SamplingParams

UNFINISHED_PER_ROW = 2  # requests submitted per row of the cache: one runs, one waits
HELD_PER_ROW = 64  # results that wait for an earlier one, per row


class Submission(NamedTuple):
    """The arguments of `Engine.submit`."""

    prompt: Prompt
    params: SamplingParams | None = None
    first_scored: int = 1
    alternatives: Sequence[int] = ()


def in_order(
    engine: Engine,
    prompts: Iterable[Prompt],
    params: SamplingParams | Iterable[SamplingParams] | None,
    progress: bool | None,
) -> Iterator[Result]:
    """See `Llama.generate_many`."""
    if isinstance(prompts, str | bytes):
        raise ValueError("prompts must be a list or another iterable of prompts: for one prompt pass [prompt]")
    total = len(prompts) if isinstance(prompts, Sized) else None
    return run_in_order(engine, _submissions(prompts, params), total, "answering", progress)


def run_in_order(
    engine: Engine, submissions: Iterable[Submission], total: int | None, title: str, progress: bool | None
) -> Generator[Result]:
    """Submit as rows become free, and yield the results in order. Closes the engine at the end.

    total, title, progress: of the bar. Raises ValueError, naming the prompt, for one that does not fit.
    """
    rows = engine.llm.model.params.max_batch_size
    bar = tqdm(total=total, desc=title, unit="prompt", disable=None if progress is None else not progress)
    with engine, bar:
        submitted = _submitted(engine, submissions)
        open_requests: deque[Request] = deque()
        is_last = False
        while open_requests or not is_last:
            unfinished = sum(not request.is_finished for request in open_requests)
            while not is_last and unfinished < UNFINISHED_PER_ROW * rows and len(open_requests) < HELD_PER_ROW * rows:
                request = next(submitted, None)
                is_last = request is None
                if request is not None:
                    open_requests.append(request)
                    unfinished += 1
            while open_requests and open_requests[0].is_finished:
                bar.update()
                yield open_requests.popleft().result()
            if open_requests:
                engine.step()


def _submitted(engine: Engine, submissions: Iterable[Submission]) -> Iterator[Request]:
    for index, one in enumerate(submissions):
        prompt, params, first, alternatives = one
        try:
            yield engine.submit(prompt, params, first_scored=first, alternatives=alternatives)
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from error


def _submissions(
    prompts: Iterable[Prompt], params: SamplingParams | Iterable[SamplingParams] | None
) -> Iterator[Submission]:
    if params is None or isinstance(params, SamplingParams):
        return (Submission(prompt, params) for prompt in prompts)
    return _paired(prompts, params)


def _paired(prompts: Iterable[Prompt], params: Iterable[SamplingParams]) -> Iterator[Submission]:
    missing = object()
    for count, (prompt, one) in enumerate(zip_longest(prompts, params, fillvalue=missing)):
        if prompt is missing or one is missing:
            shorter = "prompts" if prompt is missing else "params"
            raise ValueError(f"there must be one SamplingParams for each prompt, and the {shorter} end after {count}")
        yield Submission(cast(Prompt, prompt), cast(SamplingParams, one))
