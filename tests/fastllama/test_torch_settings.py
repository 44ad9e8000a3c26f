"""What a caller has set in torch leaves answers as they are, and is found as it was left."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # here, or modes would import it within a test, and it would keep torch.empty as the tests have it
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastllama import Llama, ModelArgs, Transformer
from fastllama.benchmarks.tolerances import TOLERANCES
from fastllama.generation import sample_top_p
from fastllama.torch_settings import DENORMAL, default_settings, with_default_settings
from tests.support.checkpoints import random_weights, tiny_params, write_meta, write_tokenizer

PROMPTS = [[1, 2, 3], [7]]
TENSOR: Any = torch.tensor([[1, 2, 3, 4]])
TOLERANCE = TOLERANCES["divided logprobs", torch.float32]
products: Any = torch.backends.mkldnn
cuda_products = torch.backends.cuda.matmul


class Refusing(TorchDispatchMode):
    """Sees every operation, and lets none pass."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{function} was called under the caller's mode")


class RefusingFunctions(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{function} was called under the caller's mode")


@contextmanager
def setting(change: Callable[[Any], object], value: object, back: object) -> Iterator[None]:
    change(value)
    try:
        yield
    finally:
        change(back)


def attribute(owner: Any, name: str, value: object) -> AbstractContextManager[None]:
    return setting(lambda new: setattr(owner, name, new), value, getattr(owner, name))


def deterministic(*, warn_only: bool) -> AbstractContextManager[None]:
    return setting(lambda on: torch.use_deterministic_algorithms(on, warn_only=warn_only and on), True, False)


@contextmanager
def default_tensor_type(kind: str) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it deprecated, and Meta's scripts call it
        torch.set_default_tensor_type(kind)
        yield
        torch.set_default_tensor_type("torch.FloatTensor")


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "default-device": lambda: setting(torch.set_default_device, "meta", None),
    "device-context": lambda: torch.device("meta"),
    "float64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16": lambda: setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "float16": lambda: setting(torch.set_default_dtype, torch.float16, torch.float32),
    "tensor-type": lambda: default_tensor_type("torch.DoubleTensor"),
    "autocast": lambda: torch.autocast("cpu"),
    "autocast-float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "autocast-without-cache": lambda: torch.autocast("cpu", cache_enabled=False),
    "no-grad": torch.no_grad,
    "enable-grad": torch.enable_grad,
    "grad-off": lambda: setting(torch.set_grad_enabled, False, True),
    "inference": torch.inference_mode,
    "deterministic": lambda: deterministic(warn_only=False),
    "deterministic-warnings": lambda: deterministic(warn_only=True),
    "precision-high": lambda: setting(torch.set_float32_matmul_precision, "high", "highest"),
    "precision-medium": lambda: setting(torch.set_float32_matmul_precision, "medium", "highest"),
    "precision-of-all": lambda: attribute(torch.backends, "fp32_precision", "bf16"),
    "precision-of-onednn": lambda: attribute(products.matmul, "fp32_precision", "bf16"),
    "precision-of-cuda": lambda: attribute(cuda_products, "fp32_precision", "tf32"),
    "float16-sums": lambda: attribute(cuda_products, "allow_fp16_accumulation", True),
    "no-onednn": lambda: attribute(products, "enabled", False),
    "deterministic-onednn": lambda: attribute(products, "deterministic", True),
    "flushed-denormals": lambda: setting(torch.set_flush_denormal, True, False),
    "attention-by-formula": lambda: sdpa_kernel(SDPBackend.MATH),
    "attention-elsewhere": lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
    "fake-tensors": FakeTensorMode,
    "dispatch-mode": Refusing,
    "function-mode": RefusingFunctions,
    "threads": lambda: setting(torch.set_num_threads, 3, torch.get_num_threads()),
}
MODES = ("fake-tensors", "dispatch-mode", "function-mode")  # under which a test's own operations fail


