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


def orthogonalized(x: Any, coefficients: list[tuple], margin: float = 1.0) -> Any:
    """Returns nearly the polar factor of each matrix, by odd quintics in it.

    Its singular values come out near 1, those that are tiny beside the largest
    less so. On TPU the products are in bfloat16, unless told otherwise.

    Args:
        x: of shape `(..., rows, columns)`.
        coefficients: `(a, b, c)` of each step: `a x + b x**3 + c x**5`.
        margin: times the norm, what `x` is first divided by; so that rounding
            leaves no singular value above 1.
    """
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = ops.swapaxes(x, -1, -2)
    size = ops.sqrt(ops.sum(ops.square(x), axis=(-2, -1), keepdims=True))
    x = x / ops.maximum(margin * size, 1e-7 + 0 * size)
    for a, b, c in coefficients:
        gram = x @ ops.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return ops.swapaxes(x, -1, -2) if is_tall else x
