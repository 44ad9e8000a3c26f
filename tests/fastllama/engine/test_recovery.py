"""A request that breaks the engine's step ends alone: the answers of all others are those that they get alone."""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from fastllama import Engine, Llama, SamplingParams
from fastllama.engine import Request
from fastllama.kernels.batch import RaggedBatch
from tests.fastllama.engine.llamas import assert_as_alone, engine_llama
from tests.support.timeouts import HANG_SECONDS

PARAMS = SamplingParams(max_gen_len=12, temperature=1.0, seed=5, logprobs=0)
PROMPTS = [[5, number, *[7] * number] for number in range(9)]
CULPRIT = 4  # of the prompts
OWN_TOKEN = 444  # of the culprit
OTHERS = {2: 445, 8: 446}  # tokens of other prompts, which may be culprits, too
for _number, _token in {CULPRIT: OWN_TOKEN, **OTHERS}.items():
    PROMPTS[_number][0] = _token
PLANNED = "ArithmeticError: as planned"


@pytest.fixture(scope="module")
def plain_llm(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    """A model whose steps run op by op, so that an op can be replaced."""
    return engine_llama(tmp_path_factory.mktemp("plain"), backend="reference")


@pytest.fixture
def llm(plain_llm: Llama) -> Iterator[Llama]:
    plain_llm.model.cache.pool.forget()
    yield plain_llm
    plain_llm.model.check_idle()


def break_model(
    llm: Llama, monkeypatch: pytest.MonkeyPatch, breaks: Callable[[RaggedBatch], bool], error: Exception | None = None
) -> list[int]:
    """Let forward passes of some batches fail, after they have spoilt the cache -> their numbers of tokens."""
    failed: list[int] = []
    hidden = llm.model.hidden

    def breaking(batch: RaggedBatch) -> torch.Tensor:
        if not breaks(batch):
            return hidden(batch)
        llm.model.cache.k.fill_(torch.nan)
        llm.model.cache.v.fill_(torch.nan)
        llm.model.workspace.reset()
        failed.append(len(batch.tokens))
        raise error or ArithmeticError("as planned")

    monkeypatch.setattr(llm.model, "hidden", breaking)
    return failed


def ask_all(engine: Engine) -> list[Request]:
    requests = [engine.submit(prompt, PARAMS) for prompt in PROMPTS]
    engine.run()
    assert engine.stats[:3] == (0, 0, 0) and engine.failure is None
    assert engine.stats.finished_requests == len(requests)
    return requests


def assert_alone_but(llm: Llama, requests: Sequence[Request], culprits: Sequence[int], error: str) -> None:
    for number, request in enumerate(requests):
        answer = request.result().answer
        if number in culprits:
            assert (answer.finish_reason, answer.error) == ("error", error), number
        else:
            assert answer.finish_reason == "length" and answer.error is None, number
            assert not assert_as_alone(llm, request.result(), PARAMS)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ArithmeticError("as planned"), PLANNED),
        (MemoryError(), "DoesNotFit: out of memory: "),
        (RuntimeError("CPU: not enough memory"), "DoesNotFit: out of memory: "),
    ],
    ids=["an error", "no memory", "torch has no memory"],
)
def test_a_prompt_that_breaks_the_prefill_ends_alone(
    llm: Llama, monkeypatch: pytest.MonkeyPatch, error: Exception, text: str
) -> None:
    with monkeypatch.context() as patch:
        failed = break_model(llm, patch, lambda batch: OWN_TOKEN in batch.tokens.tolist(), error)
        requests = ask_all(llm.engine())
    answer = requests[CULPRIT].result().answer
    assert answer.error is not None and answer.error.startswith(text) and answer.tokens == []
    assert failed == [failed[0], len(PROMPTS[CULPRIT]) - 1], "once together, once alone"
    assert_alone_but(llm, requests, [CULPRIT], answer.error)


