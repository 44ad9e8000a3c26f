"""Marks the sizes of a test that only `make test-all` runs."""

from collections.abc import Collection, Mapping
from typing import Any

import pytest
from _pytest.mark import ParameterSet


def parameters(values: Mapping[str, Any], quick: Collection[str]) -> list[ParameterSet]:
    """pytest parameters with the keys as ids; those not in `quick` are marked slow."""
    unknown = set(quick) - set(values)
    assert not unknown, f"no parameters are called {unknown}"
    return [
        pytest.param(value, id=name, marks=() if name in quick else pytest.mark.slow) for name, value in values.items()
    ]
