"""Skips the steps whose gradient is far larger than those before.

The practice of large runs, as Chowdhery et al., "PaLM", 2022, §5.1 tell of it:
to leave out the batches around a spike of the loss.
https://arxiv.org/abs/2204.02311
"""

from __future__ import annotations

from keras import ops

from tf_effopt.hyperparameters import Count, DecayRate, FloatOrSchedule, Positive
from tf_effopt.rules import ModelRule
from tf_effopt.transforms.base import Transform
from tf_effopt.transforms.zclip import measure_squared_norm


def spike(sums, slots, *, factor, decay, warmup_steps):
    """Returns whether to skip this step, and the next mean of the norm.

    Args:
        sums: the square of the norm of the whole gradient.
        slots: scalars: `seen`, norms in the mean, until the warm-up ends; `mean`
            of the norm; `skipped`, the steps so far.
        factor: a norm above `factor` times the mean is a spike.
        decay: share of the mean kept per update.
        warmup_steps: updates that are never skipped.
    """
    seen, mean = slots["seen"], slots["mean"]
    norm = ops.sqrt(sums["squared_norm"])
    warm = seen >= warmup_steps
    skip = warm & (norm > factor * mean)
    # A spike counts as the largest norm allowed: a lasting rise is followed.
    counted = ops.where(skip, factor * mean, norm)
    share = ops.where(warm, 1 - decay, 1 / (seen + 1))
    return {"skip": skip}, {
        "seen": ops.minimum(seen + 1, warmup_steps),
        "mean": mean + share * (counted - mean),
        "skipped": slots["skipped"] + ops.cast(skip, mean.dtype),
    }


class SkipSpikes(Transform):
    """Skips the steps whose gradient is far larger than those before.

    A step is skipped if the norm of the whole gradient is above `factor` times
    its moving average. Then no weight, slot, average or update count changes;
    with accumulation, the micro-steps of the update are dropped.

    Keeps 3 values in all, the count of skipped steps among them.

    When not to use it: to make up for a learning rate that is too high.

    Reference: Chowdhery et al., 2022, §5.1, https://arxiv.org/abs/2204.02311

    Args:
        factor: float above 0; usually 3 to 10.
        decay: float in [0, 1), share of the average kept per update.
        warmup_steps: int of at least 1, updates that are never skipped.

    Raises:
        ValueError: an argument is out of its range.

    Example:

    >>> import keras, tf_effopt
    >>> w = keras.Variable([0.0])
    >>> skip = tf_effopt.transforms.SkipSpikes(factor=3.0, warmup_steps=2)
    >>> optimizer = tf_effopt.SGD(1.0, transforms=[skip])
    >>> for g in (1.0, 1.0, 1000.0, 1.0):
    ...     optimizer.apply([keras.ops.convert_to_tensor([g])], [w])
    >>> w.numpy().tolist(), skip.skipped
    ([-3.0], 1)
    """

    model_rule = ModelRule(
        spike,
        slots={
            "seen": ("spikes_seen", 0.0),
            "mean": ("spikes_mean", 0.0),
            "skipped": ("spikes_skipped", 0.0),
        },
        measure=measure_squared_norm,
    )
    reports = ("mean", "skipped")
    decides = True
    factor: FloatOrSchedule = Positive(default=5.0)
    decay: FloatOrSchedule = DecayRate(default=0.98)
    warmup_steps: int | None = Count(low=1, default=25)

    @property
    def skipped(self) -> int:
        """Steps skipped so far; part of the saved state."""
        return int(self.slot("skipped"))
