"""Fixes of Triton's interpreter, which runs the kernels on a machine without a GPU (TRITON_INTERPRET=1).

The original interpreter stores a bfloat16 as its 16 bits and then computes with these bits as if they were integers.
Its conversion truncates instead of rounding to nearest even. `patch` makes every operation convert to float32 and round
back, as torch and a GPU do, value for value. It also patches the language once instead of at every call of a device
function, which makes kernels three to six times faster.

The patches are permanent for the process. They are made only if TRITON_INTERPRET was set before triton was imported;
such a process launches nothing on a GPU.
"""

import types
from functools import cache
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter

BITS_BFLOAT16 = 16
ROUND_HALF = np.uint32(0x7FFF)
NAN_BFLOAT16 = np.uint16(0x7FC0)
COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)
BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)

# Read once: Triton decides it when kernels are defined, which is when their modules are imported.
INTERPRETING = bool(triton.knobs.runtime.interpret)


def interpreting() -> bool:
    """True if this process interprets its kernels: TRITON_INTERPRET=1 was set before they were imported."""
    return INTERPRETING


@cache
def patch() -> None:
    """Apply all fixes to the interpreter, for the rest of the process."""
    _patch_bfloat16()
    _patch_integers()
    _patch_masks()
    _patch_language_once()


def widen(handle: Any) -> np.ndarray:
    """The values of a handle; those of a bfloat16 as float32."""
    if handle.dtype.scalar != tl.bfloat16:
        values: np.ndarray = handle.data
    else:
        values = (handle.data.astype(np.uint32) << BITS_BFLOAT16).view(np.float32)
    return values


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 values -> the bits of the nearest bfloat16, ties to even."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    with np.errstate(over="ignore"):
        rounded = bits + ((bits >> BITS_BFLOAT16 & 1) + ROUND_HALF)
    return np.where(np.isnan(values), NAN_BFLOAT16, (rounded >> BITS_BFLOAT16).astype(np.uint16))


def _bfloat16_handle(values: np.ndarray) -> Any:
    return triton_interpreter.TensorHandle(narrow(values), tl.bfloat16)


def _float32_handle(handle: Any) -> Any:
    return triton_interpreter.TensorHandle(widen(handle), tl.float32) if handle.dtype.scalar == tl.bfloat16 else handle


def _patch_bfloat16() -> None:
    builder = triton_interpreter.InterpreterBuilder
    cast, fp_to_fp, binary, unary, dot, fma = (
        builder.cast_impl,
        builder.create_fp_to_fp,
        builder.binary_op,
        builder.unary_op,
        builder.create_dot,
        builder.create_fma,
    )

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        kinds = source.dtype.scalar, target.scalar
        if tl.bfloat16 not in kinds or kinds[0] == kinds[1]:
            return cast(self, source, target)
        if kinds[1] == tl.bfloat16:
            return _bfloat16_handle(source.data.astype(np.float32))
        return triton_interpreter.TensorHandle(widen(source).astype(triton_interpreter._get_np_dtype(target)), kinds[1])

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        kinds = source.dtype.scalar, target.scalar
        nearest = rounding in (None, triton_interpreter._ir.ROUNDING_MODE.RTNE)
        if tl.bfloat16 in kinds and nearest and all(kind.primitive_bitwidth != 8 for kind in kinds):
            return cast_impl(self, source, target)
        return fp_to_fp(self, source, target, rounding)

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if left.dtype.scalar != tl.bfloat16 or op in BITWISE:
            return binary(self, left, right, op)
        result = op(widen(left), widen(right))
        return triton_interpreter.TensorHandle(result, tl.int1) if op in COMPARISONS else _bfloat16_handle(result)

    def unary_op(self: Any, operand: Any, op: Any) -> Any:
        return _bfloat16_handle(op(widen(operand))) if operand.dtype.scalar == tl.bfloat16 else unary(self, operand, op)

    def create_dot(self: Any, a: Any, b: Any, accumulator: Any, *options: Any) -> Any:
        return dot(self, _float32_handle(a), _float32_handle(b), accumulator, *options)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        return _bfloat16_handle(widen(x) * widen(y) + widen(z)) if z.dtype.scalar == tl.bfloat16 else fma(self, x, y, z)

    def get_bf16(self: Any, value: float) -> Any:
        return _bfloat16_handle(np.array([value], np.float32))

    for function in (cast_impl, create_fp_to_fp, binary_op, unary_op, create_dot, create_fma, get_bf16):
        setattr(builder, function.__name__, function)


def _patch_integers() -> None:
    """Fix -1 as an unsigned integer (refused by numpy 2) and one-element arrays as bounds of `range` (triton 3.6)."""

    def get_all_ones_value(self: Any, kind: Any) -> Any:
        dtype = triton_interpreter._get_np_dtype(kind)
        ones = np.full(1, True) if dtype == np.bool_ else np.full(1, -1, np.int64).astype(dtype)
        return triton_interpreter.TensorHandle(ones, kind.scalar)

    triton_interpreter.InterpreterBuilder.get_all_ones_value = get_all_ones_value
    patch_lang_tensor = triton_interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, *scope: Any) -> None:
        patch_lang_tensor(tensor, *scope)
        index = lambda self: int(self.handle.data.squeeze())  # noqa: E731
        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    triton_interpreter._patch_lang_tensor = patch_tensor


def _patch_masks() -> None:
    """Fix masks that combine a scalar and a tensor: the interpreter makes them integers, which triton 3.9 refuses."""
    builder = triton_interpreter.InterpreterBuilder

    load, store = builder.create_masked_load, builder.create_masked_store

    def as_mask(handle: Any) -> Any:
        return triton_interpreter.TensorHandle(handle.data.astype(np.bool_), tl.int1)

    def create_masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        return load(self, ptrs, as_mask(mask), *rest)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(self, ptrs, value, as_mask(mask), *rest)

    for function in (create_masked_load, create_masked_store):
        setattr(builder, function.__name__, function)


def _patch_language_once() -> None:
    """Patch the language once for all calls, and ignore overflows, as a GPU does."""

    class NoScope:
        """Restores nothing after a call."""

        def restore(self) -> None:
            pass

    language_user = types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})
    triton_interpreter._patch_lang(language_user)
    triton_interpreter._patch_lang = lambda function: NoScope()
    execute = triton_interpreter.GridExecutor.__call__
    triton_interpreter.GridExecutor.__call__ = np.errstate(all="ignore")(execute)
    triton_interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
