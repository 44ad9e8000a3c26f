"""A draft model never changes an answer, whatever it guesses, on every backend, through the public interface."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fastllama import Llama, SamplingParams
from fastllama.draft import DraftGuesser
from fastllama.engine import Grammar
from fastllama.memory_plan import DoesNotFit
from tests.fastllama.engine.test_same_answers import AheadDecoder
from tests.fastllama.test_speculation import CALLS, LENGTH, PROMPTS, assert_same
from tests.support.checkpoints import random_weights, tiny_params, write_meta, write_tokenizer
from tests.support.tiers import parameters
from tests.support.tiny import MAX_BATCH_SIZE, MAX_SEQ_LEN

# Each draft model by the changes of the target's sizes, and the seed of its weights; the target's is 7.
DRAFTS: dict[str, tuple[dict[str, Any], int]] = {
    "itself": ({}, 7),
    "nonsense": ({"n_layers": 1, "dim": 32, "n_heads": 2, "n_kv_heads": 1}, 3),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = {}
    for name, (changes, seed) in DRAFTS.items():
        folder, fields = tmp_path_factory.mktemp("draft"), tiny_params(**changes)
        write_meta(folder, fields, random_weights(fields, seed=seed))
        write_tokenizer(folder)
        found[name] = str(folder)
    return found


@pytest.fixture(scope="module", params=parameters({"reference": "reference", "native": "native"}, quick=("native",)))
def plain(request: pytest.FixtureRequest, folders: dict[str, str]) -> Llama:
    return build(folders, backend=request.param)


def build(folders: dict[str, str], draft: str | None = None, **options: Any) -> Llama:
    llm = Llama.build(
        folders["itself"],
        None,
        MAX_SEQ_LEN,
        MAX_BATCH_SIZE,
        seed=1,
        device="cpu",
        draft=draft and folders[draft],
        **options,
    )
    llm.tokenizer.stop_tokens = set()
    return llm


@pytest.mark.parametrize("n_guesses", parameters({"1": 1, "4": 4, "15": 15, "auto": "auto"}, ("4",)))
@pytest.mark.parametrize("draft", DRAFTS)
def test_a_draft_model_gives_the_same_tokens(
    plain: Llama, folders: dict[str, str], draft: str, n_guesses: int | str
) -> None:
    llm = build(folders, draft, n_guesses=n_guesses, backend=plain.model.backend)
    if n_guesses == "auto":  # as if the draft model were small
        llm.decoder.control.guess_cost, llm.decoder.control.measures = 0.05, False
    for call in CALLS:
        for n_rows in (1, 2, 4):
            prompts, kinds = PROMPTS[:n_rows], {"logprobs": True, **call}
            assert_same(llm.generate(prompts, LENGTH, **kinds), plain.generate(prompts, LENGTH, **kinds))
    stats = llm.speculation
    assert stats is not None and stats.tokens == stats.steps + stats.accepted == 3 * 7 * LENGTH
    if isinstance(n_guesses, int) and draft == "itself":
        # Guesses beyond a row's last position are not checked, but counted.
        # The first step of a row has no guesses, and the last may have fewer.
        steps = 2 + -(-(LENGTH - 2) // (n_guesses + 1))
        assert stats.steps == 3 * 7 * steps, "all guesses are right"
    if draft == "nonsense":
        assert stats.checked > 0 and stats.acceptance < 0.1
    else:
        assert stats.acceptance > 0.5, "guesses beyond a row's last position are counted as wrong"


def test_a_draft_model_reads_the_prompt_and_every_token(folders: dict[str, str]) -> None:
    """Its keys are those of the same tokens computed in one pass."""
    for n_guesses in (1, 5):
        llm = build(folders, "itself", n_guesses=n_guesses)
        tokens = llm.generate(PROMPTS[:2], LENGTH, temperature=0)[0]
        guesser = llm.decoder.guesser
        assert isinstance(guesser, DraftGuesser)
        ours, target = guesser.draft.cache, llm.model.cache
        assert ours.table is target.table and ours.pool is target.pool and ours.k is not target.k
        for row, n in enumerate(len(prompt) + LENGTH - 2 for prompt in PROMPTS[:2]):
            page = int(target.table[row, 0])
            torch.testing.assert_close(ours.k[:, page, :, :n], target.k[:, page, :, :n], atol=1e-5, rtol=1e-4)
        assert len(tokens[0]) == LENGTH


def test_a_draft_model_catches_up_after_steps_without_guesses(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps with guesses come after 1, 2 and 20 without; then all guesses are right again."""
    for gap in (1, 2, 20):
        llm = build(folders, "itself")
        chosen = iter([0] * gap + [3] * 100)
        monkeypatch.setattr(llm.decoder.control, "choose", lambda n_rows, chosen=chosen: next(chosen))
        llm.generate(PROMPTS[:3], 38 if gap == 20 else LENGTH, temperature=0)
        stats = llm.speculation
        assert stats is not None and stats.checked > 0 and stats.accepted / stats.checked > 0.7
        n_steps = stats.steps / 3 - gap - 2
        assert stats.accepted / 3 >= 3 * (n_steps - 1)


