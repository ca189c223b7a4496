"""Sparse gradients as users and Keras's layers make them, each brought to one form."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np


def is_sparse(gradient: Any) -> bool:
    """Whether a gradient holds rows only (`tf.IndexedSlices`)."""
    return hasattr(gradient, "indices") and hasattr(gradient, "dense_shape")


def with_tensors(gradient: Any) -> Any:
    """A gradient as the engine takes it: dense, or rows in TensorFlow's form.

    Of `tf.IndexedSlices` the parts may be tuples, lists and arrays. JAX's sparse arrays
    (`BCOO`), PyTorch's sparse tensors and `tf.SparseTensor` are made dense.
    """
    if is_sparse(gradient):
        from tf_effopt.runtime import rows

        return rows.with_tensors(gradient)
    backend = keras.backend.backend()
    if backend == "jax" and hasattr(gradient, "todense"):
        return keras.ops.convert_to_tensor(gradient, sparse=False)
    if backend == "torch" and _is_sparse_of_torch(gradient):
        return gradient.to_dense()
    if not hasattr(gradient, "dtype"):
        return np.asarray(gradient)
    return gradient


def _is_sparse_of_torch(gradient: Any) -> bool:
    layout = getattr(gradient, "layout", None)
    return "sparse" in str(layout)  # torch.sparse_coo, torch.sparse_csr, ...
