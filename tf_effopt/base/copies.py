"""Copies of an optimizer: which have its state, and for which variables.

`copy.deepcopy` and `pickle` carry the state, which belongs to the variables it was
trained on and to their copies. What is made from a configuration is new.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterable
from typing import Any

import keras
from keras import ops

from tf_effopt.state.variables import path_of, paths_and_shapes

MAKE_A_NEW_ONE = "make a new optimizer: `type(o).from_config(o.get_config())`"
# Within one process variables are told apart by identity.
PROCESS = uuid.uuid4().hex


def of_another_model(name: str, variables: list[Any]) -> str:
    """What to say of variables of which an optimizer knows none."""
    return (
        f"{name!r} was built on the variables of another model: it knows none of the "
        f"{len(variables)} that it was given now, such as {path_of(variables[0])!r}, and "
        f"its state isn't theirs. For another model {MAKE_A_NEW_ONE}, where `o` is this "
        "one, and compile the model with it. A copy of a model that is to train on is "
        "saved, pickled or deep-copied together with the optimizer it was compiled with."
    )


# ----------------------------------------------------------------- made anew


def fresh(optimizer: Any) -> Any:
    """A new optimizer with another one's settings as they are now, and no state."""
    config = optimizer.get_config()
    rate = optimizer._learning_rate
    if not isinstance(rate, keras.Variable):
        config["learning_rate"] = rate  # A function can't be read from a configuration.
    return type(optimizer).from_config(config)


def deserialized(value: Any) -> Any:
    """An argument of a constructor, also as `get_config` returns it."""
    if isinstance(value, list | tuple):
        return type(value)(map(deserialized, value))
    if isinstance(value, dict) and "class_name" in value:
        return keras.saving.deserialize_keras_object(value)
    return value


# ---------------------------------------------------------------- deep copies


def copied_variables(memo: dict) -> dict[int, Any]:
    """The copies that `copy.deepcopy` has made of variables, by the originals' ids.

    Also of those in models, which Keras copies as a whole.
    """
    copies: dict[int, Any] = dict(memo)
    for original in memo.get(id(memo), ()):  # what `deepcopy` keeps alive
        copied = memo.get(id(original))
        if isinstance(original, keras.layers.Layer) and copied is not None:
            pairs = list(zip(original.weights, copied.weights, strict=False))
            if all(a.shape == b.shape for a, b in pairs):
                copies |= {id(a): b for a, b in pairs}
    return copies


# -------------------------------------------------------------------- pickles


class Origin:
    """Whose state it is that came with a pickle.

    Args:
        keys: by which the process that pickled it tells these variables apart.
        variables: those that the optimizer was built on.
    """

    def __init__(self, keys: Iterable[Any], variables: list[Any]):
        self.process = PROCESS
        self.keys = frozenset(keys)
        self.paths = paths_and_shapes(variables)
        self.weights = _fingerprint(variables)

    def is_of(self, keys: Iterable[Any], variables: list[Any]) -> bool:
        """Whether some of these variables are meant, or all are their copies."""
        if self.process == PROCESS:
            is_known = not self.keys.isdisjoint(keys)
        else:
            is_known = not set(self.paths).isdisjoint(paths_and_shapes(variables))
        return is_known or _fingerprint(variables) == self.weights


def _fingerprint(variables: list[Any]) -> str:
    """Of the values, whatever the variables' names."""
    digest = hashlib.blake2b()
    for variable in variables:
        value = ops.convert_to_numpy(variable)
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def reduced(how: tuple, optimizer: Any) -> tuple[Callable, tuple]:
    """What `__reduce__` returns, from what Keras's does."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    origin = getattr(inner, "_unpickled_from", None)
    if inner.built and hasattr(inner, "_unpickled_from"):
        keys = inner._trainable_variables_indices
        origin = Origin(keys, inner._trainable_variables)
    return _unpickled, (*how, origin)


def _unpickled(load: Callable, arguments: tuple, origin: Origin | None) -> Any:
    optimizer = load(*arguments)
    if origin is not None:
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        inner._unpickled_from = origin
    return optimizer