def state() -> list[Any]:
    """All of torch's settings that can be read."""
    with torch.DisableTorchFunction():
        return [
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            [backend.fp32_precision for backend in (torch.backends, products, products.matmul, cuda_products)],
            cuda_products.allow_fp16_accumulation,
            products.enabled,
            products.deterministic,
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
            DENORMAL == 0,
            torch.get_num_threads(),
            torch._C._len_torch_dispatch_stack(),
            torch._C._len_torch_function_stack(),
        ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("checkpoint")
    write_meta(path, tiny_params(), random_weights(tiny_params(), seed=7))
    write_tokenizer(path)
    return str(path)


def build(folder: str, dtype: str) -> Llama:
    return Llama.build(folder, folder, 32, 2, device="cpu", dtype=dtype)


def answers(llm: Llama) -> tuple[Any, list[float]]:
    """(what is compared exactly, log-probabilities) of calls of every kind."""
    tokens, scores = llm.generate(PROMPTS, 5, temperature=0, logprobs=True, echo=True)
    drawn = llm.generate(TENSOR, 5, 0.9, 0.8, seed=3)
    text = llm.text_completion(["a b"], temperature=0, max_gen_len=3)
    streamed = [increment.tokens for increment in llm.stream(PROMPTS, 4, 0.7, seed=[1, 2])]
    assert scores is not None
    return (tokens, drawn, text, streamed), [score for row in scores for score in row]


@pytest.fixture(scope="module")
def built(folder: str) -> dict[str, tuple[Llama, Any, list[float]]]:
    models = {dtype: build(folder, dtype) for dtype in ("float32", "bfloat16", "float16")}
    return {dtype: (llm, *answers(llm)) for dtype, llm in models.items()}


@pytest.fixture(autouse=True, scope="module")
def precision_said() -> None:
    """Until somebody says one, torch calls float32's precision "none", and never again."""
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("name", SETTINGS)
def test_a_callers_setting_changes_no_answer(folder: str, built: dict[str, Any], name: str) -> None:
    generator = torch.get_rng_state()
    for dtype, (llm, expected, scores) in built.items():
        with SETTINGS[name]():
            before = state()
            found = answers(llm)
            anew = build(folder, dtype)
            assert state() == before
        for exact, logprobs in (found, answers(anew)):
            assert exact == expected
            assert logprobs == pytest.approx(scores, abs=TOLERANCE)
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "function-mode"])  # nn.Module.to is torch's own
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


def test_a_model_built_in_inference_mode_is_an_ordinary_one(folder: str, built: dict[str, Any]) -> None:
    with torch.inference_mode():
        llm = build(folder, "float32")
    assert not llm.model.tok_embeddings.is_inference() and not llm.model.cache.k.is_inference()
    llm.model.load_state_dict({name: weight.clone() for name, weight in llm.model.state_dict().items()})
    assert answers(llm)[0] == built["float32"][1]


@pytest.mark.parametrize("name", SETTINGS)
def test_between_two_steps_of_a_stream_the_settings_are_the_callers(built: dict[str, Any], name: str) -> None:
    llm = built["float32"][0]
    expected = [increment.tokens for increment in llm.stream(PROMPTS, 5, 0.7, seed=1, logprobs=True)]
    outside = state()
    with SETTINGS[name]():
        inside = state()
        stream = llm.stream(PROMPTS, 5, 0.7, seed=1, logprobs=True)
        found = [next(stream).tokens]
        assert state() == inside
    assert state() == outside
    found.append(next(stream).tokens)  # opened in one, gone on with in another, and back
    with SETTINGS[name]():
        found += [increment.tokens for increment in stream]
        assert state() == inside
    assert found == expected
    stream = llm.stream(PROMPTS, 5)
    with SETTINGS[name]():
        next(stream)
        stream.close()
        assert state() == inside
    assert state() == outside


def test_settings_come_back_after_an_error(built: dict[str, Any]) -> None:
    llm = built["float32"][0]
    for name in SETTINGS:
        with SETTINGS[name]():
            before = state()
            with pytest.raises(ValueError, match="^there must be at least one prompt, got an empty list$"):
                llm.generate([], 3)
            assert state() == before


def test_a_transformer_takes_torchs_defaults_where_none_are_named() -> None:
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


def test_a_neutral_generator_passes_on_what_its_caller_does() -> None:
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


def test_a_denormal_temperature_is_none_of_zero(built: dict[str, Any]) -> None:
    llm = built["float32"][0]
    drawn = [llm.generate(PROMPTS, 6, 1e-310, seed=1), llm.generate(PROMPTS, 6, 0, seed=1)]
    with SETTINGS["flushed-denormals"]():
        assert [llm.generate(PROMPTS, 6, 1e-310, seed=1), llm.generate(PROMPTS, 6, 0, seed=1)] == drawn
    assert drawn[0] == drawn[1]  # no two logits are equal here


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], object]] = {
    "grad": lambda function: torch.func.grad(function)(torch.ones(2)),
    "vmap": lambda function: torch.func.vmap(function)(torch.ones(2)),
    "functionalize": lambda function: torch.func.functionalize(function)(torch.ones(2)),
    "trace": lambda function: torch.jit.trace(function, torch.ones(2)),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.trace`:DeprecationWarning")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_around_a_call_sees_nothing_of_it(folder: str, built: dict[str, Any], name: str) -> None:
    llm, expected, scores = built["float32"]
    found: list[Any] = []

    def function(x: Tensor) -> Tensor:
        found.extend((answers(llm), answers(build(folder, "float32"))))
        return x.sum()

    TRANSFORMS[name](function)
    for exact, logprobs in found:
        assert exact == expected
        assert logprobs == pytest.approx(scores, abs=TOLERANCE)
    assert found
