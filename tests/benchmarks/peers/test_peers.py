"""The peers generate our tokens."""

import dataclasses
import warnings
from functools import partial
from typing import Any

import pytest
import torch

from fastllama.args import ModelArgs
from fastllama.benchmarks.peers import torch_compile
from fastllama.benchmarks.peers.agreement import compare
from fastllama.benchmarks.peers.huggingface import llama_config
from fastllama.benchmarks.peers.registry import Peer
from fastllama.benchmarks.runners import Ours
from fastllama.rope import rope_table
from tests.benchmarks.cases import ARGS, CASE, RAGGED, SHAPE, SOURCE, SPEC
from tests.support.tiers import parameters


@pytest.mark.parametrize(
    "name", parameters({name: name for name in ("reference", "transformers")}, quick=("transformers",))
)
def test_peers_generate_our_tokens_for_ragged_prompts(name: str) -> None:
    prompts = RAGGED.prompts(ARGS.vocab_size)
    ours = Ours(SPEC.build()).run(prompts, 8, logprobs=True)
    with Peer(name, SPEC) as peer:
        expected = peer.run(prompts, 8, logprobs=True)
        again = peer.run(prompts, 8)
    agreement = compare(ours, expected, torch.float32)
    assert agreement.agrees and agreement.tokens_compared == 24, agreement.difference
    assert again.tokens == expected.tokens and len(again.seconds) == 8 and again.seconds == sorted(again.seconds)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"use_scaled_rope": True, "rope_scaling_factor": 32.0, "rope_theta": 500000.0, "tied_output": True},
        {"attention_bias": True, "mlp_bias": True},
    ],
    ids=["scaled rope, tied", "biases"],
)
def test_transformers_takes_the_models_variants(fields: dict[str, Any]) -> None:
    shape: dict[str, Any] = SOURCE.shape | fields
    spec = dataclasses.replace(SPEC, source=dataclasses.replace(SOURCE, shape=shape))
    prompts = RAGGED.prompts(ARGS.vocab_size)
    ours = Ours(spec.build()).run(prompts, 4, logprobs=True)
    with Peer("transformers", spec) as peer:
        agreement = compare(ours, peer.run(prompts, 4, logprobs=True), torch.float32)
    assert agreement.agrees, agreement.difference


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_scaled_rope": True, "rope_original_max_seq_len": 16},
        {"rope_type": "linear", "rope_scaling_factor": 4.0},
        {"rope_type": "yarn", "rope_scaling_factor": 4.0, "rope_original_max_seq_len": 16, "rope_truncate": False},
    ],
)
def test_transformers_configuration_has_the_models_rope(fields: dict[str, Any]) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    args = ModelArgs(**SHAPE, max_seq_len=32, **fields)
    cos, sin = LlamaRotaryEmbedding(llama_config(args))(torch.zeros(1), torch.arange(32)[None])
    half = args.head_dim // 2
    torch.testing.assert_close(rope_table(args), torch.stack((cos[0, :, :half], sin[0, :, :half]), dim=-1))


def test_reference_peer_agrees_on_the_same_weights_and_not_on_others() -> None:
    prompts = CASE.prompts(ARGS.vocab_size)
    with Peer("reference", SPEC) as peer:
        expected = peer.run(prompts, 8, logprobs=True)
        again = peer.run(prompts, 8)
    assert again.tokens == expected.tokens and again.logprobs is None and len(again.seconds) == 8
    same = compare(Ours(SPEC.build()).run(prompts, 8, True), expected, torch.float32)
    assert same.agrees, same.difference
    assert same.tokens_compared == 16
    other = dataclasses.replace(SPEC, source=dataclasses.replace(SOURCE, seed=SOURCE.seed + 1))
    different = compare(Ours(other.build()).run(prompts, 8, True), expected, torch.float32)
    assert not different.agrees


@pytest.mark.compiles
def test_the_compiled_peer_is_one_graph_and_gives_our_tokens_with_margins() -> None:
    """Traced without compiling C++, as `make bench-smoke` does. A graph break is an error."""
    llm = dataclasses.replace(SPEC, backend="reference").build()
    compiled = partial(torch.compile, backend="eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler warns about internals
        ops = torch_compile.compile_model(llm.model, compiled)
        prompts = CASE.prompts(ARGS.vocab_size)
        expected, again = (torch_compile.generate(Ours(llm), ops, prompts, 8, scores) for scores in (True, False))
    ours = Ours(SPEC.build()).run(prompts, 8, True)
    agreement = compare(ours, expected, torch.float32)
    assert agreement.agrees and agreement.tokens_compared == 16, agreement.difference
    assert again.tokens == expected.tokens and again.margins is None and expected.margins is not None
    assert all(margin > 0 for row in expected.margins for margin in row)
