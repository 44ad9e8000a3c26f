"""Fixtures of the native kernels' tests: every instruction set of this CPU, on one and on several threads."""

from collections.abc import Iterator

import pytest
import torch

from fastllama.kernels.native import library

THREADS = (1, 3)


@pytest.fixture(autouse=True)
def built() -> None:
    """Skip where the kernels were not built."""
    obstacle = library.obstacle()
    if obstacle is not None:
        pytest.skip(f"the native backend does not run here: {obstacle}")


@pytest.fixture(params=library.ISAS)
def isa(request: pytest.FixtureRequest, built: None) -> Iterator[str]:
    """Each instruction set that this CPU runs."""
    before = library.instruction_set()
    try:
        library.select_instruction_set(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    library.select_instruction_set(before)


@pytest.fixture(params=THREADS, ids=lambda count: f"threads{count}")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """One thread and several."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
