"""What the tests of an engine over several processes run, in processes of their own.

    python -m tests.support.shared_engine_cases CASE FOLDER [BUILD]

CASE is a function of this file, and BUILD a JSON object of options for the build. The process is the driver, and starts
a worker; under torchrun, rank 0 is the driver. It prints a JSON value.
"""

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

from fastllama import Llama, SamplingParams
from fastllama.distributed import driver, environment, worker
from fastllama.distributed.shared_engine import open_engine
from fastllama.engine import Engine, Grammar, Request
from tests.support.parallel_cases import PROMPTS, build

N_PROCESSES = 2
WORDS = "start: /[a-z]{2,6}( [a-z]{2,6})*/"
REQUESTS: list[dict[str, Any]] = [
    {"seed": 3, "temperature": 0.9, "logprobs": 2},
    {"temperature": 1.0, "n": 3},  # without a seed: the order of submission decides
    {"seed": 5, "temperature": 0.8, "repetition_penalty": 1.3, "logit_bias": {9: -3.0}},
    {"temperature": 0.0, "prompt_logprobs": 0, "echo": True, "logprobs": 1},
    {"temperature": 1.0, "stop_token_ids": (168, 420), "seed": 4},
    {"temperature": 1.0},
    {"seed": 8, "max_gen_len": 0, "prompt_logprobs": 1},
    {"seed": 6, "temperature": 1.0, "grammar": Grammar.lark(WORDS), "logprobs": 0},
    {"seed": 6, "temperature": 1.0, "grammar": Grammar.lark(WORDS), "n": 2, "frequency_penalty": 0.5},
]
LONG = SamplingParams(temperature=1.0, seed=9, ignore_eos=True)  # to the end of the context
DRAWN_STOP = 99  # the first prompt's answer begins with it, drawn with seed 3


def params_of(number: int) -> SamplingParams:
    return SamplingParams(**{"max_gen_len": 8, **REQUESTS[number % len(REQUESTS)]})


def value_of(request: Request) -> list[Any]:
    """The answers and scores of a request."""
    result = request.result()
    answers = [[one.tokens, one.text, one.finish_reason, one.logprobs] for one in result.answers]
    return [answers, [score.logprob for score in result.prompt_scores or []]]


def answers(llm: Llama, engine: Engine) -> list[Any]:
    """More requests than rows, in two parts. With a thread, the second part comes while the first runs."""
    first = [engine.submit(PROMPTS[number % 3], params_of(number)) for number in range(9)]
    if engine.has_thread:
        next(iter(first[0]))
    second = [engine.submit(PROMPTS[number % 3], params_of(number)) for number in range(9, 18)]
    llm.tokenizer.stop_tokens = {DRAWN_STOP}  # of the next request only
    stopped = engine.submit(PROMPTS[0], SamplingParams(seed=3, temperature=0.9, max_gen_len=3))
    llm.tokenizer.stop_tokens = set()
    return [value_of(request) for request in [*first, *second, stopped]]


def all_cases(llm: Llama) -> dict[str, Any]:
    found: dict[str, Any] = {"options": error_of(lambda: open_engine(llm, max_tokens_per_step=0))}
    with open_engine(llm, max_tokens_per_step=5).start() as engine:
        found["answers"] = answers(llm, engine)
        calls: dict[str, Callable[[], Any]] = {
            "stream": lambda: next(llm.stream(PROMPTS, 3)),
            "run_on_all": lambda: driver.run_on_all(llm, value_of),
            "open_engine": lambda: open_engine(llm),
        }
        found["refused"] = {name: error_of(call) for name, call in calls.items()}
        found["cancelled"] = cancellations(engine)
        found["async"] = asyncio.run(in_tasks(engine))
        left = [engine.submit(prompt, LONG) for prompt in PROMPTS * 3]
    found["left"] = [request.result().answer.finish_reason for request in left]
    found["stats"] = engine.stats
    found["closed"] = error_of(lambda: engine.submit(PROMPTS[0]))
    found["stream"] = [list(one.tokens) for one in llm.stream(PROMPTS, 4, 0.0)]
    with open_engine(llm) as engine:  # steps run in the caller's thread
        found["direct"] = [value_of(engine.submit(prompt, params_of(0))) for prompt in PROMPTS]
        open_requests = [engine.submit(prompt, LONG) for prompt in PROMPTS * 3]
        engine.step()
        engine.step()
        open_requests[0].cancel()  # it runs
        open_requests[-1].cancel()  # it waits
        engine.step()
    found["direct left"] = [
        [one.finish_reason, one.tokens] for one in (request.result().answer for request in open_requests)
    ]
    stream = llm.stream(PROMPTS, 4, 0.0)
    next(stream)
    found["streaming"] = error_of(lambda: open_engine(llm))
    stream.close()
    open_engine(llm).start().submit(PROMPTS[0], LONG)  # the shutdown closes it
    return found


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def cancellations(engine: Engine) -> list[list[Any]]:
    """Of requests that run, that wait, and that no step has taken in yet."""
    requests = [engine.submit(prompt, LONG) for prompt in PROMPTS * 3]
    next(iter(requests[0]))
    requests[0].cancel()
    requests[-1].cancel()
    late = engine.submit(PROMPTS[1], LONG)
    late.cancel()
    return [[one.finish_reason, one.tokens] for one in (request.result().answer for request in [*requests, late])]


async def in_tasks(engine: Engine) -> list[list[int]]:
    async def read(number: int) -> list[int]:
        request = engine.submit(PROMPTS[number % 3], params_of(0))
        return [token async for one in request for token in one.tokens]

    return await asyncio.gather(*(read(number) for number in range(6)))


def serve(llm: Llama, is_busy: bool) -> None:
    """Print "ready" while requests run, or before they come, and go on in an event loop until a signal."""

    async def answer() -> None:
        requests = [engine.submit(prompt, LONG) for prompt in PROMPTS]
        if is_busy:
            await anext(aiter(requests[0]))
            print("ready", flush=True)
            while True:
                await asyncio.gather(*(request.aresult() for request in requests))
                requests = [engine.submit(prompt, LONG) for prompt in PROMPTS]
        await asyncio.gather(*(request.aresult() for request in requests))
        print("ready", flush=True)
        await asyncio.Event().wait()

    with open_engine(llm).start() as engine:
        asyncio.run(answer())


def serve_busy(llm: Llama) -> None:
    serve(llm, True)


def serve_idle(llm: Llama) -> None:
    serve(llm, False)


def fail_in_the_driver(llm: Llama) -> list[str]:
    """A step that fails in the driver only: the engine says why it has failed, and the shutdown does not wait."""
    engine = open_engine(llm)
    request = engine.submit(PROMPTS[0], LONG)
    engine.step()

    def failing() -> None:
        raise OSError("in this process only")

    engine._core.step = failing  # type: ignore[method-assign]
    found = [error_of_any(engine.step), error_of_any(request.result), repr(engine.failure)]
    found.append(error_of(lambda: engine.submit(PROMPTS[0])))
    engine.close()
    return found


def error_of_any(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def main(case: str, folder: str, options: str = "{}") -> None:
    launch = environment.distributed_environment()
    if launch is None:
        driver.start_workers(N_PROCESSES)
    elif launch.rank > 0:
        worker.run_worker()
    else:
        driver.connect_workers()
    try:
        llm = driver.build_on_all(build, folder=folder, **json.loads(options))
        found = globals()[case](llm)
    except KeyboardInterrupt:
        driver.shut_down()
        sys.exit(130)
    driver.shut_down()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
