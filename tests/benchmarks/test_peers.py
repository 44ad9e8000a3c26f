"""Peers: what they are compared by, when there is none, and Meta's own code among them."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch

from fastllama.args import ModelArgs
from fastllama.benchmarks import peers
from fastllama.benchmarks.models import ModelSource, Run, build
from fastllama.benchmarks.peers import Peer, PeerError, absence, compare
from fastllama.benchmarks.reference_peer import refusal
from fastllama.benchmarks.rounds import Ours
from tests.benchmarks.test_decode import ARGS, CASE, CPU, SHAPE, SOURCE


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
    monkeypatch.setitem(peers.PEERS, "reference", peers.Kind("fastllama.benchmarks.no_such_module", ()))
    with pytest.raises(PeerError, match=r"process ended: .*no_such_module"):
        start_reference(SOURCE)
