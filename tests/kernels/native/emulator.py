"""Runs native ops as another processor would: the kernels compiled for it, in the user-mode emulator of QEMU."""

import ctypes
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastllama.kernels.native.library import DTYPES, Kind, Op

ROOT = Path(__file__).resolve().parents[3]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = ("-std=c++17", "-O2", "-pthread", "-static", "-fno-math-errno", "-ffp-contract=fast", "-w")


def obstacle() -> str | None:
    """Why there is no emulator, or None."""
    missing = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
    return f"needs {' and '.join(missing)}" if missing else None


class ArmProcess:
    """A process with the kernels for Arm. `run` takes the place of `library.run`."""

    def __init__(self, folder: Path) -> None:
        """Compile the kernels in a folder and start them."""
        program = folder / "run_ops"
        sources = sorted((ROOT / "kernels" / "native" / "src").glob("*.cpp"))
        sources.append(Path(__file__).with_name("run_ops.cpp"))
        subprocess.run([COMPILER, *FLAGS, *sources, "-o", program], check=True)
        self._process = subprocess.Popen([EMULATOR, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, kind: Kind, dtype: torch.dtype, **fields: Tensor | int | float | None) -> None:
        """Send the op and the memory of its tensors, and copy the memory back."""
        tensors = [value for value in fields.values() if isinstance(value, Tensor)]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        storages = {address: storage for address, storage in sorted(storages.items()) if storage.nbytes() > 0}
        values = {name: value.data_ptr() if isinstance(value, Tensor) else value for name, value in fields.items()}
        assert self._process.stdin is not None and self._process.stdout is not None
        for address, storage in storages.items():
            self._process.stdin.write(struct.pack("QQ", address, storage.nbytes()))
            self._process.stdin.write(_bytes(storage))
        self._process.stdin.write(struct.pack("Q", 0) + bytes(Op(kind=kind, dtype=DTYPES[dtype], **values)))
        self._process.stdin.write(struct.pack("Q", torch.get_num_threads()))
        self._process.stdin.flush()
        for storage in storages.values():
            answer = self._process.stdout.read(storage.nbytes())
            assert len(answer) == storage.nbytes(), "the emulated process has ended"
            _bytes(storage)[:] = answer

    def close(self) -> None:
        self._process.terminate()
        self._process.communicate()


def _bytes(storage: Any) -> memoryview:
    return memoryview((ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())).cast("B")
