"""Gradient clipping: by value, by the norm of each tensor, by that of all.

Pascanu et al., "On the difficulty of training recurrent neural networks",
2013, https://arxiv.org/abs/1211.5063 (by norm).
"""

from __future__ import annotations

from typing import Any

from keras import ops

# XLA on CPU writes the squares to memory before it adds them up. Adding this
# many parts of a large tensor to each other first makes that an eighth.
PARTS = 8
LARGE = 65536


def squared_norm(g: Any) -> Any:
    """Returns the sum of squares of `g`, a scalar of its dtype."""
    size = 1
    for length in g.shape:
        size *= length
    if size < LARGE or size % PARTS:
        return ops.sum(ops.square(g))
    parts = ops.reshape(g, (PARTS, size // PARTS))
    return ops.sum(sum(ops.square(parts[i]) for i in range(PARTS)))


def clip_by_value(g: Any, clipvalue: Any) -> Any:
    """Returns `g` with each element moved into [-clipvalue, clipvalue]."""
    return ops.clip(g, -clipvalue, clipvalue)


def clip_by_norm(g: Any, norm: Any, clipnorm: Any) -> Any:
    """Returns `g`, scaled so that `norm` becomes at most `clipnorm`.

    Args:
        g: gradient.
        norm: scalar, the norm of `g`, or of all gradients together.
        clipnorm: scalar, the largest norm allowed.
    """
    return g * (clipnorm / ops.maximum(norm, clipnorm))
