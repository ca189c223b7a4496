"""How a step runs. The only place that knows a backend or a strategy.

`stages` says what an update is; the engine of the backend in use brings it
the gradients and writes what it returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from tf_effopt.runtime.base import Communication, Engine

__all__ = ["Communication", "Engine", "create", "without_autograph"]


def create(optimizer: Any) -> Engine:
    """Returns the engine of Keras's current backend."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        from tf_effopt.runtime.tensorflow import TensorFlowEngine

        return TensorFlowEngine(optimizer)
    if backend in ("jax", "torch"):
        from tf_effopt.runtime.portable import PortableEngine

        return PortableEngine(optimizer)
    raise ValueError(
        "tf_effopt runs on Keras's backends 'tensorflow', 'jax' and 'torch'. "
        f"Received: KERAS_BACKEND={backend!r}"
    )


def without_autograph(function: Callable) -> Callable:
    """Keeps TensorFlow and `torch.compile` from rewriting a function that a step calls.

    In TensorFlow's graphs, ours has no Python `if` or `for` over tensors; to look for
    them takes as long as to trace the update. PyTorch's update has an `if`, whether
    the gradient is finite, around calls of Keras that make a new name each time:
    `torch.compile` would compile all of it anew at each step, and then give it up. It
    compiles the rest of a step once, and the update runs as without it.
    """
    if keras.backend.backend() == "torch":
        import torch

        return torch.compiler.disable(function)
    if keras.backend.backend() != "tensorflow":
        return function
    from tf_effopt.runtime.tensorflow import do_not_convert

    return do_not_convert(function)
