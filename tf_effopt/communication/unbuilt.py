"""What has to be said of an optimizer before its update is compiled."""

from __future__ import annotations

from typing import Any

import keras

from tf_effopt.base.optimizer import Optimizer


def require_unbuilt(optimizer: Any, function: str) -> Optimizer:
    """The optimizer of tf_effopt that `function` was given, not built yet.

    Raises:
        ValueError: it is another one, it is built, or Keras has another backend.
    """
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    is_ours = isinstance(inner, Optimizer)
    if not is_ours:
        raise ValueError(
            f"`{function}` takes an optimizer of tf_effopt. Received: {optimizer!r}"
        )
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            f"`{function}` needs Keras's TensorFlow backend, whose strategies have "
            f"replicas. Received: {keras.backend.backend()!r}"
        )
    if inner.built:
        raise ValueError(
            f"{inner.name} is built already: call `{function}` before the first "
            "step, since the compiled update holds the choice."
        )
    return inner
