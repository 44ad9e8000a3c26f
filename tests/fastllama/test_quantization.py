"""Rounding to fewer bits, which weights are rounded, and models with such weights on the reference backend."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import ModelArgs, Transformer
from fastllama.args import OUTPUT_NAME
from fastllama.cli.options import QUANTIZE_CHOICES
from fastllama.kernels.quantized import QuantizedWeight, pack_int4, unpack_int4
from fastllama.memory_plan import plan_memory
from fastllama.quantization import (
    CHOICES,
    Scheme,
    model_schemes,
    packed_scheme,
    quantized,
    scheme_of,
    with_scheme,
)
from tests.support.checkpoints import random_weights, tiny_params

CPU = torch.device("cpu")
PARAMS = tiny_params(hidden_dim=192)
TOKENS = torch.arange(14).view(2, 7) * 31 % PARAMS["vocab_size"]
SCHEMES = {"int8": Scheme("int8"), "fp8": Scheme("fp8"), **{f"int4-{g}": Scheme("int4", g) for g in (32, 64, 128)}}


def weights(rows: int = 24, columns: int = 384, seed: int = 1) -> Tensor:
    """Normal weights with a few large ones, a row of zeros, and a row of equal values."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) * 0.02
    w[:, 5] *= 20
    w[3], w[4] = 0, 0.37
    return w


def model(quantize: str | None, dtype: torch.dtype = torch.float32, **changes: Any) -> Transformer:
    params = {**PARAMS, **changes}
    args = ModelArgs(max_batch_size=2, max_seq_len=16, **params)
    made = Transformer(args, device=CPU, dtype=dtype, backend="reference", quantize=quantize, init_weights=False)
    made.load_tensors(random_weights(params, seed=3).items())
    return made


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_weight_is_within_half_a_step(name: str, dtype: torch.dtype) -> None:
    w = weights().to(dtype)
    weight = quantized(w, SCHEMES[name])
    assert weight.shape == w.shape and weight.format == SCHEMES[name].format
    error = (weight.dequantized() - w.float()).abs()
    scales = weight.scales.float().repeat_interleave(weight.group_size, 1)
    if name == "int8":
        assert (error <= 0.5001 * scales).all()
    elif name == "fp8":  # half a unit in the last of 3 bits, or of the subnormals
        assert (error <= torch.maximum(w.float().abs() * 2**-4, scales * 2**-10) * 1.001).all()
    else:  # ranges that leave out the extremes are finer for the others
        within = (error <= 0.51 * scales)[5:]
        assert within.float().mean() > 0.98
    assert (error[3] == 0).all() and (error[4] <= 0.37 * 2**-9).all()


