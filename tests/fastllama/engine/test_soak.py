"""Random traffic for a while: memory stays flat, and nothing is left. `make soak` makes the while ten minutes.

Prompts of all lengths run first, since the libraries keep what they have compiled for a number of tokens.
"""

import gc
import os
import random
import time
from pathlib import Path

import psutil
import pytest

from fastllama import SamplingParams
from fastllama.engine import Engine, Request
from tests.fastllama.engine.llamas import MAX_SEQ_LEN, engine_llama

SECONDS = float(os.environ.get("FASTLLAMA_SOAK_SECONDS", "10"))
# Between the end of the first third and the end: of the allocators.
GROWTH_BYTES = {"reference": 12 * 2**20, "native": 12 * 2**20}
OPEN_REQUESTS = 12


def random_request(engine: Engine, source: random.Random) -> Request:
    stem = [source.choice([3, 4])] * source.choice([0, 0, 70, 130])
    params = SamplingParams(
        max_gen_len=source.choice([0, 1, 10, 100]),
        temperature=source.choice([0.0, 1.0]),
        seed=source.randrange(100),
        n=source.choice([1, 1, 3]),
        stop=source.choice([(), ("ab", "c")]),
        logprobs=source.choice([None, None, 0, 5]),
        prompt_logprobs=source.choice([None, None, None, 1]),
        frequency_penalty=source.choice([0.0, 0.0, 0.5]),
    )
    return engine.submit(stem + source.choices(range(320), k=source.randint(1, 80)), params)


def resident_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


@pytest.mark.slow
@pytest.mark.timeout(2 * SECONDS + 900)
@pytest.mark.parametrize("backend", GROWTH_BYTES)
def test_memory_is_flat_under_random_traffic(tmp_path: Path, backend: str) -> None:
    llm = engine_llama(tmp_path, backend=backend, cache_tokens=7 * 64)
    for length in range(1, MAX_SEQ_LEN):
        llm.generate([[length % 320] * length], 1)
    engine, source = llm.engine(max_tokens_per_step=64), random.Random(1)
    requests: list[Request] = []
    begin, before, ended = time.monotonic(), 0, 0
    while (passed := time.monotonic() - begin) < SECONDS:
        if not before and passed > SECONDS / 3:
            before = resident_bytes()
        while len(requests) < OPEN_REQUESTS:
            requests.append(random_request(engine, source))
        if source.random() < 0.02:
            source.choice(requests).cancel()
        engine.step()
        finished = [request for request in requests if request.is_finished]
        ended += len(finished)
        assert all(answer.finish_reason for request in finished for answer in request.result().answers)
        requests = [request for request in requests if not request.is_finished]
    engine.run()
    stats = engine.stats
    assert (stats.running, stats.waiting, stats.used_pages) == (0, 0, 0) and stats.preemptions > 0
    assert engine._core.scheduler.pool.n_available == stats.pages and stats.finished_requests >= ended > 100
    assert before, "no step began after the first third"
    assert resident_bytes() - before < GROWTH_BYTES[backend]
    llm.model.check_idle()
