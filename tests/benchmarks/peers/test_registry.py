"""Starting peers: why one is unavailable, and what happens when one fails."""

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from fastllama.args import ModelArgs
from fastllama.benchmarks.child_process import ChildError
from fastllama.benchmarks.models import ModelSource
from fastllama.benchmarks.peers import gpt_fast, huggingface, llama_cpp, meta, registry, vllm_cpu
from fastllama.benchmarks.peers.meta import unsupported
from fastllama.benchmarks.peers.registry import Peer, unavailable
from fastllama.benchmarks.runners import Workload
from tests.benchmarks.cases import ARGS, SHAPE, SPEC


def test_unavailable_names_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unavailable("reference", ARGS) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llama_models" else object())
    assert "llama_models not installed" in str(unavailable("reference", ARGS))
    with pytest.raises(ValueError, match="unknown peer 'vllm'"):
        unavailable("vllm", ARGS)


def test_unsupported_names_what_metas_code_cannot_run() -> None:
    assert unsupported(ARGS) is None
    assert "head_dim" in str(unsupported(ModelArgs(**{**SHAPE, "head_dim": 16})))
    scaled = {**SHAPE, "use_scaled_rope": True}
    assert unsupported(ModelArgs(**{**scaled, "rope_scaling_factor": 8.0})) is None
    assert "by 32" in str(unsupported(ModelArgs(**{**scaled, "rope_scaling_factor": 32.0})))


@pytest.mark.parametrize("peer", [meta, gpt_fast, llama_cpp], ids=lambda peer: str(peer.__name__).rpartition(".")[2])
def test_unsupported_names_biases(peer: ModuleType) -> None:
    for biases in ({"attention_bias": True}, {"mlp_bias": True}):
        assert "has no biases, and this model has" in str(peer.unsupported(ModelArgs(**{**SHAPE, **biases})))


def test_unsupported_names_types_of_rope() -> None:
    linear, yarn = (ModelArgs(**SHAPE, rope_type=name, rope_scaling_factor=4.0) for name in ("linear", "yarn"))
    for args in (linear, yarn):
        assert f"no rope of type '{args.rope_type}', only default, llama3" in str(unsupported(args))
        assert f"no rope of type '{args.rope_type}'" in str(gpt_fast.unsupported(args))
    assert llama_cpp.unsupported(linear) is None
    assert "no rope of type 'yarn'" in str(llama_cpp.unsupported(yarn))
    shape = {**SHAPE, "head_dim": 32}
    factors = ModelArgs(**shape, rope_type="factors", rope_factors=(2.0,) * 16)
    for peer in (huggingface, vllm_cpu):
        assert peer.unsupported(ModelArgs(**shape, rope_type="yarn", rope_scaling_factor=4.0)) is None
        assert "no rope of type 'factors', only default, linear" in str(peer.unsupported(factors))


def test_a_peer_that_cannot_start_raises_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ChildError, match=r"AssertionError: .*does not exist"):
        Peer("reference", dataclasses.replace(SPEC, source=ModelSource.folder(str(tmp_path / "nowhere"), None)))


def test_a_peer_whose_process_ended_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "WORKER", "fastllama.benchmarks.no_such_module")
    with pytest.raises(ChildError, match=r"process ended: .*no_such_module"):
        Peer("reference", SPEC)


def test_a_failed_peer_raises_the_reason_on_every_run() -> None:
    with Peer("reference", SPEC) as peer:
        for _ in range(2):
            with pytest.raises(ChildError, match="AssertionError"):
                peer.run([[0] * 100], 8)


def test_gpt_fast_needs_a_checkout_and_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--gpt_fast DIR" in str(unavailable("gpt-fast", ARGS))
    assert "lacks model.py and generate.py" in str(unavailable("gpt-fast", ARGS, str(tmp_path)))
    for name in ("model.py", "generate.py"):
        (tmp_path / name).touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "sentencepiece" in str(unavailable("gpt-fast", ARGS, str(tmp_path)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert unavailable("gpt-fast", ARGS, str(tmp_path)) is None
    assert "head_dim" in str(unavailable("gpt-fast", ModelArgs(**{**SHAPE, "head_dim": 16}), str(tmp_path)))


def test_peers_of_one_batch_and_of_many_requests_are_told_apart() -> None:
    assert unavailable("reference", ARGS, serves=True) == "it is not measured with many requests"
    assert unavailable("transformers-continuous", ARGS) == "it is measured in the requests suite only"
    assert unavailable("transformers-continuous", ARGS, serves=True) is None


def test_an_answer_of_another_length_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer.__new__(Peer)
    found = {"tokens": [[7], [7, 8]], "starts": [0.0] * 2, "times": [[1.0]] * 2}
    monkeypatch.setattr(peer, "ask", lambda request: found)
    with pytest.raises(ChildError, match=r"answers have \[1, 2\] tokens, not \[1, 3\]"):
        peer.serve(Workload([[1], [2]], [1, 3], 2))
    assert peer.serve(Workload([[1], [2]], [1, 2], 2)).tokens == [[7], [7, 8]]


def test_every_peer_is_a_module() -> None:
    modules = [f"fastllama.benchmarks.peers.{spec.module}" for spec in registry.PEERS.values()]
    assert all(importlib.util.find_spec(module) is not None for module in modules)
