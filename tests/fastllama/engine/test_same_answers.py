"""The same answer whatever else is in the batch: in any order, with preemption, cancellation and reused prefixes."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from fastllama import Llama, SamplingParams
from fastllama.decode_graph import Decoder
from fastllama.engine import Engine, Request
from fastllama.engine.stats import Stats
from tests.fastllama.engine.llamas import assert_as_alone, engine_llama, is_near_tie, logits_of
from tests.support.fake_graph import RecordedGraph
from tests.support.tiers import parameters

CACHE_TOKENS = 6 * 64  # less than two rows of 256


class AheadDecoder(Decoder):
    """Enqueues steps ahead of the output that is read, as on a GPU."""

    @property
    def replays_ahead(self) -> int:
        return 2


def recorded(llm: Llama, unroll: int = 1) -> Decoder:
    return AheadDecoder(llm.model, new_graph=RecordedGraph, unroll=unroll)


DECODERS: dict[str, tuple[str, Callable[[Llama], Decoder]]] = {
    "native": ("native", lambda llm: llm.decoder),
    "native-ahead": ("native", lambda llm: AheadDecoder(llm.model)),
    "reference": ("reference", lambda llm: llm.decoder),
    "reference-ahead-unroll-3": ("reference", lambda llm: AheadDecoder(llm.model, unroll=3)),
    "reference-graphs-ahead": ("reference", recorded),
    "reference-graphs-ahead-unroll-2": ("reference", lambda llm: recorded(llm, unroll=2)),
}
QUICK = {"native", "native-ahead", "reference-ahead-unroll-3", "reference-graphs-ahead"}


def random_request(source: random.Random) -> tuple[list[int], SamplingParams]:
    stem = [source.choice([3, 4])] * source.choice([0, 0, 0, 70, 130])
    prompt = stem + [source.randrange(320) for _ in range(source.randint(1, 150 - len(stem)))]
    greedy = source.random() < 0.4
    return prompt, SamplingParams(
        max_gen_len=source.choice([0, 1, 5, 30, 90, 100, None]),
        temperature=0.0 if greedy else source.choice([0.6, 1.0, 1.5]),
        top_p=source.choice([0.5, 0.9, 1.0]),
        seed=source.randrange(2**32),
        n=source.choice([1, 1, 1, 2]),
        stop_token_ids=tuple(source.sample(range(576), source.choice([0, 0, 2, 8]))),
        logprobs=0,
    )


def run_traffic(engine: Engine, count: int, seed: int) -> tuple[list[Request], Stats]:
    """Submit at random steps, cancel some -> the requests and the engine's counts."""
    source, requests = random.Random(seed), list[Request]()
    while len(requests) < count or not all(request.is_finished for request in requests):
        if len(requests) < count and source.random() < 0.4:
            for _ in range(min(source.randint(1, 4), count - len(requests))):
                requests.append(engine.submit(*random_request(source)))
        if requests and source.random() < 0.02:
            source.choice(requests).cancel()
        engine.step()
    return requests, engine.stats


@pytest.mark.parametrize("kind", parameters({name: name for name in DECODERS}, quick=QUICK))
def test_answers_are_those_of_each_request_alone(tmp_path: Path, kind: str) -> None:
    backend, decoder_of = DECODERS[kind]
    llm = engine_llama(tmp_path, backend=backend, cache_tokens=CACHE_TOKENS)
    usual = llm.decoder
    llm.decoder = decoder_of(llm)
    count = 40 if backend == "native" else 20
    requests, stats = run_traffic(llm.engine(max_tokens_per_step=48), count, seed=11)
    assert stats.preemptions > 0 and stats.cached_tokens > 0 and stats.used_pages == 0
    llm.decoder = usual
    ties = ended = 0
    for request in requests:
        result = request.result()
        if result.answer.finish_reason == "cancelled":
            continue
        ended += 1
        ties += assert_as_alone(llm, result, request.params)
    assert ended >= 0.7 * count and ties <= 1, f"{ties} near-ties"


def test_a_near_tie_is_told_from_a_wrong_token(tmp_path: Path) -> None:
    llm = engine_llama(tmp_path, backend="reference")
    first, second = logits_of(llm, [5, 6, 7])[-1].topk(2).indices.tolist()
    greedy = SamplingParams(temperature=0, seed=1)
    assert not is_near_tie(llm, [5, 6, 7], first, second, greedy)
    assert is_near_tie(llm, [5, 6, 7], first, first, greedy)
    weight = llm.model.state_dict()
    weight["output.weight"][second] = weight["output.weight"][first]
    llm.model.load_state_dict(weight)
    assert is_near_tie(llm, [5, 6, 7], first, second, greedy)
    drawn = SamplingParams(temperature=1.0, top_p=1.0, seed=1)
    assert not is_near_tie(llm, [5, 6, 7], 1, 2, drawn)
