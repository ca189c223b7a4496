"""`Muon`: what Keras's optimizer of that name saved."""

from __future__ import annotations

import numpy as np

from tf_effopt.base import Optimizer
from tf_effopt.state.variables import matches


def muon_slots(
    optimizer: Optimizer, saved: list[np.ndarray], steps: int
) -> list[np.ndarray] | None:
    """The slots of `Muon`, out of those of Keras's."""
    # Keras's has one slot for what it takes for matrices, else two, in the
    # order of the variables; its choice isn't ours.
    saved, slots = list(saved), []
    parts = optimizer.parts(optimizer._built_on)
    for (path, shape), part in zip(optimizer._built_on, parts, strict=True):
        has_velocity = _is_adam_of_keras(optimizer, path, shape)
        theirs, saved = saved[: 1 + has_velocity], saved[1 + has_velocity :]
        if any(x.shape != shape for x in theirs) or len(theirs) < 1 + has_velocity:
            return None
        if part is not optimizer.other_part:
            slots += theirs[:1]
        elif has_velocity:
            slots += theirs
        else:
            mean = (1 - optimizer.current("momentum")) * theirs[0]
            slots += [mean, mean**2]
    return None if saved else slots


def _is_adam_of_keras(optimizer: Optimizer, path: str, shape: tuple[int, ...]) -> bool:
    """Whether Keras's `Muon` trains a variable by Adam."""
    is_embedding = optimizer.exclude_embeddings and "embedding" in path.lower()
    return len(shape) != 2 or is_embedding or matches(optimizer.exclude_layers, path)
