"""Peers: what they are compared by, when there is none, and Meta's own code among them."""

import dataclasses
import importlib.util
import math
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch

from fastllama.args import ModelArgs
from fastllama.benchmarks import run
from fastllama.benchmarks.models import ModelSource, build
from fastllama.benchmarks.peers import client, torch_compile
from fastllama.benchmarks.peers.agreement import compare
from fastllama.benchmarks.peers.client import Peer, PeerError, absence
from fastllama.benchmarks.peers.meta import refusal
from fastllama.benchmarks.runner import Ours, Run
from fastllama.benchmarks.suites.comparison import Case
from tests.benchmarks.suites.test_decode import ARGS, CASE, CPU, SHAPE, SOURCE


def run_of(tokens: list[list[int]], logprob: float = -1.0, margin: float = 1.0) -> Run:
    return Run(tokens, [], [[logprob] * len(row) for row in tokens], [[margin] * len(row) for row in tokens])


def test_compare_agrees_within_the_tolerance() -> None:
    found = compare(run_of([[1, 2], [3, 4]]), run_of([[1, 2], [3, 4]], logprob=-1.00005), torch.float32)
    assert (found.agrees, found.tokens_compared, found.tokens_total) == (True, 4, 4)
    assert found.max_logprob_difference == pytest.approx(5e-5)


@pytest.mark.parametrize("logprob", [-1.001, float("nan")])
def test_compare_names_log_probabilities_that_differ(logprob: float) -> None:
    found = compare(run_of([[1, 2]]), run_of([[1, 2]], logprob=logprob), torch.float32)
    assert not found.agrees and "row 0 step 0: log-probabilities" in str(found.difference)


def test_compare_names_tokens_that_differ() -> None:
    found = compare(run_of([[1, 2], [3, 9, 5]]), run_of([[1, 2], [3, 4, 5]]), torch.float32)
    assert not found.agrees and "row 1 step 1: token 9 here, 4 there" in str(found.difference)


def test_compare_lets_tokens_part_at_a_tie_only() -> None:
    ours, tied, clear = run_of([[1, 9, 9]]), run_of([[1, 2, 3]], margin=5e-5), run_of([[1, 2, 3]], margin=2e-4)
    assert compare(ours, tied, torch.float32).agrees
    assert compare(ours, tied, torch.float32).tokens_compared == 1
    assert not compare(ours, clear, torch.float32).agrees


def test_compare_is_not_taken_in_by_an_oracle_that_knows_nothing() -> None:
    constant = run_of([[0, 0, 0]], logprob=-9.0, margin=0.0)
    found = compare(run_of([[5, 6, 7]]), constant, torch.float32)
    assert not found.agrees and "apart" in str(found.difference)
    endless = compare(run_of([[5]]), run_of([[5]], logprob=-math.inf), torch.float32)
    assert not endless.agrees and endless.max_logprob_difference is None


def test_compare_rejects_other_lengths_and_missing_scores() -> None:
    assert not compare(run_of([[1]]), run_of([[1, 2]]), torch.float32).agrees
    with pytest.raises(ValueError, match="log-probabilities of both runs"):
        compare(Run([[1]], [0.0]), run_of([[1]]), torch.float32)


def test_absence_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert absence("reference", ARGS) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llama_models" else object())
    assert "llama_models not installed" in str(absence("reference", ARGS))
    with pytest.raises(ValueError, match="unknown peer 'vllm'"):
        absence("vllm", ARGS)


def test_refusal_names_what_metas_code_cannot_run() -> None:
    assert refusal(ARGS) is None
    assert "head_dim" in str(refusal(ModelArgs(**{**SHAPE, "head_dim": 16})))
    scaled = {**SHAPE, "use_scaled_rope": True}
    assert refusal(ModelArgs(**{**scaled, "rope_scaling_factor": 8.0})) is None
    assert "by 32" in str(refusal(ModelArgs(**{**scaled, "rope_scaling_factor": 32.0})))


