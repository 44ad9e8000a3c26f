"""`generate` and the completion calls: budgets, stop tokens, echo, log-probabilities, seeds, independent rows."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastllama import Llama
from fastllama.generation import sample_top_p
from tests.support.comparisons import assert_same_logprobs
from tests.support.tiny import MAX_BATCH_SIZE, MAX_SEQ_LEN, tiny_llama

VOCAB_SIZE = 576
prompt_lists = st.lists(
    st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=MAX_SEQ_LEN), min_size=1, max_size=MAX_BATCH_SIZE
)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@given(prompts=prompt_lists, max_gen_len=st.integers(0, 20), seed=st.none() | st.integers(0, 2**64 - 1))
def test_rows_stay_within_their_budgets(
    llm: Llama, prompts: list[list[int]], max_gen_len: int, seed: int | None
) -> None:
    tokens, logprobs = llm.generate(prompts, max_gen_len, logprobs=True, seed=seed)
    assert logprobs is not None and len(tokens) == len(prompts)
    for prompt, row, scores in zip(prompts, tokens, logprobs, strict=True):
        assert len(row) <= min(max_gen_len, MAX_SEQ_LEN - len(prompt))
        assert len(scores) == len(row) and all(score <= 0 for score in scores)
        assert not set(row) & llm.tokenizer.stop_tokens
        if len(row) < min(max_gen_len, MAX_SEQ_LEN - len(prompt)):
            longer, _ = llm.generate([prompt], max_gen_len, seed=seed, echo=True) if seed is None else (None, None)
            assert longer is None or longer[0][: len(prompt)] == prompt or set(prompt) & llm.tokenizer.stop_tokens


@given(prompts=prompt_lists, temperature=st.sampled_from([0.0, 0.7, 2.0]), top_p=st.sampled_from([0.5, 0.9, 1.0]))
def test_a_row_is_the_same_alone_and_in_any_batch_and_order(
    llm: Llama, prompts: list[list[int]], temperature: float, top_p: float
) -> None:
    seeds = [101 + row for row in range(len(prompts))]
    together, scores = llm.generate(prompts, 8, temperature, top_p, logprobs=True, seed=seeds)
    backwards, _ = llm.generate(prompts[::-1], 8, temperature, top_p, seed=seeds[::-1])
    assert backwards == together[::-1]
    assert scores is not None
    for row, prompt in enumerate(prompts):
        alone, alone_scores = llm.generate([prompt], 8, temperature, top_p, logprobs=True, seed=[seeds[row]])
        assert alone[0] == together[row]
        assert_same_logprobs(alone_scores, [scores[row]])


@given(prompts=prompt_lists, short=st.integers(0, 6), more=st.integers(0, 6))
def test_a_shorter_generation_is_a_prefix(llm: Llama, prompts: list[list[int]], short: int, more: int) -> None:
    first, _ = llm.generate(prompts, short, temperature=1.0, seed=3)
    longer, _ = llm.generate(prompts, short + more, temperature=1.0, seed=3)
    assert first == [row[:short] for row in longer]


@given(prompts=prompt_lists, max_gen_len=st.integers(0, 6))
def test_echo_has_one_logprob_per_token(llm: Llama, prompts: list[list[int]], max_gen_len: int) -> None:
    plain, plain_scores = llm.generate(prompts, max_gen_len, temperature=0, logprobs=True)
    echoed, scores = llm.generate(prompts, max_gen_len, temperature=0, logprobs=True, echo=True)
    assert plain_scores is not None and scores is not None
    for row, prompt in enumerate(prompts):
        stops = [place for place, token in enumerate(prompt) if token in llm.tokenizer.stop_tokens]
        expected = prompt[: stops[0]] if stops else prompt + plain[row]
        assert echoed[row] == expected and len(scores[row]) == len(expected)
        if expected:
            assert scores[row][0] == 0.0
        if not stops:
            assert_same_logprobs([scores[row][len(prompt) :]], [plain_scores[row]])
            again, again_scores = llm.generate([expected[:MAX_SEQ_LEN]], 0, logprobs=True, echo=True)
            assert again == [expected]
            assert_same_logprobs(again_scores, [scores[row]])


def test_max_gen_len_zero_returns_nothing_or_the_prompt(llm: Llama) -> None:
    assert llm.generate([[1, 2], [3]], 0) == ([[], []], None)
    assert llm.generate([[1, 2], [3]], 0, logprobs=True) == ([[], []], [[], []])
    tokens, scores = llm.generate([[1, 2], [3]], 0, echo=True, logprobs=True)
    assert scores is not None and tokens == [[1, 2], [3]] and [len(row) for row in scores] == [2, 1]
    assert llm.text_completion(["a b", "c"], max_gen_len=0) == [{"generation": ""}, {"generation": ""}]


def test_prompt_of_max_seq_len_generates_nothing_in_a_batch_with_a_shorter_one(llm: Llama) -> None:
    full = [7] * MAX_SEQ_LEN
    llm_stop, llm.tokenizer.stop_tokens = llm.tokenizer.stop_tokens, set()
    try:
        tokens, _ = llm.generate([full, [1, 2], full], 5, temperature=0)
        alone, _ = llm.generate([[1, 2]], 5, temperature=0)
        assert tokens == [[], alone[0], []] and len(alone[0]) == 5
        long, _ = llm.generate([[1, 2]], 10_000, temperature=0)
        assert len(long[0]) == MAX_SEQ_LEN - 2
    finally:
        llm.tokenizer.stop_tokens = llm_stop


def test_stop_in_prompt_is_ignored_without_echo_and_cuts_with_it(llm: Llama) -> None:
    stop = llm.tokenizer.eos_id
    tokens, _ = llm.generate([[5, stop, 6]], 4, temperature=0)
    assert tokens[0] and llm.generate([[5, stop, 6]], 4, temperature=0, echo=True)[0] == [[5]]
    assert llm.generate([[stop, 6]], 4, temperature=0, echo=True, logprobs=True) == ([[]], [[]])


def test_stop_tokens_are_read_at_every_call(llm: Llama) -> None:
    before = llm.tokenizer.stop_tokens
    tokens, _ = llm.generate([[1, 2, 3]], 6, temperature=0)
    try:
        llm.tokenizer.stop_tokens = {tokens[0][2]}
        assert llm.generate([[1, 2, 3]], 6, temperature=0)[0][0] == tokens[0][:2]
        llm.tokenizer.stop_tokens = [tokens[0][0]]  # type: ignore[assignment]
        assert llm.generate([[1, 2, 3]], 6, temperature=0)[0] == [[]]
    finally:
        llm.tokenizer.stop_tokens = before


def test_unseeded_calls_differ_and_a_second_build_repeats_them(tmp_path: Path) -> None:
    first, second, other = tiny_llama(tmp_path), tiny_llama(tmp_path), tiny_llama(tmp_path, seed=2)
    calls = [first.generate([[1, 2, 3]] * 2, 12, temperature=2.0, top_p=1.0)[0] for _ in range(3)]
    assert calls == [second.generate([[1, 2, 3]] * 2, 12, temperature=2.0, top_p=1.0)[0] for _ in range(3)]
    assert calls[0] != calls[1] != calls[2] and calls[0][0] != calls[0][1]
    assert other.generate([[1, 2, 3]] * 2, 12, temperature=2.0, top_p=1.0)[0] != calls[0]


def test_seeds_select_random_streams(llm: Llama) -> None:
    def draw(prompts: int, seed: object) -> list[list[int]]:
        return llm.generate([[1, 2, 3]] * prompts, 12, temperature=2.0, top_p=1.0, seed=seed)[0]  # type: ignore[arg-type]

    one = draw(3, 9)
    assert draw(3, 9) == one and draw(2, 9) == one[:2] and draw(3, 10) != one
    assert one[0] != one[1] != one[2]
    listed = draw(3, [9, 8, 9])
    assert listed[0] == listed[2] == one[0] != listed[1]
    assert draw(1, [8]) == [listed[1]] and draw(1, (8,)) == [listed[1]]
    assert draw(1, -1) == draw(1, 2**64 - 1)


def test_generate_does_not_use_torchs_generator(llm: Llama) -> None:
    before = torch.get_rng_state()
    llm.generate([[1, 2, 3]], 8)
    assert torch.equal(torch.get_rng_state(), before)


def test_all_greedy_parameters_agree(llm: Llama) -> None:
    greedy, _ = llm.generate([[1, 2, 3]], 8, temperature=0)
    assert llm.generate([[1, 2, 3]], 8, temperature=1.0, top_p=0)[0] == greedy
    assert llm.generate([[1, 2, 3]], 8, temperature=1e-9, top_p=1.0)[0] == greedy


def test_text_completion_matches_generate(llm: Llama) -> None:
    prompts = ["ab cd", "xyz"]
    ids = [llm.tokenizer.encode(prompt, bos=True, eos=False) for prompt in prompts]
    tokens, scores = llm.generate(ids, 10, logprobs=True, seed=4)
    out = llm.text_completion(prompts, max_gen_len=10, logprobs=True, seed=4)
    assert scores is not None
    assert [row["generation"] for row in out] == [llm.tokenizer.decode(row) for row in tokens]
    assert [row["tokens"] for row in out] == [[llm.tokenizer.decode([t]) for t in row] for row in tokens]
    assert_same_logprobs([row["logprobs"] for row in out], scores)
    assert set(llm.text_completion(prompts, max_gen_len=3)[0]) == {"generation"}


def test_chat_completion_matches_generate(llm: Llama) -> None:
    dialogs = [
        [{"role": "user", "content": " a "}],
        [{"role": "system", "content": "b"}, {"role": "user", "content": "c"}],
    ]
    ids = [llm.formatter.encode_dialog_prompt(dialog) for dialog in dialogs]  # type: ignore[arg-type]
    tokens, scores = llm.generate(ids, 6, logprobs=True, seed=4)
    out = llm.chat_completion(dialogs, max_gen_len=6, logprobs=True, seed=4)  # type: ignore[arg-type]
    expected = [{"role": "assistant", "content": llm.tokenizer.decode(row)} for row in tokens]
    assert [row["generation"] for row in out] == expected
    assert_same_logprobs([row["logprobs"] for row in out], scores)
    short = llm.chat_completion(dialogs[:1], max_gen_len=2)  # type: ignore[arg-type]
    assert set(short[0]) == {"generation"}


def test_completions_without_max_gen_len_fill_the_context(llm: Llama) -> None:
    llm_stop, llm.tokenizer.stop_tokens = llm.tokenizer.stop_tokens, set()
    try:
        out = llm.text_completion(["a"], logprobs=True, temperature=0)
        n_prompt = len(llm.tokenizer.encode("a", bos=True, eos=False))
        assert len(out[0]["tokens"]) == MAX_SEQ_LEN - n_prompt
    finally:
        llm.tokenizer.stop_tokens = llm_stop


def test_a_call_reads_nothing_that_earlier_calls_left_in_the_cache(llm: Llama) -> None:
    alone, _ = llm.generate([[1, 2, 3]], 8, temperature=0)
    llm.model.cache.k.fill_(torch.nan)
    llm.model.cache.v.fill_(torch.nan)
    after, _ = llm.generate([[1, 2, 3], [5] * 30], 8, temperature=0)
    assert after[0] == alone[0]


def test_two_models_in_one_process(tmp_path: Path) -> None:
    first = tiny_llama(tmp_path / "a")
    expected = first.generate([[1, 2]], 6, temperature=0)
    second = tiny_llama(tmp_path / "b", shards=2, n_layers=1)
    second.generate([[1, 2]], 6, temperature=0)
    assert first.generate([[1, 2]], 6, temperature=0) == expected


def test_sample_top_p_follows_metas_rule() -> None:
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]])
    before = probs.clone()
    torch.manual_seed(0)
    drawn = torch.cat([sample_top_p(probs, 0.5) for _ in range(400)], dim=1)
    assert drawn.dtype == torch.int64 and drawn.shape == (2, 400) and torch.equal(probs, before)
    assert set(drawn[0].tolist()) == {1, 3}  # the mass before token 2 is 0.7
    assert set(drawn[1].tolist()) == {0, 1, 2}  # the mass before the third is exactly 0.5
    share = (drawn[0] == 1).float().mean().item()
    assert abs(share - 4 / 7) < 0.08
    assert set(sample_top_p(probs[:1], 0.0).flatten().tolist()) == {1}
    unfiltered = torch.cat([sample_top_p(probs, 1.0) for _ in range(200)], dim=1)
    assert set(unfiltered[0].tolist()) == {0, 1, 2, 3}
    torch.manual_seed(5)
    first = sample_top_p(probs, 0.9)
    torch.manual_seed(5)
    assert torch.equal(sample_top_p(probs, 0.9), first)


@pytest.mark.parametrize(
    ("probs", "p"),
    [([0.6, 0.3, 0.1], 0.9), ([0.4, 0.3, 0.2, 0.1], 0.9), ([0.3, 0.3, 0.2, 0.2], 0.6), ([0.4, 0.3, 0.2, 0.1], 0.4)],
)
def test_sample_top_p_compares_in_the_dtype_of_probs(probs: list[float], p: float) -> None:
    """At the threshold, the result is that of Meta's cumulative sums in float32."""
    row = torch.tensor([probs])
    ordered = row[0].sort(descending=True).values
    kept = int((ordered.cumsum(0) - ordered <= p).sum())
    torch.manual_seed(0)
    drawn = {int(sample_top_p(row, p)) for _ in range(300)}
    assert drawn == set(range(kept))


def test_submodules_are_reachable_from_the_package() -> None:
    code = "import fastllama; fastllama.generation.Llama, fastllama.model.Transformer, fastllama.tokenizer.Tokenizer"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_text_and_chat_completion_take_any_iterable(llm: Llama) -> None:
    assert len(llm.text_completion((text for text in ["a", "b"]), max_gen_len=1)) == 2  # type: ignore[arg-type]
    dialogs = ([{"role": "user", "content": text}] for text in "ab")
    assert len(llm.chat_completion(dialogs, max_gen_len=1)) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("p", [-0.1, float("nan"), "0.9"])
def test_sample_top_p_rejects_bad_p(p: object) -> None:
    with pytest.raises(ValueError, match="top_p must be"):
        sample_top_p(torch.ones(1, 4) / 4, p)  # type: ignore[arg-type]


def test_import_needs_no_triton_and_no_fairscale() -> None:
    code = "import sys, fastllama.generation; print({'triton', 'fairscale', 'transformers'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