def test_prompts_found_in_the_cache_are_there_for_both_models(folders: dict[str, str]) -> None:
    llm = Llama.build(folders["itself"], None, 256, 2, device="cpu", draft=folders["itself"], n_guesses=3)
    llm.tokenizer.stop_tokens = set()
    prompt = [5 + n % 40 for n in range(130)]
    counts = []
    for _ in range(2):
        before = llm.speculation
        list(llm.stream([prompt], 40, temperature=0, reuse_prefix=True))
        after = llm.speculation
        assert before is not None and after is not None
        counts.append(after - before)
    assert counts[0].steps == counts[1].steps == 2 + 10 and counts[1].accepted == counts[0].accepted


@pytest.mark.parametrize("in_engine", [False, True])
def test_a_draft_model_reads_answers_that_were_made_without_it(
    folders: dict[str, str], in_engine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second prompt is the first with its answer, which is in the cache. No step of the first checked guesses."""
    llm = Llama.build(folders["itself"], None, 400, 2, device="cpu", draft=folders["itself"], n_guesses=3)
    llm.tokenizer.stop_tokens = set()

    def answer(prompt: list[int]) -> list[int]:
        if in_engine:
            params = SamplingParams(temperature=0, max_gen_len=150, ignore_eos=True)
            return next(llm.generate_many([prompt], params, progress=False)).answer.tokens
        return [token for one in llm.stream([prompt], 150, temperature=0, reuse_prefix=True) for token in one.tokens]

    with monkeypatch.context() as patch:
        patch.setattr(llm.decoder.control, "choose", lambda n_rows: 0)
        prompt = [5, 6, 7]
        prompt += answer(prompt)
    before = llm.speculation
    answer(prompt)
    after = llm.speculation
    assert before is not None and after is not None and before.checked == 0 and (after - before).acceptance > 0.9


def test_a_draft_model_reads_answers_that_followed_a_grammar_beside_others(folders: dict[str, str]) -> None:
    """A row with a grammar takes no part in the steps ahead, with guesses, of the other row."""
    llm = Llama.build(folders["itself"], None, 400, 2, device="cpu", draft=folders["itself"], n_guesses=3)
    llm.tokenizer.stop_tokens = set()
    assert llm.decoder.guesser is not None
    llm.decoder = AheadDecoder(llm.model, guesser=llm.decoder.guesser, n_guesses=3)
    engine, prompt = llm.engine(), [5 + place % 40 for place in range(100)]
    free = SamplingParams(temperature=0, max_gen_len=390, ignore_eos=True)
    beside = engine.submit([9, 8], free)
    while not beside.partial.answer.tokens:
        engine.step()
    guided = SamplingParams(temperature=0, max_gen_len=30, grammar=Grammar.lark("start: /[a-z ]{200,300}/"))
    prompt += engine.submit(prompt, guided).result().answer.tokens
    assert not beside.is_finished
    beside.cancel()
    engine.run()
    before = llm.speculation
    found = engine.submit(prompt, SamplingParams(seed=1, max_gen_len=100, ignore_eos=True)).result()
    after = llm.speculation
    assert before is not None and after is not None and before.checked > 0 and found.cached_tokens == 128
    assert (after - before).acceptance > 0.9


@pytest.mark.parametrize(
    "options",
    parameters(
        {
            "itself-3": {"draft": "itself", "n_guesses": 3},
            "lookup": {"speculate": "lookup"},
            "nonsense": {"draft": "nonsense"},
            "itself": {"draft": "itself"},
        },
        quick=("itself-3", "nonsense"),
    ),
)
def test_the_engine_gives_the_same_answers(plain: Llama, folders: dict[str, str], options: dict[str, Any]) -> None:
    """Many requests of every kind on few rows, with sampling controls and log-probabilities among them."""
    llm = build(folders, backend=plain.model.backend, **options)
    prompts = [[5 + (n * k) % 9 for k in range(1 + n % 7)] for n in range(14)]
    params = [
        SamplingParams(
            temperature=(0.0, 0.7, 2.0)[n % 3],
            seed=n,
            max_gen_len=3 + 5 * (n % 5),
            logprobs=1 if n % 4 == 0 else None,
            repetition_penalty=1.3 if n % 5 == 0 else 1.0,
            stop_token_ids=[9] if n % 6 == 0 else [],
            stop=["a", "xy"] if n % 3 == 1 else [],
            ignore_eos=True,
        )
        for n in range(14)
    ]
    expected = [result.answers for result in plain.generate_many(prompts, params, progress=False)]
    assert any(isinstance(one.stop_reason, str) for answers in expected for one in answers)
    found = [result.answers for result in llm.generate_many(prompts, params, progress=False)]
    for ours, wanted in zip(found, expected, strict=True):
        assert [(one.tokens, one.finish_reason, one.stop_reason) for one in ours] == [
            (one.tokens, one.finish_reason, one.stop_reason) for one in wanted
        ]
        for one, other in zip(ours, wanted, strict=True):
            assert (one.logprobs or []) == pytest.approx(other.logprobs or [], abs=1e-4)
    stats = llm.speculation
    ended = [one for answers in found for one in answers]
    # Stop tokens are not in the answers. What a step made after a stop string is counted, and not in the answers.
    least = sum(len(one.tokens) + isinstance(one.stop_reason, int) for one in ended)
    assert stats is not None and least <= stats.tokens < least + 3 * len(ended)
    if options.get("n_guesses"):
        assert stats.accepted > 0


@pytest.mark.parametrize("n_guesses", [4, 15])
def test_a_draft_model_guesses_as_well_in_the_engine(folders: dict[str, str], n_guesses: int) -> None:
    """Over several pages, of which each row gets one when it needs it: also for what the draft model writes ahead."""
    sizes: Any = (folders["itself"], None, 400, 4)
    llm = Llama.build(*sizes, device="cpu", draft=folders["itself"], n_guesses=n_guesses)
    params = [SamplingParams(temperature=0.9, max_gen_len=300, ignore_eos=True, seed=n) for n in range(4)]
    for _ in llm.generate_many([[5, 6, n + 7] for n in range(4)], params, progress=False):
        pass
    stats = llm.speculation
    assert stats is not None and stats.acceptance > 0.9


def test_a_draft_model_follows_the_model_to_another_dtype(folders: dict[str, str]) -> None:
    plain, llm = build(folders), build(folders, "itself", n_guesses=3)
    for one in (plain, llm):
        one.generate(PROMPTS[:1], 2, temperature=0)
        one.model.to(torch.bfloat16)
    assert llm.generate(PROMPTS[:1], LENGTH, temperature=0) == plain.generate(PROMPTS[:1], LENGTH, temperature=0)
    stats = llm.speculation
    assert stats is not None and stats.accepted > 0.7 * stats.checked


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_quantised_weights_give_the_same_tokens(folders: dict[str, str], quantize: str) -> None:
    plain = build(folders, quantize=quantize)
    for options in ({"speculate": "lookup"}, {"draft": "itself", "n_guesses": 5}):
        llm = build(folders, quantize=quantize, **options)
        assert llm.model.schemes
        for call in CALLS:
            kinds = {"logprobs": True, **call}
            assert_same(llm.generate(PROMPTS, LENGTH, **kinds), plain.generate(PROMPTS, LENGTH, **kinds))


def test_an_engine_on_few_pages_gives_the_same_answers(plain: Llama, folders: dict[str, str]) -> None:
    """Answers that are put back and computed again, with guesses in flight."""

    def few_pages(**options: Any) -> Llama:
        how: dict[str, Any] = {"device": "cpu", "cache_tokens": 320, "backend": plain.model.backend, **options}
        return Llama.build(folders["itself"], None, 256, 3, **how)

    prompts, params = [[5, 6, 7, 5, 6], [9] * 60, [4] * 30], SamplingParams(temperature=0, ignore_eos=True)
    expected = [one.answer.tokens for one in few_pages().generate_many(prompts, params, progress=False)]
    for llm in (few_pages(speculate="lookup", n_guesses=15), few_pages(draft=folders["itself"], n_guesses=7)):
        engine = llm.engine()
        requests = [engine.submit(prompt, params) for prompt in prompts]
        engine.run()
        assert [one.result().answer.tokens for one in requests] == expected
        assert engine.stats.preemptions > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speculate": "guess"}, 'speculate must be "lookup", "draft" or None, got \'guess\''),
        (
            {"speculate": "draft"},
            'speculate="draft" needs a draft model: name its checkpoint in draft, or use "lookup"',
        ),
        ({"speculate": "lookup", "draft": "x"}, 'speculate="lookup" uses no draft model: leave draft out'),
        ({"speculate": "lookup", "n_guesses": 16}, 'n_guesses must be "auto" or a whole number from 1 to 15, got 16'),
        ({"speculate": "lookup", "n_guesses": "few"}, "n_guesses must be .* got 'few'"),
        ({"speculate": "lookup", "n_guesses": True}, "n_guesses must be .* got True"),
        ({"n_guesses": 4}, 'n_guesses=4 needs speculate="lookup", or a draft model'),
        ({"draft": 3}, "draft must be a path, got 3"),
        ({"draft": "/nowhere"}, "the draft model /nowhere: "),
    ],
)
def test_wrong_options_are_refused(folders: dict[str, str], options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, AssertionError), match=message):
        Llama.build(folders["itself"], None, 8, 2, device="cpu", **options)


def test_another_vocabulary_is_refused_with_its_first_difference(folders: dict[str, str], tmp_path: Path) -> None:
    fields = tiny_params()
    write_meta(tmp_path, fields, random_weights(fields))
    write_tokenizer(tmp_path, swapped=(300, 301))
    message = (
        r"the draft model .*: its vocabulary is another one: token 300 is '.+' for the model and '.+' for the draft"
    )
    with pytest.raises(ValueError, match=message):
        Llama.build(folders["itself"], None, 8, 2, device="cpu", draft=str(tmp_path))


def test_the_memory_of_both_models_is_planned(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastllama.memory_plan.free_memory", lambda device: 4_000_000)
    with pytest.raises(DoesNotFit, match=r"are free .* beside the draft model's \d+\.\d\d GiB"):
        build(folders, "itself")
