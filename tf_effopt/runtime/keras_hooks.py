"""What the package does by private names of Keras, on every backend."""

from __future__ import annotations

import inspect
from typing import Any

import keras

from tf_effopt.runtime import private_names


def add_names(classes: dict[str, type]) -> None:
    """Makes strings name optimizers in `compile` and `keras.optimizers.get`.

    Keras 3.15 takes the name of any registered class; 3.16 those of its list only.
    """
    names = private_names.NAMES_OF_OPTIMIZERS
    if names.exists():
        names.get().update(classes)


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
    for name in private_names.STATE_SYNC:
        if hasattr(model, name):
            return getattr(model, name)()
    raise RuntimeError(private_names.message([f"Model.{private_names.STATE_SYNC[0]}"]))


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
