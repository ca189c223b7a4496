"""What is of tf_keras, the legacy Keras 2, is refused with a word of Keras 3."""

from __future__ import annotations

from typing import Any

LEGACY = ("tf_keras", "tensorflow.python.keras")


def is_of_tf_keras(thing: Any) -> bool:
    """Whether a thing's class, or one that it derives from, is of tf_keras."""
    return any(
        base.__module__ == name or base.__module__.startswith(f"{name}.")
        for base in type(thing).__mro__
        for name in LEGACY
    )


def refuse(thing: Any) -> None:
    """Raises `ValueError` for a model or layer of tf_keras."""
    if is_of_tf_keras(thing):
        raise ValueError(
            f"{type(thing).__name__!r} is of tf_keras, the legacy Keras 2; tf_effopt "
            "works with models of Keras 3. Make the model with Keras 3: `import keras`, "
            "or `tf.keras` without the environment variable TF_USE_LEGACY_KERAS. "
            f"Received: {thing!r}"
        )
