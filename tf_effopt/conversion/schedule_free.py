"""`ScheduleFreeAdamW`: what Keras's optimizer of that name saved."""

from __future__ import annotations

import numpy as np

from tf_effopt.base import Optimizer


def schedule_free_slots(
    optimizer: Optimizer, saved: list[np.ndarray], steps: int
) -> list[np.ndarray] | None:
    """The slots of `ScheduleFreeAdamW`, out of those of Keras's."""
    # Keras keeps no sums: it averages with equal weights, which is the same
    # for a constant learning rate.
    if len(saved) != 2 * len(optimizer._trainable_variables):
        return None
    rate = float(optimizer.learning_rate)
    updates = steps // (optimizer.gradient_accumulation_steps or 1)
    numbers = (rate, updates * rate**2, 0.0)  # largest, sum, not at x
    return saved + [np.array(x, "float32") for x in numbers]
