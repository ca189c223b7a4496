"""What layers add to the loss, kept apart by replica.

Replicas of one process are threads that take turns at collectives, in synchronized
moments for one. Keras's layers have one list of added losses for all of them: a replica
would find those of another in it.
"""

from __future__ import annotations

import threading
from typing import Any

import keras

from tf_effopt.runtime import private_names
from tf_effopt.runtime.keras_hooks import sublayers


def keep_apart(model: keras.Model) -> None:
    """Gives each layer a list for each thread."""
    for layer in sublayers(model):
        losses = private_names.attribute(layer, "_losses")
        if not isinstance(losses, _ByThread):
            # Past Keras's and TensorFlow's tracking, which would wrap it.
            object.__setattr__(layer, "_losses", _ByThread())


class _ByThread(threading.local):
    """As much of a list as Keras uses of `Layer._losses`."""

    def __init__(self):
        self._own: list[Any] = []

    def extend(self, losses: list[Any]) -> None:
        self._own.extend(losses)

    def clear(self) -> None:
        self._own.clear()

    def __getitem__(self, index: Any) -> Any:
        return self._own[index]

    def __reduce__(self) -> tuple:
        return list, ()  # in a copy of the layer