@pytest.mark.parametrize("integer_zeros", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_has_less_error_than_rounding_the_whole_range(group_size: int, integer_zeros: bool) -> None:
    w = weights(64)
    weight = quantized(w, Scheme("int4", group_size), integer_zeros=integer_zeros)
    groups = w.view(64, -1, group_size)
    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = torch.where(most > least, (most - least) / 15, 1)
    plain = ((groups - least) / step).round() * step + least
    ours = (weight.dequantized().view_as(groups) - groups).square().sum(-1)
    ratio = ours.mean() / (plain - groups).square().sum(-1).mean()
    assert ratio < (1.05 if integer_zeros else 0.9)
    assert weight.has_zeros is integer_zeros
    if integer_zeros:
        zeros = weight.offsets
        assert zeros is not None and torch.equal(zeros, zeros.round()) and zeros.min() >= 0 and zeros.max() <= 15


@pytest.mark.parametrize("name", SCHEMES)
def test_what_was_quantised_is_reproduced(name: str) -> None:
    """A weight that has such values already is not changed: the same model can be quantised twice."""
    once = quantized(weights(), SCHEMES[name]).dequantized()
    torch.testing.assert_close(quantized(once, SCHEMES[name]).dequantized(), once, rtol=1e-6, atol=0)


def test_a_weight_of_4_bit_groups_of_another_program_is_reproduced() -> None:
    """Minima and scales in float16, both ends of the range used, as in GGUF's Q4_1."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randint(0, 16, (40, 6, 32), generator=generator)
    q[..., 0], q[..., 1] = 0, 15
    scales, minima = (torch.rand(40, 6, 1, generator=generator) / 50).half(), (-torch.rand(40, 6, 1) / 7).half()
    w = (q * scales.float() + minima.float()).flatten(1)
    assert torch.equal(quantized(w, Scheme("int4", 32)).dequantized(), w)


def test_weights_that_are_not_finite_are_refused() -> None:
    w = weights()
    w[7, 7] = torch.inf
    for scheme in SCHEMES.values():
        with pytest.raises(ValueError, match="not finite: the checkpoint is damaged"):
            quantized(w, scheme)


def test_int4_values_are_pairs_in_bytes() -> None:
    q = torch.arange(32).view(2, 16) % 16
    values = pack_int4(q)
    assert values.dtype == torch.uint8 and values[0, :2].tolist() == [0x10, 0x32]
    assert torch.equal(unpack_int4(values), q.to(torch.uint8))


@pytest.mark.parametrize("name", SCHEMES)
def test_slices_are_those_of_the_dequantised_weight(name: str) -> None:
    weight = quantized(weights(), SCHEMES[name])
    dense = weight.dequantized()
    assert torch.equal(weight.rows(5, 11).dequantized(), dense[5:16])


def test_schemes_of_a_model() -> None:
    assert tuple(CHOICES) == QUANTIZE_CHOICES
    args = ModelArgs(**PARAMS)
    for quantize in CHOICES:
        schemes = model_schemes(quantize, args)
        kept = set(args.shapes) - set(schemes)
        assert {name.split(".")[-2] for name in kept} == {"tok_embeddings", "attention_norm", "ffn_norm", "norm"}
        output = schemes.pop(OUTPUT_NAME)
        assert output == (Scheme("int8") if "int4" in quantize else CHOICES[quantize])
    assert model_schemes(None, args) == {}
    assert [scheme_of("int4", "layers.0.attention.wo.weight", n) for n in (4096, 576, 96)] == [
        *(Scheme("int4", 128), Scheme("int4", 64), Scheme("int4", 32))
    ]
    with pytest.raises(ValueError, match="int4 takes weights whose columns are a multiple of 32, and .* has 172: use"):
        model("int4", hidden_dim=172)
    with pytest.raises(ValueError, match="quantize must be one of int8, fp8, int4, .*, or None, got 'q4'"):
        model("q4")
    wrong: Any = ["int8"]
    with pytest.raises(ValueError, match=r"or None, got \['int8'\]"):
        model(wrong)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantize", CHOICES)
def test_a_model_computes_with_the_dequantised_weights(quantize: str, tied: bool) -> None:
    ours = model(quantize, tied_output=tied)
    dense = model(None, tied_output=False)
    state = ours.state_dict()
    if tied:  # of which the output is a quantised copy
        assert torch.equal(state["output.weight"], state["tok_embeddings.weight"])
        output = ours.output
        assert isinstance(output, QuantizedWeight)
        state["output.weight"] = output.dequantized()
    dense.load_state_dict(state)
    torch.testing.assert_close(ours.forward(TOKENS, 0), dense.forward(TOKENS, 0), atol=1e-4, rtol=1e-4)
    stored = {name: one for name, one in ours._unpacked_weights() if isinstance(one, QuantizedWeight)}
    assert stored.keys() == model_schemes(quantize, ours.params).keys() - ({OUTPUT_NAME} if tied else set())


@pytest.mark.parametrize("quantize", CHOICES)
def test_copies_keep_the_quantised_weights(quantize: str) -> None:
    ours = model(quantize)
    expected = ours.forward(TOKENS, 0)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert other.quantize == quantize and torch.equal(other.forward(TOKENS, 0), expected)
    ours.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours.forward(TOKENS, 0), expected, atol=1e-4, rtol=1e-4)
    half = ours.bfloat16()
    assert half.tok_embeddings.dtype == torch.bfloat16
    torch.testing.assert_close(half.forward(TOKENS, 0), expected, atol=0.3, rtol=0.1)


def test_weights_of_another_format_are_quantised_anew() -> None:
    name, dense = "layers.0.attention.wo.weight", weights()
    for stored, scheme in CHOICES.items():
        before = quantized(dense, scheme)
        for asked, other in CHOICES.items():
            chosen = packed_scheme(name, dense.shape[1], asked, [scheme])
            assert chosen is not None
            after = with_scheme(name, before, chosen, CPU)
            if other.format == scheme.format:  # whatever its groups
                assert after is before
            else:
                expected = quantized(before.dequantized(), other)
                assert torch.equal(after.values, expected.values) and torch.equal(after.scales, expected.scales)
        assert packed_scheme(name, dense.shape[1], None, [scheme]) == scheme
        args = ModelArgs(**PARAMS)
        schemes = {asked: model_schemes(asked, args, {name: scheme})[name] for asked in CHOICES}
        assert schemes == {
            asked: scheme if other.format == scheme.format else scheme_of(asked, name, args.dim)
            for asked, other in CHOICES.items()
        }
        assert model_schemes(None, args, {name: CHOICES[stored]}) == {name: scheme}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantize", CHOICES)
def test_the_memory_plan_counts_the_weights(quantize: str, tied: bool) -> None:
    ours = model(quantize, tied_output=tied)
    plan = plan_memory(ours.params, ours.dtype, 2, 16, quantize=quantize)
    stored = [getattr(one.owner, one.attribute) for one in ours.packed_weights()]
    sizes = [one.n_bytes if isinstance(one, QuantizedWeight) else one.nbytes for one in stored]
    assert plan.weights == sum(sizes) + ours.rope.nbytes
