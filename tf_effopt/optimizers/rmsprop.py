"""RMSprop, from Tieleman & Hinton, "Lecture 6.5 - rmsprop", Coursera, 2012.

https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf
"""

from keras import ops

from tf_effopt.base import Optimizer, Slots, hp


def rmsprop_rule(g, slots, *, learning_rate, rho, momentum, epsilon, centered):
    """Returns RMSprop's change to one tensor, and its next slots.

    Args:
        g: gradient, of any shape `S`; loss per unit of the weight.
        slots: tensors of shape `S`: `v`, the decayed mean of `g**2`; if
            `centered`, `g_mean`, that of `g`; with momentum, `b`, the last
            step, in the weight's units.
        learning_rate: scalar, in the weight's units.
        rho: share of `v` and `g_mean` kept per update, in [0, 1).
        momentum: share of the last step that is repeated.
        epsilon: above 0, in the units of `g**2`.
        centered: whether to divide by the variance instead of the mean square.

    Returns:
        `(delta, slots)`: what to add to the weight, and the next slots.
    """
    v = rho * slots["v"] + (1 - rho) * ops.square(g)
    new_slots = {"v": v}
    if centered:
        g_mean = new_slots["g_mean"] = rho * slots["g_mean"] + (1 - rho) * g
        v = ops.relu(v - ops.square(g_mean))  # rounding can't make it negative
    step = learning_rate * g / ops.sqrt(v + epsilon)
    if "b" in slots:
        step = new_slots["b"] = momentum * slots["b"] + step
    return -step, new_slots


class RMSprop(Optimizer):
    """RMSprop: each gradient is divided by its recent root mean square.

    `epsilon` stands inside the root, as in Keras. (In PyTorch's it is added
    outside.) The momentum repeats the step, learning rate included.

    Keeps 1 value per parameter, 1 more with `momentum`, 1 more if `centered`.
    Takes `keras.optimizers.RMSprop`'s arguments and loads its state.

    When not to use it: it has no bias correction, so the first steps are
    `1 / sqrt(1 - rho)` times as long; prefer `Adam` where that hurts.

    Reference: Tieleman & Hinton, 2012; `centered`: Graves, 2013,
    https://arxiv.org/abs/1308.0850, equations 38 to 45.

    Args:
        learning_rate: float of at least 0, schedule or callable.
        rho: float in [0, 1), share of the mean square kept per update.
        momentum: float in [0, 1]. 0 keeps no state, so it can't be changed
            from or to 0 once the optimizer is built.
        epsilon: float above 0, in the units of the squared gradient.
        centered: bool, whether to divide by the standard deviation instead.

    Example:

    >>> import keras, tf_effopt
    >>> w = keras.Variable([1.0, 1.0])
    >>> optimizer = tf_effopt.RMSprop(learning_rate=0.1, rho=0.75)
    >>> optimizer.apply([keras.ops.convert_to_tensor([3.0, -0.1])], [w])
    >>> [round(x, 4) for x in w.numpy().tolist()]  # 1 / sqrt(1 - rho) is 2
    [0.8, 1.2]
    """

    rule = staticmethod(rmsprop_rule)
    rho: hp.FloatOrSchedule = hp.DecayRate(default=0.9)
    momentum: hp.FloatOrSchedule = hp.Fraction(zero_is_off=True, default=0.0)
    epsilon: hp.FloatOrSchedule = hp.Positive(default=1e-7)
    centered: bool = hp.Switch(default=False)

    @property
    def slots(self):
        groups = [Slots(v="velocity")]
        if self.momentum:
            groups.append(Slots(b="momentum"))
        if self.centered:
            groups.append(Slots(g_mean="average_gradient"))
        return tuple(groups)
