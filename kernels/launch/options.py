"""Options of kernel launches, which a model or a benchmark can override.

An override holds for the current thread within a `with` block, so models in different threads have their own options.
A captured graph keeps the options of its capture. This file imports no triton: the decode loop uses it without triton.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class LaunchOptions(NamedTuple):
    """Features that launches use if the GPU supports them."""

    dependent: bool = True  # programmatic dependent launch
    prefetch: bool = True  # prefetch weights and cache to L2 before the wait; only with dependent launch


_options: ContextVar[LaunchOptions] = ContextVar("options", default=LaunchOptions())  # noqa: B039 (immutable)


def launch_options() -> LaunchOptions:
    """The options of the current context."""
    return _options.get()


@contextmanager
def override_launch_options(*, dependent: bool = True, prefetch: bool = True) -> Iterator[None]:
    """Within the block, launch with these options."""
    token = _options.set(LaunchOptions(dependent, prefetch))
    try:
        yield
    finally:
        _options.reset(token)
