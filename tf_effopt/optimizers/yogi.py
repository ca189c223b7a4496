"""Yogi, from Zaheer et al., "Adaptive Methods for Nonconvex Optimization", 2018.

https://papers.nips.cc/paper/8186-adaptive-methods-for-nonconvex-optimization
"""

from keras import ops

from tf_effopt.base import ModelRule, Optimizer, Slot, Slots, hp
from tf_effopt.optimizers.adam import adam_correction


def yogi_rule(g, slots, *, correction, learning_rate, beta_1, beta_2, epsilon):
    """Returns Yogi's change to one tensor, and its next moments.

    Args:
        g: gradient, of any shape `S`.
        slots: tensors of shape `S`: `m`, the decayed mean of `g`; `v`, which moves
            towards `g**2` by a share of `g**2`, in its units.
        correction: scalar, see `adam_correction`.
        learning_rate: scalar.
        beta_1: share of `m` kept per update, in [0, 1).
        beta_2: 1 less the share of `g**2` by which `v` moves, in [0, 1).
        epsilon: above 0, in the units of `g`.

    Returns:
        `(delta, slots)`: what to add to the weight, and the next slots.
    """
    m = beta_1 * slots["m"] + (1 - beta_1) * g
    g2 = ops.square(g)
    v = slots["v"] - (1 - beta_2) * ops.sign(slots["v"] - g2) * g2
    eta = learning_rate * correction
    return -eta * m / (ops.sqrt(v) + epsilon), {"m": m, "v": v}


class Yogi(Optimizer):
    """Yogi: Adam whose second moment forgets a large gradient slowly.

    Each update moves it by `(1 - beta_2) * g**2`, up or down, whatever it was
    before: once gradients are small, the effective learning rate grows back
    slower than Adam's.

    The variant is the paper's Algorithm 2 with TensorFlow Addons' bias correction:
    the first moment starts at 0, the second at `initial_accumulator_value`, and
    `epsilon` is added to `sqrt(v)` before the correction. (The paper prints no
    correction; Optax and pytorch-optimizer start both moments at
    `initial_accumulator_value`, and add `epsilon` after the correction.)

    Keeps 2 values per parameter.

    When not to use it: where gradients are large at first and then small for good,
    its steps stay small for longer than Adam's.

    Reference: Zaheer et al., 2018,
    https://papers.nips.cc/paper/8186-adaptive-methods-for-nonconvex-optimization

    Args:
        learning_rate: float of at least 0, schedule or callable.
        beta_1: float in [0, 1), share of the first moment kept per update.
        beta_2: float in [0, 1); `1 - beta_2` is the share of the squared gradient
            by which the second moment moves.
        epsilon: float above 0; the paper recommends 1e-3.
        initial_accumulator_value: float above 0, in the units of the squared
            gradient, the second moment's start, fixed once the optimizer is built.
        bias_correction: bool. `False` is the rule as the paper prints it.

    Example:

    >>> import keras, tf_effopt
    >>> w = keras.Variable([1.0])
    >>> optimizer = tf_effopt.Yogi(learning_rate=0.1, beta_2=0.9)
    >>> for g in ([3.0], [0.1]):
    ...     optimizer.apply([keras.ops.convert_to_tensor(g)], [w])
    >>> # From 0.1 * 3**2 it falls by 0.1 * 0.1**2; Adam's would to 0.811.
    >>> round(float(optimizer.variables[3].numpy()[0]), 4)
    0.899
    """

    rule = staticmethod(yogi_rule)
    model_rule = ModelRule(adam_correction, each_count=True)
    learning_rate: hp.RateOrSchedule = hp.LearningRate(default=0.01)
    beta_1: hp.FloatOrSchedule = hp.DecayRate(default=0.9)
    beta_2: hp.FloatOrSchedule = hp.DecayRate(default=0.999)
    epsilon: hp.FloatOrSchedule = hp.Positive(default=1e-3)
    initial_accumulator_value: float = hp.Positive(fixed=True, default=1e-6)
    bias_correction: bool = hp.Switch(default=True, kw_only=True)

    @property
    def slots(self):
        v = Slot("velocity", start=self.initial_accumulator_value)
        return Slots(m="momentum", v=v)
