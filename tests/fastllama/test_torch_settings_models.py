"""A caller's settings in torch do not change a Transformer or `sample_top_p`; `default_settings` restores them."""

import copy
import io
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastllama import ModelArgs, Transformer
from fastllama.benchmarks.tolerances import TOLERANCES
from fastllama.generation import sample_top_p
from fastllama.torch_settings import default_settings, with_default_settings
from tests.fastllama.caller_settings import MODES, SETTINGS, attribute, products, set_full_precision, state
from tests.support.checkpoints import tiny_params

TOLERANCE = TOLERANCES["divided logprobs", torch.float32]


@pytest.fixture(autouse=True, scope="module")
def full_precision() -> None:
    set_full_precision()


@pytest.mark.parametrize(
    "name", [name for name in SETTINGS if name != "function-mode"]
)  # it also sees torch's own nn.Module.to
def test_a_callers_setting_changes_no_model(name: str) -> None:
    args = ModelArgs(max_batch_size=2, max_seq_len=8, **tiny_params())
    tokens = torch.arange(6).view(2, 3)

    def run() -> list[Tensor]:
        with default_settings():
            torch.manual_seed(0)
        model = Transformer(args, device="cpu", dtype=torch.float32)
        logits = [model.forward(tokens, 0), copy.deepcopy(model).forward(tokens, 0)]
        other = Transformer(args, device="cpu", dtype=torch.float32)
        assert other.load_state_dict(model.state_dict()) == ([], [])
        return [*logits, other.forward(tokens, 0), other.to(torch.bfloat16).forward(tokens, 0)]

    expected = run()
    with SETTINGS[name]():
        before = state()
        found = run()
        assert state() == before
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE)


def test_models_pickle_under_a_default_device_and_dtype() -> None:
    model = Transformer(ModelArgs(max_batch_size=1, max_seq_len=8, **tiny_params()), device="cpu", dtype=torch.float32)
    expected = model.forward(torch.tensor([[1, 2]]), 0)
    file = io.BytesIO()
    with SETTINGS["default-device"](), SETTINGS["float64"]():
        pickle.dump(model, file)
        file.seek(0)
        copied = pickle.load(file)
    torch.testing.assert_close(copied.forward(torch.tensor([[1, 2]]), 0), expected)


def test_a_transformer_uses_torchs_default_device_and_dtype() -> None:
    args = ModelArgs(max_batch_size=1, max_seq_len=8, **tiny_params())
    source = Transformer(args, device="cpu", dtype=torch.float32)
    with torch.device("meta"):
        hollow = Transformer(args)
    assert hollow.device.type == "meta" and hollow.cache.k.is_meta and hollow.tok_embeddings.is_meta
    hollow.to_empty(device="cpu")
    hollow.load_state_dict(source.state_dict())
    tokens = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(hollow.forward(tokens, 0), source.forward(tokens, 0))
    with SETTINGS["bfloat16"]():
        assert Transformer(args).dtype == torch.bfloat16


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in MODES])
def test_sample_top_p_draws_the_same_under_every_setting(name: str) -> None:
    probs = torch.softmax(torch.arange(12.0).view(2, 6), -1)
    torch.manual_seed(5)
    expected = [sample_top_p(probs, p) for p in (0.0, 0.7, 1.0)]
    torch.manual_seed(5)
    with SETTINGS[name]():
        found = [sample_top_p(probs, p) for p in (0.0, 0.7, 1.0)]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_an_inherited_precision_stays_inherited() -> None:
    with attribute(products.matmul, "fp32_precision", "none"), attribute(torch.backends, "fp32_precision", "bf16"):
        with default_settings():
            assert products.matmul.fp32_precision == "ieee"
        assert products.matmul.fp32_precision == "bf16"
        with attribute(torch.backends, "fp32_precision", "tf32"):
            assert products.matmul.fp32_precision == "tf32"


def test_a_generator_with_default_settings_passes_on_close_and_throw() -> None:
    seen: list[str] = []

    @with_default_settings
    def steps(count: int) -> Iterator[int]:
        try:
            yield from range(count)
        finally:
            seen.append("closed")

    assert list(steps(3)) == [0, 1, 2]
    begun = steps(3)
    next(begun)
    with pytest.raises(KeyError):
        begun.throw(KeyError("x"))  # type: ignore[attr-defined]
    assert seen == ["closed", "closed"]
