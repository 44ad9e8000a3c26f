"""GPTQ's rounding by the inputs of a weight, and the calibration that finds them."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fastllama import ModelArgs, Transformer
from fastllama.calibration import Calibration
from fastllama.gptq import gptq
from fastllama.int4_rounding import Rounding, best_rounding
from fastllama.kernels.quantized import QuantizedWeight
from fastllama.quantization import Scheme, quantized
from tests.support.checkpoints import random_weights, tiny_params

CPU = torch.device("cpu")
GROUP = 32
WINDOWS = [[(31 * i + 7 * j) % 300 for j in range(length)] for i, length in enumerate((40, 40, 40, 17))]


def inputs(columns: int, tokens: int = 400, seed: int = 1) -> Tensor:
    """Inputs (tokens, columns) that go together, some of them much larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(tokens, columns // 4, generator=generator)
    mixed = causes @ torch.randn(columns // 4, columns, generator=generator)
    mixed += 0.3 * torch.randn(tokens, columns, generator=generator)
    return mixed * torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=generator)]


def weight(rows: int = 24, columns: int = 128, seed: int = 2) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def change(w: Tensor, rounded: QuantizedWeight, x: Tensor) -> float:
    """How far products with x change."""
    return float((x @ (w - rounded.dequantized()).T).square().mean())


def test_products_change_least() -> None:
    w, x = weight(), inputs(128)
    moments = x.T @ x / len(x)
    plain = change(w, quantized(w, Scheme("int4", GROUP), integer_zeros=True), x)
    by_inputs = change(w, gptq(w, moments, GROUP), x)
    by_size_only = change(w, gptq(w, torch.diag(moments.diagonal()), GROUP), x)
    assert by_inputs < 0.5 * by_size_only < 0.5 * plain


def test_other_inputs_of_the_kind_gain_as_well() -> None:
    w, known, other = weight(), inputs(128, 2000)[:1000], inputs(128, 2000)[1000:]
    plain = quantized(w, Scheme("int4", GROUP), integer_zeros=True)
    assert change(w, gptq(w, known.T @ known, GROUP), other) < 0.5 * change(w, plain, other)


def test_columns_are_rounded_as_the_formula_says() -> None:
    """Against the definition: after each column the others move to the minimum of the change that is left."""
    w, x = weight(3, 64).double(), inputs(64).double()
    moments = x.T @ x
    damped = moments + 0.01 * moments.diagonal().mean() * torch.eye(64).double()
    found = gptq(w.float(), moments, GROUP)
    scale, zero = (one.double().repeat_interleave(GROUP, 1) for one in (found.scales, cast(Tensor, found.offsets)))
    moved, left = w.clone(), moments.diagonal().argsort(descending=True).tolist()
    while left:
        i = left.pop(0)
        rounded = scale[:, i] * ((moved[:, i] / scale[:, i] + zero[:, i]).round().clamp(0, 15) - zero[:, i])
        error = moved[:, i] - rounded
        if left:
            moved[:, left] += torch.linalg.solve(damped[left][:, left], torch.outer(damped[left, i], error)).T
        moved[:, i] = rounded
    different = (found.dequantized().double() - moved).abs() > 1e-6
    assert different.double().mean() < 0.02  # near ties in float32


def test_a_weight_on_the_grid_stays() -> None:
    """Values of 4 bits that use the whole range of each group."""
    q = torch.randint(0, 16, (24, 4, GROUP), generator=torch.Generator().manual_seed(3)).float()
    q[..., 5], q[..., 9] = 0, 15
    w = (0.01 * (q - 7)).flatten(1)
    x = inputs(128)
    found = gptq(w, x.T @ x, GROUP)
    steps = found.scales.float().repeat_interleave(GROUP, 1)
    assert bool(((found.dequantized() - w).abs() <= 0.02 * steps).all())


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_few_inputs_are_enough_to_round(tokens: int) -> None:
    """Columns whose inputs are always 0, and moments of low rank."""
    w, x = weight(), inputs(128, max(tokens, 1))[:tokens]
    x[:, 7] = 0
    found = gptq(w, x.T @ x, GROUP)
    steps = found.scales.float().repeat_interleave(GROUP, 1)
    assert bool(found.dequantized().isfinite().all()) and found.has_zeros
    if tokens == 0:
        assert bool(((found.dequantized() - w).abs() <= 4 * steps).all())


