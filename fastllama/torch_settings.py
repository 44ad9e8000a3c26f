"""Runs fastllama under torch's default settings, and restores the caller's settings afterwards.

Torch has settings that affect all code: modes that see every call (`torch.set_default_device`, FakeTensorMode, a
caller's own), autocast, the precision of float32 products, the implementations that attention may use, deterministic
algorithms, the number of threads. None of them may change fastllama's results, and fastllama may not change the
caller's. Two settings are handled elsewhere: fastllama names every dtype, so the default dtype has no effect, and uses
`torch.inference_mode` where grad mode matters.

Settings of the whole process are changed only if they would affect results. Other threads then see the change during
a step.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar, cast

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import _disable_current_modes

from fastllama import threads

AUTOCAST_DEVICES = ("cpu", "cuda")
ATTENTION = {
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
}
CUDA_PRODUCTS: tuple[Any, ...] = (torch.backends.cuda.matmul,) * torch.backends.cuda.is_built()
FLOAT32_PRODUCTS: tuple[Any, ...] = (cast(Any, torch.backends.mkldnn).matmul, *CUDA_PRODUCTS)
DENORMAL = 5e-324  # equals 0 in a thread that flushes denormals (torch.set_flush_denormal); torch has no getter for it
FULL_PRECISION = ("none", "ieee")  # values of fp32_precision; "none" is torch's value before anything is set

Function = TypeVar("Function", bound=Callable[..., Any])


def with_default_settings(function: Function) -> Function:
    """Run a function under `default_settings`; for a generator, each of its steps, and not the code between them."""
    if not inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            with default_settings():
                return function(*arguments, **keywords)

        return cast(Function, call)

    @functools.wraps(function)
    def steps(*arguments: Any, **keywords: Any) -> Generator[Any]:
        inner = function(*arguments, **keywords)
        try:
            while True:
                with default_settings():
                    try:
                        value = next(inner)
                    except StopIteration:
                        return
                yield value
        finally:
            with default_settings():
                inner.close()

    return cast(Function, steps)


@contextlib.contextmanager
def default_settings() -> Iterator[None]:
    """A block in which torch's settings are those that fastllama's results need."""
    with torch.DisableTorchFunction(), contextlib.ExitStack() as stack:
        if torch._C._len_torch_dispatch_stack():
            stack.enter_context(_disable_current_modes())
        if torch._C._functorch.peek_interpreter_stack() is not None:
            stack.enter_context(_no_transforms())
        if torch._C._get_tracing_state() is not None:
            stack.enter_context(_no_trace())
        for device in AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        for products in CUDA_PRODUCTS:
            if products.allow_fp16_accumulation:
                stack.enter_context(_float32_sums(products))
        if not all(enabled() for enabled in ATTENTION.values()):
            stack.enter_context(sdpa_kernel(list(ATTENTION)))
        for products in FLOAT32_PRODUCTS:
            if products.fp32_precision not in FULL_PRECISION:
                stack.enter_context(_full_precision(products))
        if DENORMAL == 0:
            stack.enter_context(_keep_denormals())
        if torch.are_deterministic_algorithms_enabled():
            stack.enter_context(_any_algorithm())
        stack.enter_context(threads.limited())
        yield


def _no_transforms() -> contextlib.AbstractContextManager[Any]:
    """A block that surrounding function transforms (torch.func.grad, vmap, functionalize) do not see."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return temporarily_clear_interpreter_stack()


@contextlib.contextmanager
def _no_trace() -> Iterator[None]:
    """A block that torch.jit.trace does not record."""
    internal: Any = torch._C
    state = internal._get_tracing_state()
    internal._set_tracing_state(None)
    try:
        yield
    finally:
        internal._set_tracing_state(state)


@contextlib.contextmanager
def _keep_denormals() -> Iterator[None]:
    """A block in which denormals are not flushed to 0."""
    torch.set_flush_denormal(False)
    try:
        yield
    finally:
        torch.set_flush_denormal(True)


@contextlib.contextmanager
def _float32_sums(products: Any) -> Iterator[None]:
    """A block in which float16 products are not accumulated in float16."""
    products.allow_fp16_accumulation = False
    try:
        yield
    finally:
        products.allow_fp16_accumulation = True


@contextlib.contextmanager
def _full_precision(products: Any) -> Iterator[None]:
    """A block in which float32 products have float32's full precision."""
    before = products.fp32_precision
    products.fp32_precision = "ieee"
    try:
        yield
    finally:
        # `before` may have been inherited from torch.backends; "none" inherits again.
        products.fp32_precision = "none"
        if products.fp32_precision != before:
            products.fp32_precision = before


@contextlib.contextmanager
def _any_algorithm() -> Iterator[None]:
    """A block with deterministic algorithms off. They make some ops raise errors, and torch.empty fill its memory."""
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warn_only)
