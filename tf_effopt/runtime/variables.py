"""The variables of TensorFlow and its strategies behind those of Keras."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tf_effopt.runtime import private_names


def tf_variable(variable: Any) -> tf.Variable:
    """The TensorFlow variable in a Keras variable."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def local_component(variable: Any) -> tf.Variable:
    """This replica's own component of a variable."""
    variable = tf_variable(variable)
    if isinstance(variable, tf.distribute.DistributedValues):
        return private_names.attribute(variable, "_get_on_device_or_primary")()
    return variable


def mapped(function: Callable, tensors: dict) -> dict:
    return {
        k: mapped(function, x) if isinstance(x, dict) else function(x)
        for k, x in tensors.items()
    }
