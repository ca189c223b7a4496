"""What is asked of tensors and graphs on every backend."""

from __future__ import annotations

import contextlib

import keras


def outside_of_graphs() -> contextlib.AbstractContextManager:
    """The context in which a variable has a value while a graph is traced."""
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.init_scope()


def in_a_graph() -> bool:
    """Whether TensorFlow is tracing a function."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return not tf.executing_eagerly()
