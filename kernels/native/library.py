"""The compiled C++ kernels: `Op`, the description of one op, and `run`, which runs or records it.

`setup.py` builds the library where there is a C++ compiler. It is loaded at the first use.
"""

import ctypes
import functools
import os
import platform
import threading
from enum import IntEnum
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ABI_VERSION = 7  # as in src/op.hpp
ISA_VARIABLE = "FASTLLAMA_NATIVE_ISA"  # environment variable that selects an instruction set, for tests
ISAS = ("neon",) if platform.machine().lower() in ("aarch64", "arm64") else ("avx512", "avx2", "portable")


class Kind(IntEnum):
    """What an op computes."""

    EMBED = 0
    LINEAR = 1
    ATTENTION = 2
    ATTENTION_MERGE = 3
    STATISTICS = 4
    SAMPLE = 5
    DEQUANTIZE = 6
    WINDOW = 7
    ACCEPT = 8
    LOOK_UP = 9
    PUT_GUESS = 10


class Epilogue(IntEnum):
    """What a LINEAR op does with its sums."""

    STORE = 0
    ADD_RESIDUAL = 1
    SWIGLU = 2
    ROTATE_AND_APPEND = 3


DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FORMATS = {"int8": 1, "fp8": 2, "int4": 3}  # 0 is a weight in the model dtype

_INT32 = ("kind", "dtype", "epilogue", "has_state", "format", "scale_dtype", "has_zeros")
_POINTERS = (
    *("tokens", "positions", "rows", "x", "norm", "weight", "scales", "offsets", "bias", "residual", "out", "rope"),
    *("cache_k", "cache_v", "pages", "partial"),
    *("temperature", "top_p", "seed", "stream", "call", "logprobs", "state_tokens", "state_positions", "starts"),
    *("last", "is_stop", "out_tokens", "out_logprobs", "history", "guesses", "matched", "newest"),
)
_SIZES = (
    *("n_tokens", "width", "outputs", "n_heads", "n_kv_heads", "head_dim", "length", "cache_rows"),
    *("n_pages", "vocab", "begin", "n_steps", "out_stride", "split", "groups", "n_scales"),
    *("tokens_per_row", "n_guesses", "max_guesses"),
)


class Op(ctypes.Structure):
    """One op: the struct of src/op.hpp, which documents the fields."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in _INT32),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("eps", ctypes.c_double),
    ]


class Recording(threading.local):
    """The ops and tensors that a graph is recording on this thread."""

    ops: list[Op] | None = None  # None: ops run
    tensors: list[Tensor]
    allocating = False  # true while `empty` runs


recording = Recording()


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialized memory for an op's result."""
    recording.allocating = True
    try:
        return torch.empty(shape, dtype=dtype, device="cpu")
    finally:
        recording.allocating = False


def run(kind: Kind, dtype: torch.dtype, **fields: Tensor | int | float | None) -> None:
    """Run an op, or add it to the graph that is recording. Tensors are passed by their address."""
    tensors = [value for value in fields.values() if isinstance(value, Tensor)]
    values = {name: value.data_ptr() if isinstance(value, Tensor) else value for name, value in fields.items()}
    op = Op(kind=kind, dtype=DTYPES[dtype], **values)
    if recording.ops is None:
        load().fastllama_run(ctypes.byref(op), 1, torch.get_num_threads())
    else:
        recording.ops.append(op)
        recording.tensors += tensors


def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions that multiply bfloat16, which torch's matrix product uses."""
    return bool(load().fastllama_multiplies_bfloat16())


def instruction_set() -> str:
    """The instruction set of the kernels that run."""
    return str(load().fastllama_selected().decode())


def select_instruction_set(name: str) -> None:
    """Use the kernels of this instruction set, or the best where name is empty. ValueError where they do not run."""
    if not load().fastllama_select(name.encode()):
        raise ValueError(f"this CPU does not run the native kernels {name!r}: there are {', '.join(ISAS)}")


def obstacle() -> str | None:
    """Why the library cannot be used, with the remedy; None where it can."""
    try:
        load()
    except (OSError, ValueError) as error:
        return str(error)
    return None


@functools.cache
def load() -> Any:
    """The library. Raises OSError where it was not built or does not load, ValueError for one of another version."""
    found = [path for suffix in EXTENSION_SUFFIXES if (path := Path(__file__).with_name("_kernels" + suffix)).exists()]
    if not found:
        raise OSError(
            "its C++ kernels were not built. Install a C++ compiler, then install fastllama again (in a checkout: "
            "make native)"
        )
    library = ctypes.CDLL(str(found[0]))
    library.fastllama_abi.restype = ctypes.c_int64
    if library.fastllama_abi() != ABI_VERSION * 65536 + ctypes.sizeof(Op):
        raise ValueError("its C++ kernels are of another version: install fastllama again (in a checkout: make native)")
    library.fastllama_run.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
    library.fastllama_run.restype = None
    library.fastllama_select.argtypes = (ctypes.c_char_p,)
    library.fastllama_selected.restype = ctypes.c_char_p
    name = os.environ.get(ISA_VARIABLE, "")
    if name and not library.fastllama_select(name.encode()):
        raise ValueError(f"{ISA_VARIABLE}={name}, which this CPU does not run: it is one of {', '.join(ISAS)}")
    return library
