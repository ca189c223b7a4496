"""`tf.IndexedSlices` whose parts are tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf


def with_tensors(gradient: Any) -> Any:
    """Rows whose values, indices and shape are tensors; one that has them as it is.

    A `tf.SparseTensor`, which gives elements rather than rows, is made dense.
    """
    if isinstance(gradient, tf.SparseTensor):
        # Unlike `tf.sparse.to_dense` it sums what occurs twice, in any order.
        return tf.scatter_nd(gradient.indices, gradient.values, gradient.dense_shape)
    parts = gradient.values, gradient.indices, gradient.dense_shape
    values, indices, shape = parts
    values, indices = _tensor(values), _tensor(indices)
    if indices.dtype not in (tf.int32, tf.int64):
        if not indices.dtype.is_integer and indices.shape.num_elements() != 0:
            raise ValueError(
                "The `indices` of `tf.IndexedSlices` must be integers, the numbers of "
                f"rows. Received: indices={gradient.indices!r}"
            )
        indices = tf.cast(indices, "int64")
    if shape is not None and not tf.is_tensor(shape):
        sizes = tf.TensorShape(shape)
        shape = sizes.as_list() if sizes.is_fully_defined() else None
        shape = None if shape is None else tf.constant(shape, "int64")
    if all(a is b for a, b in zip(parts, (values, indices, shape), strict=True)):
        return gradient
    return tf.IndexedSlices(values, indices, shape)


def _tensor(part: Any) -> tf.Tensor:
    if tf.is_tensor(part):
        return tf.convert_to_tensor(part)
    if isinstance(part, list | tuple) and any(map(tf.is_tensor, tf.nest.flatten(part))):
        return tf.convert_to_tensor(part)
    return tf.convert_to_tensor(np.asarray(part))
