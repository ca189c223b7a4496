"""How weights are stored: the one rounding on write.

The arithmetic of an update is done in the wider of float32 and the weight's
dtype. What is written to a float32 or float64 variable is exact. In bfloat16,
with 8 bits, a step of less than 1/256 of the weight is lost to rounding to
nearest: the weight never moves. Here it isn't: `stochastic` rounding goes up
or down with the probability that makes it right on average, `compensated`
rounding (Kahan's) keeps what was lost in one more variable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keras import ops

MANTISSA_BITS = {"bfloat16": 7, "float16": 10}
SMALLEST = {"bfloat16": 2.0**-133, "float16": 2.0**-24}  # above 0
LARGEST = {"bfloat16": 2.0**128 - 2.0**120, "float16": 65504.0}
ROUNDINGS = ("stochastic", "compensated", "nearest")


def compute_dtype(dtype: str) -> str:
    """The dtype in which a weight of `dtype` is updated."""
    return "float64" if dtype == "float64" else "float32"


def is_narrow(dtype: str) -> bool:
    """Whether writing a float32 tensor to `dtype` rounds it."""
    return dtype in MANTISSA_BITS


def store(value: Any, dtype: str, bits: Any = None) -> Any:
    """Returns `value` in `dtype`, rounded stochastically if `bits` are given.

    Args:
        value: float32 or float64 tensor.
        dtype: name of the dtype to write.
        bits: None, or a tensor of random integers in [0, 65536) that
            broadcasts to the shape of `value`.
    """
    if bits is None or not is_narrow(dtype):
        return ops.cast(value, dtype)
    quantum = _spacing(value, dtype)
    # As many places as float32 has left behind `value / quantum`: with more,
    # the sum itself would round, and move what needs no rounding.
    places = 23 - MANTISSA_BITS[dtype]
    chance = ops.cast(ops.right_shift(bits, 16 - places), value.dtype) / 2**places
    rounded = ops.floor(value / quantum + chance) * quantum
    # Nothing is rounded up to infinity; infinities and NaN have no spacing.
    fits = ops.abs(rounded) <= LARGEST[dtype]
    return ops.cast(ops.where(fits, rounded, value), dtype)


def compensated(
    new: Any, slots: dict, *, w: Any, delta: Any, rounded: Callable
) -> tuple[Any, dict]:
    """Returns what is written of a new weight, and what is lost by that.

    Args:
        new: the new weight, `w + delta`.
        slots: `lost`, what was lost before, of the same shape.
        w: the weight before.
        delta: what is added to it.
        rounded: rounds a tensor to the weight's dtype.
    """
    new = w + (delta + slots["lost"])
    written = rounded(new)
    return written, {"lost": new - written}


def _spacing(value: Any, dtype: str) -> Any:
    """The distance between the numbers of `dtype` around each of `value`."""
    exponent = ops.bitwise_and(ops.view(value, "int32"), 0x7F800000)
    power_of_two = ops.view(exponent, "float32")
    # float32's smallest normal number bounds bfloat16's subnormal spacing.
    smallest = max(SMALLEST[dtype], 2.0**-126)
    return ops.maximum(power_of_two * 2.0 ** -MANTISSA_BITS[dtype], smallest)