def test_weights_that_are_not_finite_are_refused() -> None:
    w = weight()
    w[3, 4] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        gptq(w, torch.eye(128), GROUP)
    with pytest.raises(ValueError, match="scales in float16, and a weight is 1e\\+06: use int8"):
        gptq(torch.full((2, 32), 1e6), torch.eye(32), GROUP)


def test_importance_decides_which_columns_are_exact() -> None:
    w = weight(16, 32)[:, None]
    importance = torch.full((1, 32), 1e-3)
    importance[0, :4] = 1
    for integer_zeros in (False, True):
        errors = [
            (w - dequantized(best_rounding(w, integer_zeros, chosen), integer_zeros))[..., :4].square().mean()
            for chosen in (None, importance)
        ]
        assert errors[1] < 0.7 * errors[0]


def dequantized(rounding: Rounding, integer_zeros: bool) -> Tensor:
    scale, offset = rounding.scale.float(), rounding.offset.float()
    return scale * (rounding.q - offset) if integer_zeros else scale * rounding.q + offset


def logits(params: dict[str, Any], weights: dict[str, Tensor]) -> Tensor:
    """Of all windows."""
    model = Transformer(
        ModelArgs(max_batch_size=1, max_seq_len=64, **params),
        device=CPU,
        dtype=torch.float32,
        backend="reference",
        init_weights=False,
    )
    model.load_tensors(weights.items())
    return torch.cat([model.forward(torch.tensor([window]), 0)[0] for window in WINDOWS])


@pytest.mark.parametrize("biases", [False, True])
def test_a_calibrated_model_is_nearer_to_the_original(biases: bool) -> None:
    params = tiny_params(hidden_dim=96, vocab_size=320, attention_bias=biases, mlp_bias=biases)
    weights = random_weights(params, seed=5)
    ordered = [(name, weights[name]) for name in ModelArgs(**params).shapes]
    calibration = Calibration(params, WINDOWS, CPU)
    assert calibration.n_tokens == sum(map(len, WINDOWS))
    rounded = dict(calibration.rounded(iter(ordered), GROUP))
    assert list(rounded) == [name for name, _ in ordered]
    for name, found in rounded.items():
        is_matrix = name.startswith("layers.") and weights[name].ndim == 2
        assert isinstance(found, QuantizedWeight) == is_matrix and (is_matrix or found is weights[name])
    theirs = {name: dense(found) for name, found in rounded.items()}
    plain = {
        name: dense(quantized(weights[name], Scheme("int4", GROUP), integer_zeros=True))
        if isinstance(rounded[name], QuantizedWeight)
        else weights[name]
        for name in weights
    }
    exact = logits(params, weights)
    errors = [float((logits(params, changed) - exact).square().mean()) for changed in (theirs, plain)]
    assert errors[0] < 0.8 * errors[1]


def dense(found: Tensor | QuantizedWeight) -> Tensor:
    return found if isinstance(found, Tensor) else found.dequantized()


def test_a_layers_inputs_are_those_of_the_rounded_model() -> None:
    """The hidden states at the end are the model's with the rounded weights."""
    params = tiny_params(hidden_dim=96, vocab_size=320)
    weights = random_weights(params, seed=5)
    calibration = Calibration(params, WINDOWS, CPU)
    rounded = dict(calibration.rounded(((name, weights[name]) for name in ModelArgs(**params).shapes), GROUP))
    changed = {name: dense(found) for name, found in rounded.items()}
    hidden = torch.cat(calibration._hidden)
    normed = torch.nn.functional.rms_norm(hidden, hidden.shape[1:], eps=ModelArgs(**params).norm_eps)
    found = normed * changed["norm.weight"] @ changed["output.weight"].T
    torch.testing.assert_close(found, logits(params, changed), rtol=1e-4, atol=1e-4)


def test_activations_that_are_not_finite_are_refused() -> None:
    params = tiny_params(hidden_dim=96, vocab_size=320)
    weights = random_weights(params, seed=5)
    weights["tok_embeddings.weight"] = weights["tok_embeddings.weight"] * torch.inf
    ordered = ((name, weights[name]) for name in ModelArgs(**params).shapes)
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.wq.*: its inputs on the calibration text are not"):
        list(Calibration(params, WINDOWS, CPU).rounded(ordered, GROUP))
