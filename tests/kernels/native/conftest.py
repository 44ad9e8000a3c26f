"""Fixtures of the native kernels' tests: every instruction set of this CPU, on one and on several threads."""

from collections.abc import Iterator

import pytest
import torch

from fastllama.kernels import native
from fastllama.kernels.native import checking, library, many_tokens
from tests.kernels.native import emulator

THREADS = (1, 3)
EMULATED = "neon-emulated"


@pytest.fixture(autouse=True)
def built() -> None:
    """Skip where the kernels were not built."""
    obstacle = library.obstacle()
    if obstacle is not None:
        pytest.skip(f"the native backend does not run here: {obstacle}")


@pytest.fixture(scope="session")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[emulator.ArmProcess]:
    """The kernels for Arm in an emulator."""
    obstacle = emulator.obstacle()
    if obstacle is not None:
        pytest.skip(f"Arm's kernels on this CPU: {obstacle}")
    process = emulator.ArmProcess(tmp_path_factory.mktemp("arm"))
    yield process
    process.close()


@pytest.fixture(params=[*library.ISAS, pytest.param(EMULATED, marks=pytest.mark.slow)])
def isa(request: pytest.FixtureRequest, built: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each instruction set that this CPU runs, and Arm's in an emulator."""
    if request.param == EMULATED:
        for module in (native, many_tokens, checking):
            monkeypatch.setattr(module, "run", request.getfixturevalue("arm").run)
        yield EMULATED
        return
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
