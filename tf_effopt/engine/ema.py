"""The exponential moving average of the weights.

Polyak & Juditsky, "Acceleration of Stochastic Approximation by Averaging",
1992; with this decay, Tarvainen & Valpola, https://arxiv.org/abs/1703.01780
"""

from __future__ import annotations

from typing import Any

from keras import ops


def ema(
    w: Any, slots: dict, *, t: Any, ema_momentum: Any, ema_overwrite_frequency: Any
) -> tuple[Any, dict]:
    """Returns the weight, and its next average: the weight after the first update.

    Written as a step from the old average, which rounds once where
    `ema_momentum * average + (1 - ema_momentum) * w` rounds three times.

    Args:
        w: the weight after this update.
        slots: `average`, of the same shape.
        t: integer scalar, the number of this update, from 1.
        ema_momentum: scalar, the share of the average that is kept.
        ema_overwrite_frequency: None, or scalar: after so many updates the weight
            becomes the average.
    """
    average = slots["average"]
    average = average + (1 - ema_momentum) * (w - average)
    average = ops.where(t == 1, w, average)
    if ema_overwrite_frequency is not None:
        due = t % ops.cast(ema_overwrite_frequency, t.dtype) == 0
        w = ops.where(due, average, w)
    return w, {"average": average}
