"""An example for a replica that has none of a batch.

With zero examples, means and moments are NaN, and on a CPU some of TensorFlow's
kernels fail. So such a replica works on an example of ones, or of zeros where they are
integers, that counts nothing: its share of the loss is 0 (`shares`).
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from keras import tree

from tf_effopt.training import loss_weighting


def pad_empty(data: Any) -> Any:
    """A replica's data; if there are no examples, one that stands in for them.

    Not for sparse and ragged tensors, nor for what comes with them.
    """
    tensors = [x for x in tree.flatten(data) if x is not None]
    if not all(_is_dense(x) and loss_weighting.may_be_empty(x) for x in tensors):
        return data
    return tree.map_structure(lambda x: None if x is None else _given(x), data)


def _is_dense(x: Any) -> bool:
    return isinstance(x, tf.Tensor) and bool(x.shape.rank)


def _given(x: tf.Tensor) -> tf.Tensor:
    filled = tf.cond(tf.equal(tf.shape(x)[0], 0), lambda: _stand_in(x), lambda: x)
    filled.set_shape([None, *x.shape[1:]])
    return filled


def _stand_in(x: tf.Tensor) -> tf.Tensor:
    # Of a dimension that varies there is nothing, either.
    now = tf.unstack(tf.shape(x))
    sizes = [
        known or tf.maximum(size, 1) for size, known in zip(now, x.shape, strict=True)
    ]
    fill = tf.zeros if x.dtype.is_integer or x.dtype == tf.string else tf.ones
    return fill([1, *sizes[1:]], x.dtype)


def drop_padding(outputs: Any, examples: tf.Tensor) -> Any:
    """A replica's outputs, without those of a stand-in if it has no `examples`."""

    def kept(x: Any) -> Any:
        if not _is_dense(x):
            return x
        return x[: tf.where(tf.equal(examples, 0), 0, tf.shape(x)[0])]

    return tree.map_structure(kept, outputs)
