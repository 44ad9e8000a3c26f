"""Torch settings that a caller may change, and a snapshot of all settings that have getters."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch._dynamo  # imported here, so that no mode imports it during a test, while torch.empty is patched
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastllama.torch_settings import DENORMAL

products: Any = torch.backends.mkldnn
cuda_products = torch.backends.cuda.matmul


class Refusing(TorchDispatchMode):
    """A mode that raises an error for every operation it sees."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{function} was called under the caller's mode")


class RefusingFunctions(TorchFunctionMode):
    """A mode that raises an error for every torch function it sees."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{function} was called under the caller's mode")


@contextmanager
def setting(change: Callable[[Any], object], value: object, back: object) -> Iterator[None]:
    """A block between change(value) and change(back)."""
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
        warnings.simplefilter("ignore")  # it is deprecated, but Meta's scripts call it
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
MODES = ("fake-tensors", "dispatch-mode", "function-mode")  # under these, a test cannot run operations itself


def state() -> list[Any]:
    """The values of all of torch's settings that have getters."""
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


def set_full_precision() -> None:
    """Set float32's precision, so that snapshots compare equal: torch reports "none" until it is first set."""
    torch.set_float32_matmul_precision("highest")
