"""Triton's interpreter, mended: what a machine without a GPU runs the kernels with (TRITON_INTERPRET=1).

As it comes, the interpreter holds a bfloat16 as its 16 bits and forgets it: sums, products and dots work on the bits as
if they were integers, and rounding cuts instead of rounding to the nearest even. `mend` makes every operation widen to
float32 and round back, as torch and a GPU do, value for value. It also keeps the language patched between calls, which
the interpreter otherwise does anew for every call of a device function: three to six times faster.

Everything here changes the process for good, so it is done only where TRITON_INTERPRET was set before triton was
imported, and such a process launches nothing on a GPU.
"""

import types
from functools import cache
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter as stock

BITS_BFLOAT16 = 16
ROUND_HALF = np.uint32(0x7FFF)
NAN_BFLOAT16 = np.uint16(0x7FC0)
COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)
BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


# Decided for good when kernels are defined, which is when their modules are imported.
INTERPRETING = bool(triton.knobs.runtime.interpret)


def interpreting() -> bool:
    """Whether this process's kernels run in the interpreter: TRITON_INTERPRET=1 was set before they were imported."""
    return INTERPRETING


@cache
def mend() -> None:
    """Make the interpreter's bfloat16 right and its calls quick, for the rest of the process."""
    _mend_bfloat16()
    _mend_integers()
    _mend_masks()
    _patch_language_once()


def widen(handle: Any) -> np.ndarray:
    """A handle's values, those of a bfloat16 as float32."""
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


def _narrowed(values: np.ndarray) -> Any:
    return stock.TensorHandle(narrow(values), tl.bfloat16)


def _widened(handle: Any) -> Any:
    return stock.TensorHandle(widen(handle), tl.float32) if handle.dtype.scalar == tl.bfloat16 else handle


def _mend_bfloat16() -> None:
    builder = stock.InterpreterBuilder
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
            return _narrowed(source.data.astype(np.float32))
        return stock.TensorHandle(widen(source).astype(stock._get_np_dtype(target)), kinds[1])

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        kinds = source.dtype.scalar, target.scalar
        nearest = rounding in (None, stock._ir.ROUNDING_MODE.RTNE)
        if tl.bfloat16 in kinds and nearest and all(kind.primitive_bitwidth != 8 for kind in kinds):
            return cast_impl(self, source, target)
        return fp_to_fp(self, source, target, rounding)

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if left.dtype.scalar != tl.bfloat16 or op in BITWISE:
            return binary(self, left, right, op)
        result = op(widen(left), widen(right))
        return stock.TensorHandle(result, tl.int1) if op in COMPARISONS else _narrowed(result)

    def unary_op(self: Any, operand: Any, op: Any) -> Any:
        return _narrowed(op(widen(operand))) if operand.dtype.scalar == tl.bfloat16 else unary(self, operand, op)

    def create_dot(self: Any, a: Any, b: Any, accumulator: Any, *how: Any) -> Any:
        return dot(self, _widened(a), _widened(b), accumulator, *how)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        return _narrowed(widen(x) * widen(y) + widen(z)) if z.dtype.scalar == tl.bfloat16 else fma(self, x, y, z)

    def get_bf16(self: Any, value: float) -> Any:
        return _narrowed(np.array([value], np.float32))

    for function in (cast_impl, create_fp_to_fp, binary_op, unary_op, create_dot, create_fma, get_bf16):
        setattr(builder, function.__name__, function)


def _mend_integers() -> None:
    """numpy 2 refuses -1 as an unsigned integer, and triton 3.6 an array of one element as a bound of `range`."""

    def get_all_ones_value(self: Any, kind: Any) -> Any:
        dtype = stock._get_np_dtype(kind)
        ones = np.full(1, True) if dtype == np.bool_ else np.full(1, -1, np.int64).astype(dtype)
        return stock.TensorHandle(ones, kind.scalar)

    stock.InterpreterBuilder.get_all_ones_value = get_all_ones_value
    patch = stock._patch_lang_tensor

    def patch_tensor(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        index = lambda self: int(self.handle.data.squeeze())  # noqa: E731
        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    stock._patch_lang_tensor = patch_tensor


def _mend_masks() -> None:
    """A scalar's truth joined with a tensor's is an integer to the interpreter, which triton 3.9 takes for no mask."""
    builder = stock.InterpreterBuilder

    load, store = builder.create_masked_load, builder.create_masked_store

    def as_mask(handle: Any) -> Any:
        return stock.TensorHandle(handle.data.astype(np.bool_), tl.int1)

    def create_masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        return load(self, ptrs, as_mask(mask), *rest)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(self, ptrs, value, as_mask(mask), *rest)

    for function in (create_masked_load, create_masked_store):
        setattr(builder, function.__name__, function)


def _patch_language_once() -> None:
    """And let numbers overflow in silence, as they do on a GPU."""

    class Kept:
        """What a call would put back after itself: nothing."""

        def restore(self) -> None:
            pass

    sees_language = types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})
    stock._patch_lang(sees_language)
    stock._patch_lang = lambda function: Kept()
    execute = stock.GridExecutor.__call__
    stock.GridExecutor.__call__ = np.errstate(all="ignore")(execute)
    stock.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
