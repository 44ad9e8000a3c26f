"""What a service tells: its fingerprint, when a full queue should be asked again, and what it has counted."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from fastllama import Engine, Llama, builtin_checkpoint
from fastllama.engine.request import Times
from fastllama.openai_api.envelope import ServedModel
from fastllama.openai_api.requests import completion_request
from fastllama.server.fingerprint import fingerprint
from fastllama.server.service import Service
from fastllama.server.settings import ServerSettings
from tests.fastllama.server.conftest import ROWS
from tests.support.remote_engines import connected
from tests.support.timeouts import wait_until

ENOUGH = 5  # tokens


def built(max_seq_len: int = 256, rows: int = ROWS, **options: Any) -> Llama:
    return Llama.build(*builtin_checkpoint(), max_seq_len, rows, device="cpu", **options)


def test_a_fingerprint_does_not_depend_on_limits(llm: Llama) -> None:
    assert fingerprint(llm) == fingerprint(llm)
    assert fingerprint(built()) == fingerprint(llm) == fingerprint(built(64, 2))


def test_a_fingerprint_depends_on_precision_and_backend(llm: Llama) -> None:
    others = [built(dtype="bfloat16"), built(backend="reference")]
    others += [built(quantize=choice) for choice in ("int8", "int4", "fp8")]
    assert len({fingerprint(one) for one in [llm, *others]}) == len(others) + 1


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_a_fingerprint_depends_on_each_weight(quantize: str | None) -> None:
    """As for an adapter, which changes a few of them, and a little."""
    changed = built(quantize=quantize)
    found = {fingerprint(changed)}
    weights = list(changed.model.packed_weights())
    for weight in weights:
        value = getattr(weight.owner, weight.attribute)
        with torch.no_grad():
            (value.scales if hasattr(value, "scales") else value).mul_(1.01)
        found.add(fingerprint(changed))
    assert len(found) == len(weights) + 1 > 20


@pytest.mark.parametrize("scale", [-3.0, 1.001])
def test_a_fingerprint_depends_on_the_weights_alone(llm: Llama, scale: float) -> None:
    """The shape is the same."""
    changed = built()
    with torch.no_grad():
        for parameter in changed.model.parameters():
            parameter.mul_(scale)
    assert fingerprint(changed) != fingerprint(llm)


@pytest.mark.parametrize(("n_answers", "seconds"), [(1, 8.0), (ROWS, 8.0), (2 * ROWS, 4.0)])
def test_the_time_of_an_answer_holds_no_wait(
    llm: Llama, n_answers: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that waited for long and ran for eight seconds: for the queue only the latter counts."""
    with llm.engine() as engine:
        service = Service(engine, ServedModel("served", llm.tokenizer), ServerSettings())
        monkeypatch.setattr(service.metrics, "note", lambda request: None)
        times = Times(arrival=0.0, first_token=1000.0, end=1008.0)
        request = SimpleNamespace(partial=SimpleNamespace(times=times), params=SimpleNamespace(n=n_answers))
        for _ in range(200):
            service._note(cast(Any, [request]))
        assert service._answer_seconds == pytest.approx(seconds)


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_client_that_leaves_has_cost_is_counted(llm: Llama, stream: bool) -> None:
    """An answer as one body has sent nothing when its client leaves."""
    most = 200
    body = {"prompt": [5, 6], "max_tokens": most, "ignore_eos": True, "stream": stream}

    async def leave(service: Service, engine: Engine) -> None:
        async with service.submitted(completion_request(body), is_quick=True):
            await asyncio.to_thread(wait_until, lambda: n_generated(engine) > ENOUGH)

    def n_generated(engine: Engine) -> int:
        return sum(len(one.partial.answer.tokens) for one in tuple(engine._core.requests.values()))

    def counted(service: Service, name: str, **labels: str) -> float:
        found = service.metrics.registry.get_sample_value(f"vllm:{name}_total", {"model_name": "served", **labels})
        return found or 0.0

    with llm.engine().start() as engine, connected(engine) as (_, remote):
        service = Service(remote, ServedModel("served", llm.tokenizer), ServerSettings())
        asyncio.run(leave(service, engine))
        wait_until(lambda: counted(service, "request_success", finished_reason="abort") == 1)
        assert ENOUGH < counted(service, "generation_tokens") < most
        assert counted(service, "prompt_tokens") == 2
