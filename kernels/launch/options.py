"""What launches do where a GPU can: switches of the code that launches, which a model or a benchmark turns off.

They hold for whatever the same thread launches within a block, so that two models in two threads each have their own. A
captured graph keeps what it has. This file imports nothing: the decode loop asks here without triton, too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class Switches(NamedTuple):
    """All of them."""

    launch: bool = True  # as dependent on the one before
    prefetch: bool = True  # only with a dependent launch: without one there is nothing to wait for


_switches: ContextVar[Switches] = ContextVar("switches", default=Switches())  # noqa: B039 (it never changes)


def switches() -> Switches:
    """Those that hold here."""
    return _switches.get()


@contextmanager
def switched(*, launch: bool = True, prefetch: bool = True) -> Iterator[None]:
    """Within the block, launch and prefetch so."""
    token = _switches.set(Switches(launch, prefetch))
    try:
        yield
    finally:
        _switches.reset(token)
