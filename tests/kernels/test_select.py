"""Which backend a device gets, and the error messages."""

import importlib.util
from pathlib import Path

import pytest
import torch

from fastllama.kernels import reference, select
from fastllama.kernels.launch import interpreter
from fastllama.kernels.native import library
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


def test_a_cpu_gets_the_native_kernels_if_they_were_built(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert backend("reference", CPU) is reference
    if library.obstacle() is None:
        assert backend(None, CPU).__name__ == "fastllama.kernels.native"
    monkeypatch.setattr(library, "obstacle", lambda: "no compiler was here")
    select._warn.cache_clear()
    assert backend(None, CPU) is reference is backend(None, CPU)
    assert len(caplog.records) == 1 and "no compiler was here" in caplog.text


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
def test_without_triton_a_gpu_gets_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    assert backend(None, CUDA) is reference
    with pytest.raises(ValueError, match="triton is not installed"):
        backend("fused", CUDA)


@pytest.mark.parametrize("name", ["abacus", "", 3])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="backend must be one of 'reference', 'fused', 'native', got "):
        backend(name, CPU)


def test_native_on_a_gpu_or_without_its_kernels_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match='"native" does not run here: its kernels need a CPU and the device is'):
        backend("native", CUDA)
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    library.load.cache_clear()
    with pytest.raises(
        ValueError, match=r'kernels were not built. Install a C\+\+ compiler.*; backend="reference" does'
    ):
        backend("native", CPU)
    library.load.cache_clear()


def test_an_instruction_set_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if library.obstacle() is not None:
        pytest.skip("the native kernels were not built")
    assert backend("native", CPU).__name__ == "fastllama.kernels.native"
    monkeypatch.setenv(library.ISA_VARIABLE, "mmx")
    library.load.cache_clear()
    with pytest.raises(ValueError, match="FASTLLAMA_NATIVE_ISA=mmx, which this CPU does not run: it is one of avx512"):
        backend("native", CPU)
    library.load.cache_clear()
