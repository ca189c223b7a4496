"""Random numbers as an integer hash of (seed, update, variable, element).

The same eagerly, compiled, on each replica and on each of Keras's backends, so
that replicas stay equal; TensorFlow's own generators give other numbers eagerly
than compiled, and cost gigabytes on TPU.
"""

from __future__ import annotations

import math
from typing import Any

from keras import ops


def bits(shape: tuple[int, ...], update: Any, variable: int) -> Any:
    """Returns integers in [0, 65536), a hash of (update, variable, element).

    The same eagerly, compiled, on each replica and on each of Keras's
    backends: replicas that round with them stay equal.

    Args:
        shape: the shape to return.
        update: int32 scalar, the number of this update.
        variable: index of the variable in its optimizer.
    """
    elements = ops.arange(math.prod(shape), dtype="int32")
    return ops.reshape(bits_of(elements, update, variable), shape)


def bits_of(elements: Any, update: Any, variable: int) -> Any:
    """As `bits`, for the given element numbers (int32, any shape)."""
    return ops.bitwise_and(_word(elements, update, variable), 0xFFFF)


def normal(
    shape: tuple[int, ...], update: Any, variable: int, dtype: str, seed: int
) -> Any:
    """Returns standard normal numbers, none beyond 6, by Box and Muller's method.

    Args:
        shape, update, variable: as of `bits`.
        dtype: float32 or float64.
        seed: from 0; another seed gives other numbers.
    """
    elements = ops.arange(math.prod(shape), dtype="int32")

    def uniform(stream: int) -> Any:
        word = _word(elements, update, variable, 2 * seed + stream)
        return (ops.cast(ops.bitwise_and(word, 0xFFFFFF), dtype) + 0.5) / 2.0**24

    radius = ops.sqrt(-2.0 * ops.log(uniform(1)))
    return ops.reshape(radius * ops.cos(2 * math.pi * uniform(2)), shape)


def _word(elements: Any, update: Any, variable: int, stream: int = 0) -> Any:
    """An int32 for each element; stream 0 rounds, the others are for noise."""
    key = _mix(ops.cast(update, "int32") + _as_int32(0x9E3779B9 * (variable + 1)))
    if stream:
        key = _mix(key + _as_int32(0x85EBCA6B * stream))
    return _mix(ops.bitwise_xor(_mix(elements), key))


def _mix(x: Any) -> Any:
    """A bijection of int32 in which each bit depends on all (lowbias32)."""
    x = ops.bitwise_xor(x, _shift_right(x, 16)) * _as_int32(0x7FEB352D)
    x = ops.bitwise_xor(x, _shift_right(x, 15)) * _as_int32(0x846CA68B)
    return ops.bitwise_xor(x, _shift_right(x, 16))


def _shift_right(x: Any, count: int) -> Any:
    """A shift that brings in zeros; `>>` on int32 repeats the sign."""
    mask = (1 << (32 - count)) - 1
    return ops.bitwise_and(ops.right_shift(x, count), mask)


def _as_int32(number: int) -> int:
    """The int32 with the low 32 bits of `number`."""
    number &= 0xFFFFFFFF
    return number - (1 << 32) if number >> 31 else number
