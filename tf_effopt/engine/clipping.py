"""Gradient clipping: by value, by the norm of each tensor, by that of all.

Pascanu et al., "On the difficulty of training recurrent neural networks",
2013, https://arxiv.org/abs/1211.5063 (by norm).
"""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

# What a gradient whose squares overflow is multiplied by, to look at it again: the
# squares of the largest number fit then, and those of what adds to such a norm, too.
SHRINK = {"float32": 2.0**-96, "float64": 2.0**-540}

# XLA on CPU writes the squares to memory before it adds them up, and a TPU's sum of
# a tensor's elements is slow. Adding this many parts of a large tensor to each other
# first leaves an eighth of both.
PARTS = 8
LARGE = 65536


def squared_norm(*gradients: Any) -> Any:
    """Returns the sum of squares of all elements of tensors of one shape and dtype."""
    if len(gradients) == 1:
        # Not of several: a rule's own sums over a tensor share their loop with these.
        gradients = _parts(gradients[0])
    return ops.sum(sum(ops.square(g) for g in gradients))


def alike(gradients: list[Any]) -> list[list[Any]]:
    """Returns the gradients in groups of one shape and dtype.

    A model has many tensors and few shapes. A sum of tensors is cheap, that of a
    tensor's elements isn't: on a TPU it takes as long as the rest of a small update.
    """
    groups: dict[tuple, list[Any]] = {}
    for i, g in enumerate(gradients):
        alone = i if None in g.shape else None
        groups.setdefault((*g.shape, str(g.dtype), alone), []).append(g)
    return list(groups.values())


def _parts(g: Any) -> list[Any]:
    """A large tensor's parts, of one shape; a small one itself."""
    if None in g.shape or math.prod(g.shape) < LARGE:
        return [g]
    axis = next((i for i, n in enumerate(g.shape[:-1]) if n % PARTS == 0), None)
    return [g] if axis is None else ops.split(g, PARTS, axis=axis)


def clip_by_value(g: Any, clipvalue: Any) -> Any:
    """Returns `g` with each element moved into [-clipvalue, clipvalue]."""
    return ops.clip(g, -clipvalue, clipvalue)


def factors(norm: Any, clipnorm: Any, root: Any) -> tuple[Any, Any]:
    """Returns the two factors of gradients that make `norm` at most `clipnorm`.

    Args:
        norm: scalar, of one gradient, or of all together; or a vector of such.
        clipnorm: scalar, the largest norm allowed.
        root: what `root_of_factor` returns.
    """
    return divided(clipnorm / ops.maximum(norm, clipnorm), root)


def divided(factor: Any, root: Any) -> tuple[Any, Any]:
    """Returns 1 and `factor`, or, unless `root` is 0, `root` and `root`.

    The quotient of two norms may be too small a number for float32.
    """
    overflowed = root > 0
    first = ops.where(overflowed, root, ops.ones_like(factor))
    return first, ops.where(overflowed, root, factor)


def multiplied(g: Any, *, first: Any, second: Any) -> Any:
    """Returns `g` times two factors, one after the other."""
    return g * first * second


def root_of_factor(limit: Any, squared: Any, shrunk: Any) -> Any:
    """Returns the root of what makes a norm at most `limit`; 0 if it isn't needed.

    Args:
        limit: scalar, the largest norm allowed.
        squared: scalar, the norm's square, infinite where it overflowed.
        shrunk: scalar of its dtype, the square of the norm of the gradient times
            `shrink`; 0 or NaN where there is none.
    """
    is_known = ops.logical_and(ops.logical_not(ops.isfinite(squared)), shrunk > 0)
    norm = ops.sqrt(ops.where(is_known, shrunk, ops.ones_like(shrunk)))
    root = ops.sqrt(ops.cast(limit, norm.dtype) / norm) * math.sqrt(shrink(norm))
    return ops.where(
        is_known, ops.minimum(root, ops.ones_like(root)), ops.zeros_like(root)
    )


def shrunk(g: Any, overflows: Any, factor: Any) -> Any:
    """Returns `g` times `factor`, to be squared, if `overflows` is true; else 0.

    Args:
        factor: what `shrinking` returns.
    """
    return ops.where(overflows, g, ops.zeros_like(g)) * factor


def shrinking(overflows: Any, dtype: str) -> Any:
    """Returns what shrinks tensors of a dtype if `overflows` is true, or 1.

    It is no constant: XLA may square that, and `g`, and multiply the squares. So
    it may with a constant factor in `g` itself, such as a loss weight; it doesn't move
    one out of a choice.
    """
    one = ops.ones((), dtype)
    return ops.where(overflows, SHRINK[dtype] * one, one)


def shrink(x: Any) -> float:
    """Returns what to multiply a tensor by whose squares overflow."""
    return SHRINK[keras.backend.standardize_dtype(x.dtype)]
