"""Many clients at once, some of which cancel, go away or send nonsense: every answer is what it is alone.

`make soak` makes the few seconds ten minutes. The time to the first token is printed (pytest -s), not asserted.
"""

import asyncio
import gc
import json
import os
import random
import time
from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
import pytest

from fastllama import Llama, builtin_checkpoint
from fastllama.benchmarks.statistics import percentile
from fastllama.server.settings import ServerSettings
from tests.support.running_server import RunningServer, running_server

SECONDS = float(os.environ.get("FASTLLAMA_SOAK_SECONDS", "4"))
CLIENTS, ROWS, MAX_SEQ_LEN = 64, 8, 192
CACHE_TOKENS = 8 * 64  # fewer than all rows can need: answers are put back
KINDS = 60  # different requests
GROWTH_BYTES = 24 * 2**20  # between the end of the first third and the end: of the allocators
SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 4}
DIGITS = {"type": "json_schema", "json_schema": {"name": "digits", "schema": SCHEMA}}
BROKEN = (b"{", b'{"prompt": 3}', b'{"prompt": "a", "n": 0}', b"\xff", b'{"messages": []}', b'{"prompt": ""}' * 2)


@dataclass
class Seen:
    """What the clients saw."""

    alone: list[Any]  # the texts of each request, alone
    first_seconds: "array[float]" = field(default_factory=lambda: array("d"))
    counts: Counter[str] = field(default_factory=Counter)

    def check(self, number: int, found: Any) -> None:
        """Assert that the texts of a request are those that it has alone."""
        assert found == self.alone[number], number
        self.counts["answers"] += 1


def new_body(source: random.Random) -> tuple[str, dict[str, Any]]:
    """A request with a seed: its path and body."""
    text = " ".join(
        source.choices(("the", "dog", "Once upon a time", "Lily", "went", "and", "ball"), k=source.randint(1, 40))
    )
    body: dict[str, Any] = {
        "seed": source.randrange(1000),
        "temperature": source.choice([0.0, 0.8, 1.0]),
        "max_tokens": source.choice([1, 4, 12, 40]),
        "n": source.choice([1, 1, 1, 2]),
        "top_p": source.choice([1.0, 0.9]),
        "stop": source.choice([None, None, [" the", "."]]),
    }
    if source.random() < 0.2:
        body["frequency_penalty"] = 0.5
    if source.random() < 0.2:
        body["logit_bias"] = {str(source.randrange(300)): source.choice([-100, 4])}
    if source.random() < 0.2:
        body |= {"response_format": DIGITS, "max_tokens": 12, "stop": None}
        return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}
    if source.random() < 0.5:
        body |= {"logprobs": True, "top_logprobs": 1} if source.random() < 0.3 else {}
        return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}
    body |= {"logprobs": 1, "echo": True} if source.random() < 0.3 else {}
    return "/v1/completions", body | {"prompt": text}


def texts(choices: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The text and the reason of the end of each choice."""
    return [(one["text"] if "text" in one else one["message"]["content"], one["finish_reason"]) for one in choices]


async def streamed(client: httpx.AsyncClient, path: str, body: dict[str, Any], most: int, seen: Seen) -> Any:
    """The texts of a streamed answer; None after `most` events, where the client goes away."""
    found, reasons, begin = [""] * body["n"], [""] * body["n"], time.monotonic()
    async with client.stream("POST", path, json={**body, "stream": True}) as response:
        if response.status_code != 200:
            await response.aread()
            return response
        is_first, n_events, is_done = True, 0, False
        async for line in response.aiter_lines():
            if not line:
                continue
            if is_done := line == "data: [DONE]":
                break
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk
            for choice in chunk["choices"]:
                piece = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
                if is_first and piece:
                    seen.first_seconds.append(time.monotonic() - begin)
                    is_first = False
                found[choice["index"]] += piece
                reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
            n_events += 1
            if n_events == most:
                return None
        assert is_done, "the stream ended before [DONE]"
    return list(zip(found, reasons, strict=True))


async def one_client(
    client: httpx.AsyncClient, bodies: list[tuple[str, dict[str, Any]]], source: random.Random, end: float, seen: Seen
) -> None:
    while time.monotonic() < end:
        number, what = source.randrange(len(bodies)), source.random()
        path, body = bodies[number]
        if what < 0.05:
            answer = await client.post(
                path, content=source.choice(BROKEN), headers={"Content-Type": "application/json"}
            )
            assert answer.status_code == 400 and answer.json()["error"]["message"]
            seen.counts["malformed"] += 1
        elif what < 0.15:
            task = asyncio.create_task(client.post(path, json=body))
            await asyncio.sleep(source.random() * 0.05)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            seen.counts["cancelled"] += 1
        elif what < 0.6:
            found = await streamed(client, path, body, source.randint(1, 5) if what < 0.25 else 0, seen)
            if isinstance(found, httpx.Response):
                assert found.status_code == 429
                seen.counts["busy"] += 1
            elif found is None:
                seen.counts["went away"] += 1
            else:
                seen.check(number, found)
        else:
            answer = await client.post(path, json=body)
            assert answer.status_code in (200, 429), answer.text
            if answer.status_code == 200:
                seen.check(number, texts(answer.json()["choices"]))
            else:
                seen.counts["busy"] += 1


async def traffic(server: RunningServer, bodies: list[tuple[str, dict[str, Any]]], seconds: float, seen: Seen) -> None:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=CLIENTS)
    end = time.monotonic() + seconds
    async with httpx.AsyncClient(base_url=server.url, timeout=None, limits=limits) as client:
        numbers = range(CLIENTS)
        await asyncio.gather(*(one_client(client, bodies, random.Random(number), end, seen) for number in numbers))


def resident_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


@pytest.mark.slow
@pytest.mark.timeout(2 * SECONDS + 900)
def test_every_answer_is_the_one_alone() -> None:
    folder, tokenizer = builtin_checkpoint()
    llm = Llama.build(folder, tokenizer, MAX_SEQ_LEN, ROWS, device="cpu", cache_tokens=CACHE_TOKENS)
    source = random.Random(5)
    bodies = [new_body(source) for _ in range(KINDS)]
    with running_server(llm, ServerSettings(max_queue=2 * CLIENTS)) as server:
        with httpx.Client(base_url=server.url, timeout=None) as client:
            alone = [texts(client.post(path, json=body).json()["choices"]) for path, body in bodies]
        seen, later = Seen(alone), Seen(alone)
        asyncio.run(traffic(server, bodies, SECONDS / 3, seen))
        server.wait_until_idle()
        before = resident_bytes()
        asyncio.run(traffic(server, bodies, SECONDS * 2 / 3, later))
        server.wait_until_idle()
        grown = resident_bytes() - before
        stats = server.engine.stats
    first = later.first_seconds
    print(f"\n{dict(seen.counts + later.counts)}, {stats}")
    print(f"first text: p50 {percentile(first, 50):.3f} s, p99 {percentile(first, 99):.3f} s; {grown / 2**20:+.1f} MiB")
    # On the slowest machine each client does one thing in each part, and nothing need be put back.
    assert seen.counts["answers"] > CLIENTS / 2 and not stats.used_pages
    assert stats.preemptions > 0 or SECONDS < 60
    assert all((seen.counts + later.counts)[name] for name in ("malformed", "cancelled", "went away"))
    assert grown < GROWTH_BYTES
