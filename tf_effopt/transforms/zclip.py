"""ZClip, from Kumar et al., "ZClip: Adaptive Spike Mitigation for LLM
Pre-Training", 2025.

https://arxiv.org/abs/2504.02507
"""

from __future__ import annotations

from keras import ops

from tf_effopt.engine import clipping
from tf_effopt.engine.clipping import squared_norm
from tf_effopt.hyperparameters import Count, DecayRate, FloatOrSchedule, Positive
from tf_effopt.rules import ModelRule
from tf_effopt.transforms.base import Transform


def measure_squared_norm(g, slots):
    """Returns the square of one tensor's norm."""
    return {"squared_norm": squared_norm(g)}


def clipping_factor(sums, slots, *, z_threshold, decay, warmup_steps):
    """Returns what to multiply the gradient by, and the norm's next statistics.

    Args:
        sums: the square of the norm of the whole gradient, and of the shrunk one.
        slots: scalars: `seen`, norms in the statistics, until the warm-up ends;
            `mean` and `variance` of the norm.
        z_threshold: by how many standard deviations a norm may be above the mean.
        decay: share of the statistics kept per update.
        warmup_steps: norms that are averaged with equal weight first.
    """
    seen, mean, variance = slots["seen"], slots["mean"], slots["variance"]
    norm = ops.sqrt(sums["squared_norm"])
    deviation = ops.sqrt(variance)
    z = (norm - mean) / (deviation + 1e-6)
    warm = seen >= warmup_steps
    spikes = warm & (z > z_threshold)
    safe_z = ops.where(spikes, z, z_threshold)
    clipped = ops.where(
        spikes, mean + z_threshold * deviation * z_threshold / safe_z, norm
    )

    share = ops.where(warm, 1 - decay, 1 / (seen + 1))
    new_mean = mean + share * (clipped - mean)
    # In the warm-up the variance of all norms so far, by Welford's method.
    product = ops.where(warm, clipped - new_mean, clipped - mean) * (clipped - new_mean)
    new_variance = variance + share * (product - variance)
    factor = ops.where(
        spikes, clipped / ops.where(spikes, norm, 1 + 0 * norm), 1 + 0 * norm
    )
    root = clipping.root_of_factor(
        clipped, sums["squared_norm"], sums["shrunk_squared_norm"]
    )
    root = ops.where(spikes, root, ops.zeros_like(root))
    first, second = clipping.divided(factor, root)
    return {"first": first, "second": second}, {
        "seen": ops.minimum(seen + 1, warmup_steps),
        "mean": new_mean,
        "variance": new_variance,
    }


class ZClip(Transform):
    """Clips the whole gradient's norm where it leaves its own recent range.

    A norm that is more than `z_threshold` standard deviations above the mean is
    lowered to `mean + z_threshold**2 / z` deviations: the higher the spike, the
    lower. The variant is the authors' adaptive one, without a fixed limit beside
    it (for that, `global_clipnorm` comes before); the statistics see the norm
    after clipping.

    Keeps 3 values in all.

    When not to use it: where the gradient's scale changes on purpose, as with a
    new phase of the data; it takes about `1 / (1 - decay)` updates to follow.

    Reference: Kumar et al., 2025, https://arxiv.org/abs/2504.02507

    Args:
        z_threshold: float above 0, in standard deviations.
        decay: float in [0, 1), share of mean and variance kept per update.
        warmup_steps: int of at least 2, updates that only collect statistics.

    Raises:
        ValueError: an argument is out of its range.

    Example:

    >>> import keras, tf_effopt
    >>> w = keras.Variable([0.0])
    >>> clip = tf_effopt.transforms.ZClip(warmup_steps=4)
    >>> optimizer = tf_effopt.SGD(1.0, transforms=[clip])
    >>> for g in (1.0, 1.2, 1.0, 1.2, 1000.0):  # mean 1.1, deviation 0.1
    ...     optimizer.apply([keras.ops.convert_to_tensor([g])], [w])
    >>> round(float(w.numpy()[0]), 2)  # the spike counted as 1.1
    -5.5
    """

    model_rule = ModelRule(
        clipping_factor,
        slots={
            "seen": ("zclip_seen", 0.0),
            "mean": ("zclip_mean", 0.0),
            "variance": ("zclip_variance", 0.0),
        },
        measure=measure_squared_norm,
    )
    reports = ("mean", "variance")
    before = staticmethod(clipping.multiplied)
    clips = True
    z_threshold: FloatOrSchedule = Positive(default=2.5)
    decay: FloatOrSchedule = DecayRate(default=0.97)
    warmup_steps: int | None = Count(low=2, default=25)
