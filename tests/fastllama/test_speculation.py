"""Steps that check guesses give the tokens of single steps, whatever is guessed, on every backend."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fastllama import Llama
from fastllama.decode_graph import Decoder
from fastllama.kernels.decode_state import DecodeState
from fastllama.kernels.guesses import MAX_GUESSES
from fastllama.speculation import Guesser, LookupGuesser
from fastllama.stream import NotFiniteError
from tests.support.fake_graph import RecordedGraph
from tests.support.tiers import parameters
from tests.support.tiny import MAX_BATCH_SIZE, tiny_llama

PROMPTS = [[5, 6, 7, 5, 6], [9], [3, 4, 3, 4, 3, 4, 3], [20 + n % 5 for n in range(17)]]
CALLS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.6, "top_p": 0.9, "seed": 4},
    {"temperature": 2.0, "top_p": 1.0, "seed": 2},
]
LENGTH = 28


class FixedGuesser(LookupGuesser):
    """Guesses the tokens of these answers, except every `wrong`-th."""

    def __init__(self, llm: Llama, answers: Sequence[Sequence[int]], wrong: int) -> None:
        super().__init__(llm.model)
        known = [[*prompt, *answer] for prompt, answer in zip(PROMPTS, answers, strict=False)]
        self.tokens = torch.zeros(MAX_BATCH_SIZE, 200, dtype=torch.int64)
        for row, tokens in enumerate(known):
            self.tokens[row, : len(tokens)] = torch.tensor(tokens)
        if wrong:
            self.tokens[:, ::wrong] = (self.tokens[:, ::wrong] + 1) % llm.model.vocab_size

    def guess(self, state: DecodeState, n_guesses: int, lengths: Sequence[int] | None) -> None:
        assert state.guesses is not None
        places = (state.positions[:, None] + 1 + torch.arange(MAX_GUESSES)).clamp(min=0)
        state.guesses.tokens.copy_(self.tokens[: len(places)].gather(1, places))
        state.guesses.matched.fill_(3)


@pytest.fixture(scope="module", params=["reference", "native"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return tiny_llama(tmp_path_factory.mktemp("tiny"), backend=request.param)


@pytest.fixture(autouse=True)
def plain_decoder(llm: Llama) -> None:
    llm.tokenizer.stop_tokens = set()
    llm.decoder = Decoder(llm.model)


def answers(llm: Llama, prompts: Sequence[Sequence[int]] = PROMPTS, n: int = LENGTH, **call: Any) -> Any:
    return llm.generate(prompts, n, logprobs=True, **call)


def assert_same(found: Any, expected: Any) -> None:
    assert found[0] == expected[0]
    for row, wanted in zip(found[1], expected[1], strict=True):
        assert row == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("call", CALLS, ids=["greedy", "temperature 0.6", "temperature 2"])
@pytest.mark.parametrize("n_guesses", parameters({str(n): n for n in (1, 3, MAX_GUESSES, None)}, quick=("3", "None")))
def test_lookup_gives_the_same_tokens(llm: Llama, n_guesses: int | None, call: dict[str, Any]) -> None:
    for n_rows in (1, 2, 4):
        expected = answers(llm, PROMPTS[:n_rows], **call)
        decoder = Decoder(llm.model, guesser=LookupGuesser(llm.model), n_guesses=n_guesses)
        llm.decoder, plain = decoder, llm.decoder
        assert_same(answers(llm, PROMPTS[:n_rows], **call), expected)
        llm.decoder = plain
        stats = decoder.control.stats
        assert stats.tokens == stats.steps + stats.accepted == n_rows * LENGTH


# Every how-many-th guess is wrong, 0 if none is, and the number of guesses.
WRONG = {f"{wrong}-{n_guesses}": (wrong, n_guesses) for wrong, n_guesses in ((0, 3), (0, 15), (2, 3), (3, 4), (1, 3))}


@pytest.mark.parametrize("call", CALLS, ids=["greedy", "temperature 0.6", "temperature 2"])
@pytest.mark.parametrize("case", parameters(WRONG, quick=("0-3", "2-3", "1-3")))
def test_all_some_or_no_guesses_are_accepted(llm: Llama, case: tuple[int, int], call: dict[str, Any]) -> None:
    wrong, n_guesses = case
    expected = answers(llm, **call)
    guesser = FixedGuesser(llm, expected[0], wrong)
    llm.decoder = decoder = Decoder(llm.model, graphs=False, guesser=guesser, n_guesses=n_guesses)
    assert_same(answers(llm, **call), expected)
    stats = decoder.control.stats
    if wrong == 0:  # the first token comes from the prefill
        assert stats.steps == len(PROMPTS) * (1 + -(-(LENGTH - 1) // (n_guesses + 1)))
    if wrong == 1:
        assert stats.accepted == 0 and stats.steps == len(PROMPTS) * LENGTH


def test_stop_tokens_end_a_row_within_the_accepted_run(llm: Llama) -> None:
    free = answers(llm, temperature=0.0)
    llm.tokenizer.stop_tokens = {free[0][0][9], free[0][2][4]}
    expected = answers(llm, temperature=0.0)
    assert {len(row) for row in expected[0]} != {LENGTH}
    for n_guesses in (2, 6, 15):
        guesser = FixedGuesser(llm, free[0], 0)
        llm.decoder = Decoder(llm.model, graphs=False, guesser=guesser, n_guesses=n_guesses)
        assert_same(answers(llm, temperature=0.0), expected)


def test_a_row_never_goes_beyond_its_budget_or_the_cache(llm: Llama) -> None:
    for n in (0, 1, 2, 5, 1000):
        llm.decoder = Decoder(llm.model)
        expected = answers(llm, n=n, temperature=0.0)
        for n_guesses in (1, 15):
            guesser = FixedGuesser(llm, expected[0], 0)
            llm.decoder = Decoder(llm.model, graphs=False, guesser=guesser, n_guesses=n_guesses)
            assert_same(answers(llm, n=n, temperature=0.0), expected)


def test_keys_of_rejected_guesses_are_never_read(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """All positions after a row's newest token hold NaN before each step, and the answers are the same."""
    expected = answers(llm, temperature=0.0)
    decoder = Decoder(llm.model, graphs=False, guesser=FixedGuesser(llm, expected[0], 3), n_guesses=4)
    enqueue = decoder.enqueue_steps
    poisoned: list[int] = []

    def poison() -> None:
        cache = llm.model.cache
        for row, position in enumerate(decoder.state.positions.tolist()):
            if position >= 0:
                for at in range(position, cache.length):
                    page = cache.table[row, at // 64]
                    cache.k[:, page, :, at % 64] = torch.nan
                    cache.v[:, page, :, at % 64] = torch.nan
                poisoned.append(row)
        enqueue()

    monkeypatch.setattr(decoder, "enqueue_steps", poison)
    llm.decoder = decoder
    assert_same(answers(llm, temperature=0.0), expected)
    assert len(poisoned) > len(PROMPTS)
    llm.model.cache.k.zero_(), llm.model.cache.v.zero_()


@pytest.mark.parametrize("n_guesses", [3, None])
def test_steps_queued_ahead_and_replayed_give_the_same(
    llm: Llama, n_guesses: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [answers(llm, **call) for call in CALLS]
    monkeypatch.setattr(Decoder, "replays_ahead", 2)
    # A stand-in for CUDA's graph records operations of torch; the native backend has its own graphs.
    for new_graph in (None, RecordedGraph) if llm.model.backend == "reference" else (None,):
        guesser = LookupGuesser(llm.model)
        llm.decoder = Decoder(llm.model, new_graph=new_graph, guesser=guesser, n_guesses=n_guesses)
        for call, wanted in zip(CALLS, expected, strict=True):
            assert_same(answers(llm, **call), wanted)


def test_a_stream_brings_several_tokens_at_once(llm: Llama) -> None:
    expected = answers(llm, PROMPTS[:1], temperature=0.0)[0][0]
    guesser = FixedGuesser(llm, [expected], 0)
    llm.decoder = Decoder(llm.model, graphs=False, guesser=guesser, n_guesses=4)
    pieces = [one.tokens for one in llm.stream(PROMPTS[:1], LENGTH, temperature=0.0)]
    assert [token for piece in pieces for token in piece] == expected
    assert [len(piece) for piece in pieces] == [1, 5, 5, 5, 5, 5, 2]


def test_echo_brings_the_same_log_probabilities(llm: Llama) -> None:
    expected = answers(llm, temperature=0.0, echo=True)
    llm.decoder = Decoder(llm.model, guesser=LookupGuesser(llm.model), n_guesses=3)
    assert_same(answers(llm, temperature=0.0, echo=True), expected)


def test_logits_that_are_not_numbers_end_the_call_after_the_tokens_before(llm: Llama, tmp_path: Path) -> None:
    expected = answers(llm, PROMPTS[:1], temperature=0.0)[0][0]
    guesser: Guesser = FixedGuesser(llm, [expected], 0)
    llm.decoder = decoder = Decoder(llm.model, graphs=False, guesser=guesser, n_guesses=4)
    accept = llm.model.ops.accept
    calls: list[None] = []

    def broken(state: DecodeState, drawn: torch.Tensor, logprobs: torch.Tensor) -> None:
        calls.append(None)
        if len(calls) == 3:
            drawn = drawn.clone()
            drawn[2] = -1
        accept(state, drawn, logprobs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm.model.ops, "accept", broken)
        found: list[int] = []
        with pytest.raises(NotFiniteError, match="row 0 are not finite numbers at step 8"):
            for one in llm.stream(PROMPTS[:1], LENGTH, temperature=0.0):
                found += one.tokens
    assert found == expected[:8]
    assert decoder is llm.decoder and answers(llm, PROMPTS[:1], temperature=0.0)[0][0] == expected


def test_a_decoder_refuses_several_steps_a_replay(llm: Llama) -> None:
    with pytest.raises(ValueError, match="unroll must be 1 for steps that check guesses, got 2"):
        Decoder(llm.model, unroll=2, guesser=LookupGuesser(llm.model))
