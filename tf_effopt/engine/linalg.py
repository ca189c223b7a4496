"""Norms and matrix iterations, of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

SHRINK = 2.0**-20  # what matrices are multiplied by, before their norm is taken


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
    if len(x.shape) > 2 and x.shape[0] == 1:
        # XLA on CPU takes twice the time for the product of stacks of one.
        return orthogonalized(x[0], coefficients, margin)[None]
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = ops.swapaxes(x, -1, -2)
    # Squares of numbers near 1e18 fit then. The factor isn't a constant, which XLA
    # would square apart from `x`; a power of 2 rounds nothing.
    shrunk = x * (SHRINK + 0 * x[..., :1, :1])
    size = ops.sqrt(ops.sum(ops.square(shrunk), axis=(-2, -1), keepdims=True)) / SHRINK
    x = x / ops.maximum(margin * size, 1e-7 + 0 * size)
    for a, b, c in coefficients:
        gram = x @ ops.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return ops.swapaxes(x, -1, -2) if is_tall else x


def unfolded(x: Any, axis: int) -> Any:
    """Returns the matrix whose rows are the slices of `x` along `axis`."""
    return ops.reshape(ops.moveaxis(x, axis, 0), (x.shape[axis], -1))


def gram(x: Any) -> Any:
    """Returns the products of the rows of a matrix, `x @ x.T`."""
    return ops.matmul(x, ops.transpose(x))


def rotated(x: Any, bases: Sequence[Any], back: bool = False) -> Any:
    """Returns `x` with its axis k in terms of the columns of `bases[k]`.

    Args:
        x: of any shape.
        bases: for each axis a square matrix, or None to leave it alone.
        back: whether `x` is in these terms, and is to be turned back.
    """
    for basis in bases:
        # Each turn takes the first axis away and puts its image last.
        if basis is None:
            x = ops.moveaxis(x, 0, -1)
        else:
            x = ops.tensordot(x, basis, axes=[[0], [1 if back else 0]])
    return x


def squares(x: Any, axes: Sequence[int]) -> Any:
    """Returns `x**2`, and what rounding may have added to `x`, squared.

    A rotation leaves in an element that ought to be 0 about the machine epsilon
    times the norm of those along its axis, and the root mean square of all along
    the axes together. To divide by such an element's size would make it as large as
    any other.

    Args:
        x: a tensor that was `rotated`.
        axes: those that were.
    """
    q = ops.square(x)
    if not axes:
        return q
    along = sum(ops.sum(q, axis=k, keepdims=True) for k in axes)
    mixed = along + ops.mean(q, axis=tuple(axes), keepdims=True)
    return q + (32 * _machine_epsilon(x)) ** 2 * mixed


def together(function: Callable, *matrices: Sequence[Any]) -> list[Any]:
    """Returns `function` of each matrix, called once for all of a shape, stacked.

    A model has many matrices and few shapes, and XLA compiles each call of a
    factorization anew.

    Args:
        function: of stacks of matrices, one for each of `matrices`.
        matrices: lists of equal length, alike in shapes.
    """
    shapes: dict[tuple, list[int]] = {}
    for i, x in enumerate(matrices[0]):
        shapes.setdefault(tuple(x.shape), []).append(i)
    found: dict[int, Any] = {}
    for members in shapes.values():
        stacks = [ops.stack([xs[i] for i in members]) for xs in matrices]
        result = function(*stacks)
        for place, i in enumerate(members):
            if isinstance(result, tuple):
                found[i] = tuple(x[place] for x in result)
            else:
                found[i] = result[place]
    return [found[i] for i in range(len(matrices[0]))]


def left_singular_vectors(matrices: Sequence[Any]) -> list[Any]:
    """Returns for each matrix eigenvectors of its `gram`, by falling eigenvalue.

    Columns are orthogonal and of any length. In the place of eigenvectors for
    0, which rounding alone would choose, they are zeros.
    """
    matrices = [of_unit_size(x) for x in matrices]
    is_wide = [x.shape[0] <= x.shape[1] for x in matrices]
    # Both products have the same eigenvalues but 0, and eigh is slow.
    smaller = [
        gram(x) if wide else gram(ops.transpose(x))
        for x, wide in zip(matrices, is_wide, strict=True)
    ]
    vectors = together(eigenvectors, smaller)
    return [
        v if wide else ops.pad(ops.matmul(x, v), ((0, 0), (0, x.shape[0] - x.shape[1])))
        for x, v, wide in zip(matrices, vectors, is_wide, strict=True)
    ]


def eigenvectors(a: Any) -> Any:
    """Returns eigenvectors of `a` as columns, by falling eigenvalue.

    Args:
        a: stack of symmetric matrices with eigenvalues of at least 0.

    Returns:
        A stack of matrices, in which each column's largest element is positive,
        and a column that rounding alone would choose, for an eigenvalue 0, is 0.
    """
    a = ops.where(ops.isfinite(a), a, ops.zeros_like(a))
    values, vectors = ops.linalg.eigh(a)
    values, vectors = ops.flip(values, axis=-1), ops.flip(vectors, axis=-1)
    # XLA's eigh stops at 1e-6 of the norm, in float64, too. One step of Ogita &
    # Aishima, 2018 (https://doi.org/10.1007/s13160-018-0310-3), squares the error.
    products = ops.matmul(ops.swapaxes(vectors, -1, -2), ops.matmul(a, vectors))
    gaps = ops.expand_dims(values, -2) - ops.expand_dims(values, -1)
    apart = _above_rounding(ops.abs(gaps), values[..., :1, None])
    shares = products / ops.where(apart, gaps, ops.ones_like(gaps))
    vectors += ops.matmul(vectors, ops.where(apart, shares, ops.zeros_like(gaps)))
    highest = ops.max(vectors, axis=-2, keepdims=True)
    lowest = ops.min(vectors, axis=-2, keepdims=True)
    vectors = ops.where(highest < -lowest, -vectors, vectors)
    seen = ops.expand_dims(_above_rounding(values, values[..., :1]), -2)
    return ops.where(seen, vectors, ops.zeros_like(vectors))


def of_unit_size(x: Any) -> Any:
    """Returns each matrix of `x` over its largest element; zeros as they are.

    Factorizations square their matrices' elements, which may neither overflow nor
    vanish.
    """
    largest = ops.max(ops.abs(x), axis=(-2, -1), keepdims=True)
    return x / ops.where(largest > 0, largest, ops.ones_like(largest))


def power_iteration(a: Any, basis: Any) -> tuple[Any, Any]:
    """Returns `a @ basis`, up to a factor, columns by falling eigenvalue.

    Args:
        a: stack of symmetric matrices with eigenvalues of at least 0.
        basis: for each of them orthonormal columns, near its eigenvectors.

    Returns:
        `(columns, order)`: columns that `a` would map to 0, or to what isn't
        finite, are as they were; column i came from column `order[..., i]`.
    """
    image = ops.matmul(of_unit_size(a), basis)
    values = ops.sum(basis * image, axis=-2, keepdims=True)
    order = ops.argsort(-values, axis=-1)
    largest = ops.max(values, axis=-1, keepdims=True)
    columns = ops.where(_above_rounding(values, largest), image, basis)
    columns = ops.take_along_axis(columns, order, axis=-1)
    return columns, ops.squeeze(order, -2)


def orthonormal(columns: Any) -> Any:
    """Returns the columns made orthonormal, each against those before it.

    A column of zeros becomes one that is orthogonal to all others, the same on
    every backend. No column changes its direction to the opposite.

    Args:
        columns: a stack of square matrices.
    """
    q, r = ops.linalg.qr(columns)
    signs = ops.diagonal(r, axis1=-2, axis2=-1)
    return ops.where(ops.expand_dims(signs, -2) < 0, -q, q)


def _above_rounding(values: Any, largest: Any) -> Any:
    """Which values are more than rounding errors beside the largest eigenvalue."""
    return values > 16 * _machine_epsilon(values) * largest


def _machine_epsilon(x: Any) -> float:
    return float(np.finfo(keras.backend.standardize_dtype(x.dtype)).eps)