@pytest.mark.parametrize("at", [0, 2, 7])
def test_a_token_that_breaks_a_decode_step_ends_its_request(
    llm: Llama, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    prompt = PROMPTS[CULPRIT]
    tokens = [*prompt, *llm.generate([prompt], 12, 1.0, seed=[5])[0][0]]
    position = len(prompt) - 1 + at
    place = position, tokens[position]
    for other in PROMPTS:
        if other is not prompt:
            both = [*other, *llm.generate([other], 12, 1.0, seed=[5])[0][0]]
            assert not len(other) - 1 <= position < len(both) or both[position] != place[1], "only the culprit has it"

    def breaks(batch: RaggedBatch) -> bool:
        if any(segment.end - segment.begin > 1 for segment in batch.segments):
            return False
        return place in zip(batch.positions.tolist(), batch.tokens.tolist(), strict=True)

    with monkeypatch.context() as patch:
        failed = break_model(llm, patch, breaks)
        requests = ask_all(llm.engine())
    assert len(failed) == 2 and failed[0] > 1 == failed[1], "once together, once alone"
    assert requests[CULPRIT].result().answer.tokens == tokens[len(prompt) : len(prompt) + at]
    assert_alone_but(llm, requests, [CULPRIT], PLANNED)


def test_several_culprits_end_each_for_itself(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        own = {OWN_TOKEN, *OTHERS.values()}
        break_model(llm, patch, lambda batch: not own.isdisjoint(batch.tokens.tolist()))
        requests = ask_all(llm.engine())
    assert_alone_but(llm, requests, [CULPRIT, *OTHERS], PLANNED)


def test_culprits_that_come_one_after_another_leave_their_company_alone(
    llm: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is found by a failure of its own, and nobody else is part of it any more."""
    params = SamplingParams(max_gen_len=60, temperature=1.0, seed=5, logprobs=0)
    with monkeypatch.context() as patch:
        failed = break_model(llm, patch, lambda batch: OWN_TOKEN in batch.tokens.tolist())
        engine = llm.engine()
        requests = [engine.submit([5, number], params) for number in range(3)]
        broken = []
        for number in range(5):
            for _ in range(3):
                engine.step()
            broken.append(engine.submit([OWN_TOKEN, number], params))
            while not broken[-1].is_finished:
                engine.step()
            assert engine._core._suspects.most_together is None
        engine.run()
    assert len(failed) == 10, "each once together, once alone"
    assert [request.result().answer.error for request in broken] == [PLANNED] * 5
    for request in requests:
        assert request.result().answer.error is None
        assert_as_alone(llm, request.result(), params)


def test_company_that_does_not_fit_is_answered_in_smaller_company(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """As without memory for a step of all rows: nobody fails alone, so in the end all are answered."""
    with monkeypatch.context() as patch:
        failed = break_model(llm, patch, lambda batch: len(batch.segments) > 2, MemoryError())
        requests = ask_all(llm.engine())
    assert 0 < len(failed) <= 6
    assert_alone_but(llm, requests, [], "")


def test_scores_of_prompts_survive_a_failure(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_gen_len=4, temperature=0, prompt_logprobs=1, logprobs=1, echo=True)
    long = [[3, *range(20, 120)], [4, *range(30, 150)], [6, 7]]
    engine = llm.engine(max_tokens_per_step=40)
    expected = [engine.submit(prompt, params).result() for prompt in long]
    llm.model.cache.pool.forget()
    calls: list[int] = []
    with monkeypatch.context() as patch:
        break_model(llm, patch, lambda batch: calls.append(0) or len(calls) == 4)  # type: ignore[func-returns-value]
        running = engine.submit([9, 9], SamplingParams(max_gen_len=60, seed=1))
        requests = [engine.submit(prompt, params) for prompt in long]
        engine.run()
    assert running.result().answer.finish_reason == "length"
    for request, alone in zip(requests, expected, strict=True):
        found = request.result()
        assert (found.answer.tokens, found.answer.text) == (alone.answer.tokens, alone.answer.text)
        scores = [[score.logprob for score in one.prompt_scores or []] for one in (found, alone)]
        torch.testing.assert_close(torch.tensor(scores[0]), torch.tensor(scores[1]), atol=1e-5, rtol=0)
        assert len(found.answer.logprobs or []) == len(found.answer.tokens)


def test_no_page_from_before_a_failure_is_found_again(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, stem = llm.engine(), [11] * 150
    before = engine.submit([*stem, 1], PARAMS).result()
    with monkeypatch.context() as patch:
        break_model(llm, patch, lambda batch: OWN_TOKEN in batch.tokens.tolist())
        broken = engine.submit([*stem, OWN_TOKEN, 2], PARAMS).result()
    assert broken.answer.error == PLANNED and broken.cached_tokens == 0 < 128 == engine.stats.cached_tokens + 128
    again = [engine.submit([*stem, 1], PARAMS).result() for _ in range(2)]
    assert [one.cached_tokens for one in again] == [0, 128]
    assert [one.answer.tokens for one in again] == [before.answer.tokens] * 2
    assert_as_alone(llm, again[1], PARAMS)


@pytest.mark.parametrize("echo", [False, True])
def test_a_token_that_the_tokenizer_cannot_decode_ends_its_answer(
    llm: Llama, monkeypatch: pytest.MonkeyPatch, echo: bool
) -> None:
    params = SamplingParams(max_gen_len=12, temperature=1.0, seed=5, logprobs=0, n=2, echo=echo)
    engine = llm.engine()
    plain = [engine.submit(prompt, params).result() for prompt in PROMPTS]
    unknown = OWN_TOKEN if echo else plain[CULPRIT].answers[1].tokens[6]
    decode_bytes = llm.tokenizer.decode_bytes

    def decode(ids: Sequence[int]) -> bytes:
        if unknown in ids:
            raise KeyError(unknown)
        return decode_bytes(ids)

    with monkeypatch.context() as patch:
        patch.setattr(llm.tokenizer, "decode_bytes", decode)
        requests = [engine.submit(prompt, params) for prompt in PROMPTS]
        engine.run()
    assert engine.stats[:3] == (0, 0, 0) and engine.stats.preemptions == 0
    n_errors = 0
    for request, expected in zip(requests, plain, strict=True):
        fails = any(unknown in whole.tokens for whole in expected.answers)
        n_errors += fails
        for answer, whole in zip(request.result().answers, expected.answers, strict=True):
            if fails:
                assert (answer.finish_reason, answer.error) == ("error", f"KeyError: {unknown}")
                assert answer.tokens == whole.tokens[: len(answer.tokens)] and whole.text.startswith(answer.text)
                assert unknown not in answer.tokens
            else:
                assert (answer.tokens, answer.text, answer.error) == (whole.tokens, whole.text, None)
    assert n_errors >= 1


def test_threads_that_ask_and_cancel_while_steps_fail_lose_nothing(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    params = [
        SamplingParams(max_gen_len=8 + number, temperature=1.0, seed=number, n=1 + number % 2) for number in range(6)
    ]
    alone = [llm.generate([[5, number]], 8 + number, 1.0, seed=[number])[0][0] for number in range(6)]
    calls = itertools.count(1)
    requests: list[tuple[int, bool, Request]] = []

    def ask(engine: Engine, first: int) -> None:
        for number in (first, first + 1, first) * 4:
            request = engine.submit([5, number], params[number])
            is_cancelled = len(requests) % 5 == 0
            requests.append((number, is_cancelled, request))
            if is_cancelled:
                request.cancel()
            elif len(requests) % 2:
                request.result()

    with monkeypatch.context() as patch:
        failed = break_model(llm, patch, lambda batch: next(calls) % 29 == 0)
        with llm.engine().start() as engine:
            threads = [threading.Thread(target=ask, args=(engine, first)) for first in range(5)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(HANG_SECONDS)
                assert not thread.is_alive()
            results = [(number, is_cancelled, request.result()) for number, is_cancelled, request in requests]
        assert engine.failure is None and engine.stats[:3] == (0, 0, 0) and len(failed) > 1
    assert len(results) == 60 == engine.stats.finished_requests
    for number, is_cancelled, result in results:
        answer = result.answer
        assert answer.tokens == alone[number][: len(answer.tokens)]
        assert answer.finish_reason in (("cancelled", "length", "error") if is_cancelled else ("length", "error"))
        assert (answer.error == PLANNED) == (answer.finish_reason == "error")
        assert answer.finish_reason != "length" or answer.tokens == alone[number]


def test_a_model_whose_device_is_lost_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = engine_llama(tmp_path, backend="reference")
    engine = llm.engine()
    requests = [engine.submit(prompt, PARAMS) for prompt in PROMPTS[:3]]
    lost = torch.AcceleratorError("the device is lost")
    failed = break_model(llm, monkeypatch, lambda batch: True, lost)
    with pytest.raises(torch.AcceleratorError):
        engine.run()
    assert engine.failure is lost and len(failed) == 1
    assert all(request.error is lost for request in requests)
