"""The private names of Keras and TensorFlow that the engine leans on.

All of them are used only through this list: `missing()` is what a test, and
an import under a newer Keras, looks at.
"""

from __future__ import annotations

import inspect
from typing import Any

import keras

# On `keras.optimizers.Optimizer` and its instances.
OPTIMIZER_CLASS = (
    "_check_variables_are_known",
    "_get_current_learning_rate",
    "_get_variable_index",
    "_overwrite_variable_with_gradient",
    "_overwrite_variables_directly_with_gradients",
    "_var_key",
)
OPTIMIZER_INSTANCE = (
    "_iterations",
    "_learning_rate",
    "_trainable_variables",
    "_trainable_variables_indices",
    "_variables",
)
# Set by `build`, read by `keras.callbacks.SwapEMAWeights` and by Keras's
# checkpoints under these names.
STATE = ("_model_variables_moving_average", "_accumulated_gradients")
# On layers, and on the tensors of a functional model.
LAYER = ("_flatten_layers",)
TENSOR = ("_keras_history",)
VARIABLE = ("_value",)


def sublayers(model: keras.Model) -> list[keras.layers.Layer]:
    """A model and all layers in it, however deep."""
    return model._flatten_layers()


def own_history(tensor: Any) -> tuple[Any, list[Any]]:
    """The operation that made a functional model's tensor, and its inputs."""
    operation, node_index, _ = tensor._keras_history
    return operation, operation._inbound_nodes[node_index].input_tensors


def has_value(variable: keras.Variable) -> bool:
    """Not so on JAX while `fit` has the values in its compiled step."""
    return variable._value is not None


def skips_mismatches() -> bool:
    """Whether Keras is loading weights with `skip_mismatch=True`.

    It doesn't tell what it loads, so this looks at the functions that are running.
    """
    frame = inspect.currentframe()
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("keras.") and "skip_mismatch" in frame.f_locals:
            return bool(frame.f_locals["skip_mismatch"])
        frame = frame.f_back
    return False


def missing() -> list[str]:
    """The names of this list that the installed Keras doesn't have."""
    cls = keras.optimizers.Optimizer
    absent = [f"Optimizer.{name}" for name in OPTIMIZER_CLASS if not hasattr(cls, name)]
    optimizer = cls(learning_rate=0.1)
    absent += [
        f"Optimizer().{name}"
        for name in OPTIMIZER_INSTANCE
        if not hasattr(optimizer, name)
    ]
    averaged = cls(learning_rate=0.1, use_ema=True, gradient_accumulation_steps=2)
    averaged.build([keras.Variable([0.0])])
    absent += [f"Optimizer().{name}" for name in STATE if not hasattr(averaged, name)]
    absent += [f"Layer.{x}" for x in LAYER if not hasattr(keras.layers.Layer, x)]
    if "skip_mismatch" not in inspect.signature(keras.Model.load_weights).parameters:
        absent.append("Model.load_weights(skip_mismatch)")
    tensor = keras.Input((1,))
    absent += [f"KerasTensor.{x}" for x in TENSOR if not hasattr(tensor, x)]
    variable = keras.Variable(0.0)
    return absent + [f"Variable.{x}" for x in VARIABLE if not hasattr(variable, x)]
