"""Make Triton's interpreter right for bfloat16, and runnable with the NumPy that is installed.

The interpreter holds bfloat16 as raw bits: it multiplies them as integers and truncates when it narrows.
These patches give ``tl.dot`` and casts their meaning on hardware (exact products, float32 sums, rounding
to nearest even) and turn any other arithmetic on bfloat16 into an error instead of a wrong number.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.language import standard
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction


def _to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits + (((bits >> 16) & 1) + 0x7FFF)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded >> 16).astype(np.uint16)


def install() -> None:
    """Patch the interpreter of this process, once."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "_bfloat16_is_right", False):
        return
    builder._bfloat16_is_right = True
    stock_cast, stock_binary = builder.cast_impl, builder.binary_op
    stock_patch = interpreter._patch_lang_tensor

    def create_dot(self, a, b, d, *rest):
        left, right = (
            _to_float32(x.data) if x.dtype.scalar == tl.bfloat16 else x.data.astype(np.float32)
            for x in (a, b)
        )
        # Tensor cores sum exact products with more bits than float32 has, then round to it.
        total = np.matmul(left, right, dtype=np.float64) + d.data
        return interpreter.TensorHandle(total.astype(d.data.dtype), d.dtype.scalar)

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target and src.data.dtype == interpreter._get_np_dtype(target):
            return src
        if source == tl.bfloat16:
            src = interpreter.TensorHandle(_to_float32(src.data), tl.float32)
            return src if target == tl.float32 else stock_cast(self, src, dst_type)
        if target == tl.bfloat16:
            return interpreter.TensorHandle(_to_bfloat16(src.data.astype(np.float32)), tl.bfloat16)
        return stock_cast(self, src, dst_type)

    def binary_op(self, lhs, rhs, op):
        if tl.bfloat16 in (lhs.dtype.scalar, rhs.dtype.scalar):
            raise TypeError("bfloat16 arithmetic: convert to float32 first")
        result = stock_binary(self, lhs, rhs, op)
        if result.data.dtype == np.bool_:
            # The stock handle keeps the operands' type, by which 3.9 widens a mask that it spreads to a block.
            result.dtype = tl.int1
        return result

    def patch_lang_tensor(tensor, scope):
        stock_patch(tensor, scope)
        # NumPy 2.4 refuses int() of a one-element array, which is how the interpreter holds scalars.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def create_fma(self, x, y, z):
        # One rounding, as on hardware; the stock interpreter rounds the product too.
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    builder.create_dot = create_dot
    builder.create_fma = create_fma
    builder.cast_impl = cast_impl
    builder.binary_op = binary_op
    builder.create_fp_to_fp = lambda self, src, dst_type, rounding: cast_impl(self, src, dst_type)
    interpreter._patch_lang_tensor = patch_lang_tensor
    # CPU tensors are worked on where they lie; copying whole storages onto themselves touches every page
    # of the large sparse ones.
    interpreter.GridExecutor._restore_args_dev = lambda self, *args: None
    _interpret_standard_library()


def _interpret_standard_library() -> None:
    """Make ``tl.max`` and its like interpretable where Triton was imported before interpretation was asked for."""
    for name, value in vars(standard).items():
        if isinstance(value, JITFunction) and not name.startswith("_"):
            interpreted = interpreter.InterpretedFunction(value.fn)
            for module in (tl, standard):
                if hasattr(module, name):
                    setattr(module, name, interpreted)
