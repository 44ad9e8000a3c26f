"""Which sizes of a test belong to `make test`, and which to `make test-all` only."""

from collections.abc import Collection, Mapping
from typing import Any

import pytest
from _pytest.mark import ParameterSet


def parameters(values: Mapping[str, Any], quick: Collection[str]) -> list[ParameterSet]:
    """Parameters by their ids; those that are not quick are marked slow."""
    unknown = set(quick) - set(values)
    assert not unknown, f"no parameters are called {unknown}"
    return [
        pytest.param(value, id=name, marks=() if name in quick else pytest.mark.slow) for name, value in values.items()
    ]
