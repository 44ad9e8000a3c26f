"""Which backend a device gets, and the messages of refusals."""

import importlib.util

import pytest
import torch

from fastllama.kernels import reference
from fastllama.kernels.launch import interpreter
from fastllama.kernels.select import backend

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as in a process that was started without TRITON_INTERPRET."""
    monkeypatch.setattr(interpreter, "interpreting", lambda: False)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as on a machine with a GPU of compute capability 9.0."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_a_cpu_gets_the_reference() -> None:
    assert backend(None, CPU) is reference is backend("reference", CPU)


@pytest.mark.usefixtures("compiling", "hopper")
def test_a_gpu_gets_the_kernels() -> None:
    assert backend(None, CUDA).__name__ == backend("fused", CUDA).__name__ == "fastllama.kernels.fused"


@pytest.mark.usefixtures("compiling")
def test_an_older_gpu_gets_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert backend(None, CUDA) is reference
    with pytest.raises(ValueError, match=r"need compute capability 8\.0 or higher and the GPU has 7\.5"):
        backend("fused", CUDA)


@pytest.mark.usefixtures("compiling")
def test_fused_on_a_cpu_names_the_interpreter() -> None:
    message = '"fused" does not run here: .*TRITON_INTERPRET=1 before python starts; backend="reference" does'
    with pytest.raises(ValueError, match=message):
        backend("fused", CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
def test_the_interpreter_runs_the_kernels_on_a_cpu() -> None:
    assert backend("fused", CPU).__name__ == "fastllama.kernels.fused"


@pytest.mark.usefixtures("hopper")
def test_without_triton_there_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    assert backend(None, CUDA) is reference
    with pytest.raises(ValueError, match="triton is not installed"):
        backend("fused", CUDA)


@pytest.mark.parametrize("name", ["abacus", "", 3])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="backend must be one of 'reference', 'fused', 'native', got "):
        backend(name, CPU)