def start_reference(source: ModelSource) -> Peer:
    return Peer("reference", source, device=CPU, dtype=torch.float32, max_batch_size=3, max_seq_len=32)


def test_reference_peer_agrees_on_the_same_weights_and_not_on_others() -> None:
    prompts = CASE.prompts(ARGS.vocab_size)
    with start_reference(SOURCE) as peer:
        theirs = peer.run(prompts, 8, logprobs=True)
        again = peer.run(prompts, 8)
    assert again.tokens == theirs.tokens and again.logprobs is None and len(again.seconds) == 8
    same = compare(Ours(build(SOURCE, ARGS, CPU, torch.float32, None)).run(prompts, 8, True), theirs, torch.float32)
    assert same.agrees, same.difference
    assert same.tokens_compared == 16
    other = dataclasses.replace(SOURCE, seed=SOURCE.seed + 1)
    different = compare(Ours(build(other, ARGS, CPU, torch.float32, None)).run(prompts, 8, True), theirs, torch.float32)
    assert not different.agrees


def test_reference_peer_says_why_it_cannot_start(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match=r"AssertionError: .*does not exist"):
        start_reference(ModelSource.folder(str(tmp_path / "nowhere"), None))


def test_reference_peer_that_ended_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(client.PEERS, "reference", client.Kind("fastllama.benchmarks.no_such_module", ()))
    with pytest.raises(PeerError, match=r"process ended: .*no_such_module"):
        start_reference(SOURCE)


def test_a_peer_that_broke_down_says_why_ever_after() -> None:
    with start_reference(SOURCE) as peer:
        for _ in range(2):
            with pytest.raises(PeerError, match="AssertionError"):
                peer.run([[0] * 100], 8)


def test_reasons_are_one_line_and_no_novel() -> None:
    assert client.one_line("one\n  two") == "one two"
    assert len(client.one_line("x" * 5000)) < 400


def test_gpt_fast_needs_a_checkout_and_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--gpt_fast DIR" in str(absence("gpt-fast", ARGS))
    assert "lacks model.py and generate.py" in str(absence("gpt-fast", ARGS, str(tmp_path)))
    for name in ("model.py", "generate.py"):
        (tmp_path / name).touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "sentencepiece" in str(absence("gpt-fast", ARGS, str(tmp_path)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert absence("gpt-fast", ARGS, str(tmp_path)) is None
    assert "head_dim" in str(absence("gpt-fast", ModelArgs(**{**SHAPE, "head_dim": 16}), str(tmp_path)))


def test_gpt_fast_is_not_asked_for_ragged_prompts() -> None:
    peer = Peer.__new__(Peer)
    ragged, even = Case("generate", 3, 12), Case("decode", 3, 12)
    assert run.suited("gpt-fast", peer, ragged) == "it takes equally long prompts only"
    assert run.suited("gpt-fast", peer, even) is peer and run.suited("reference", peer, ragged) is peer


@pytest.mark.compiles
def test_the_compiled_peer_is_whole_and_answers_with_our_tokens_and_its_margins() -> None:
    """Traced without the C++ that `make bench-smoke` compiles: a graph that breaks would be an error."""
    llm = build(SOURCE, ARGS, CPU, torch.float32, "reference")
    compiled = partial(torch.compile, backend="eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler, about itself
        ops = torch_compile.compile_model(llm.model, compiled)
        prompts = CASE.prompts(ARGS.vocab_size)
        theirs, again = (torch_compile.generate(Ours(llm), ops, prompts, 8, scores) for scores in (True, False))
    ours = Ours(build(SOURCE, ARGS, CPU, torch.float32, None)).run(prompts, 8, True)
    agreement = compare(ours, theirs, torch.float32)
    assert agreement.agrees and agreement.tokens_compared == 16, agreement.difference
    assert again.tokens == theirs.tokens and again.margins is None and theirs.margins is not None
    assert all(margin > 0 for row in theirs.margins for margin in row)
