"""Norms and matrix iterations, of tensors."""

from __future__ import annotations

from typing import Any

from keras import ops


def norm(x: Any) -> Any:
    """Returns the Euclidean norm of all elements of `x`, a scalar."""
    return ops.sqrt(ops.sum(ops.square(x)))


def root_mean_square(x: Any) -> Any:
    """Returns the root of the mean square of all elements of `x`, a scalar."""
    return ops.sqrt(ops.mean(ops.square(x)))


def trust_ratio(w: Any, step: Any, coefficient: Any = 1) -> Any:
    """Returns `coefficient * norm(w) / norm(step)`, or 1 where a norm is 0."""
    p, q = norm(w), norm(step)
    one = 1 + 0 * p
    return ops.where((p > 0) & (q > 0), coefficient * p / ops.where(q > 0, q, one), one)
