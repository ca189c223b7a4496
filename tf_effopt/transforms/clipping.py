"""Gradient clipping: by value, by the norm of each tensor, by that of all.

Pascanu et al., "On the difficulty of training recurrent neural networks",
2013, https://arxiv.org/abs/1211.5063 (by norm).
"""

from __future__ import annotations

import math
from typing import Any

from keras import ops

# XLA on CPU writes the squares to memory before it adds them up. Adding this
# many parts of a large tensor to each other first makes that a quarter.
PARTS = 4
LARGE = 65536


def squared_norm(g: Any) -> Any:
    """Returns the sum of squares of `g`, a scalar of its dtype."""
    size = math.prod(g.shape) if None not in g.shape else 0
    if size < LARGE or size % PARTS:
        return ops.sum(ops.square(g))
    parts = ops.split(ops.reshape(g, (size,)), PARTS)
    return ops.sum(sum(ops.square(part) for part in parts))


def joined(gradients: list[Any]) -> list[Any]:
    """Returns the gradients, all small ones of a dtype as one tensor.

    A model has many biases; one sum over all of them is one kernel.
    """
    small: dict[str, list[Any]] = {}
    rest = []
    for g in gradients:
        if None in g.shape or math.prod(g.shape) >= LARGE:
            rest.append(g)
        else:
            small.setdefault(str(g.dtype), []).append(ops.reshape(g, (-1,)))
    return rest + [ops.concatenate(group) for group in small.values()]


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
