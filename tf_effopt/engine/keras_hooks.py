"""The private names of Keras that the engine uses.

All of them are used only through this list: `missing()` is what a test looks at, and
`check` what every optimizer does when it is made.
"""

from __future__ import annotations

import inspect
from typing import Any

import keras

from tf_effopt.engine import private_names

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
OPERATION = ("_inbound_nodes",)
VARIABLE = ("_value",)
# On models of the JAX backend, the newest version's first.
STATE_SYNC = ("state_sync", "jax_state_sync")
# What `keras.optimizers.get` makes of a string.
NAMES = private_names.PrivateName("keras.src.optimizers:ALL_OBJECTS_DICT")


def check(optimizer: keras.optimizers.Optimizer) -> None:
    """Raises an error that names what an optimizer of this Keras doesn't have.

    Raises:
        RuntimeError: it lacks private names that the engine uses.
    """
    names = OPTIMIZER_CLASS + OPTIMIZER_INSTANCE
    absent = [f"Optimizer.{name}" for name in names if not hasattr(optimizer, name)]
    if absent:
        raise RuntimeError(private_names.message(absent))


def add_names(classes: dict[str, type]) -> None:
    """Makes strings name optimizers in `compile` and `keras.optimizers.get`.

    Keras 3.15 takes the name of any registered class; 3.16 those of its list only.
    """
    if NAMES.exists():
        NAMES.get().update(classes)


def sublayers(model: keras.Model) -> list[keras.layers.Layer]:
    """A model and all layers in it, however deep."""
    return private_names.attribute(model, "_flatten_layers")()


def own_history(tensor: Any) -> tuple[Any, list[Any]]:
    """The operation that made a functional model's tensor, and its inputs."""
    operation, node_index, _ = private_names.attribute(tensor, "_keras_history")
    nodes = private_names.attribute(operation, "_inbound_nodes")
    return operation, nodes[node_index].input_tensors


def has_value(variable: keras.Variable) -> bool:
    """Not so on JAX while `fit` has the values in its compiled step."""
    return private_names.attribute(variable, "_value") is not None


def sync_state(model: keras.Model) -> None:
    """On JAX, `fit` keeps all state in its loop: this assigns it to the variables.

    On other backends the variables have it already.
    """
    if keras.backend.backend() != "jax":
        return
    for name in STATE_SYNC:
        if hasattr(model, name):
            return getattr(model, name)()
    raise RuntimeError(private_names.message([f"Model.{STATE_SYNC[0]}"]))


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
    layer = keras.layers.Layer()
    absent += [f"Operation.{x}" for x in OPERATION if not hasattr(layer, x)]
    variable = keras.Variable(0.0)
    absent += [f"Variable.{x}" for x in VARIABLE if not hasattr(variable, x)]
    has_sync = any(hasattr(keras.Model, name) for name in STATE_SYNC)
    if keras.backend.backend() == "jax" and not has_sync:
        absent.append(f"Model.{' or '.join(STATE_SYNC)}")
    if not NAMES.exists():
        absent.append(repr(NAMES))
    return absent
