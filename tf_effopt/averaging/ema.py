"""The exponential moving average of the weights.

Polyak & Juditsky, "Acceleration of Stochastic Approximation by Averaging",
1992; with this decay, Tarvainen & Valpola, https://arxiv.org/abs/1703.01780
"""

from __future__ import annotations

from typing import Any

from keras import ops


def ema_rule(average: Any, w: Any, *, t: Any, ema_momentum: Any) -> Any:
    """Returns the next average: the weight itself after the first update.

    Written as a step from the old average, which rounds once where
    `ema_momentum * average + (1 - ema_momentum) * w` rounds three times.
    """
    return ops.where(t == 1, w, average + (1 - ema_momentum) * (w - average))


def overwrite(average: Any, w: Any, *, t: Any, frequency: int) -> Any:
    """Returns the average after every `frequency`-th update, else the weight."""
    return ops.where(t % frequency == 0, average, w)
