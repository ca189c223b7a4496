"""Stochastic gradient descent with momentum.

Robbins & Monro, "A Stochastic Approximation Method", 1951; Polyak, 1964;
Nesterov, 1983; in the form of Sutskever et al., "On the importance of
initialization and momentum in deep learning", 2013.
"""

from tf_effopt.base import Optimizer, Slots, hp


def sgd_rule(g, slots, *, learning_rate):
    """Returns SGD's step without momentum."""
    return -learning_rate * g, slots


def momentum_rule(g, slots, *, learning_rate, momentum, nesterov):
    """Returns the step of SGD with momentum, and the new velocity `v`.

    Args:
        g: gradient, of shape `S`; loss per unit of the weight.
        slots: `v`, of shape `S`: the last step, in the weight's units.
        learning_rate: scalar, step per unit of the gradient.
        momentum: scalar, share of the last step that is repeated.
        nesterov: whether to look ahead along the new velocity.

    Returns:
        `(delta, slots)`: what to add to the weight, and the new `v`.
    """
    v = momentum * slots["v"] - learning_rate * g
    delta = momentum * v - learning_rate * g if nesterov else v
    return delta, {"v": v}


class SGD(Optimizer):
    """Stochastic gradient descent, plain, with momentum, or Nesterov's.

    The form is Keras's: the learning rate stands inside the velocity. (In
    PyTorch's and Optax's it multiplies the velocity, so that a change of the
    rate takes effect at once; with a constant rate they are equal.)

    Keeps 1 value per parameter with `momentum`, none without. Takes
    `keras.optimizers.SGD`'s arguments and loads its state.

    When not to use it: for Transformers and sparse features, where the
    coordinates' gradients differ by orders of magnitude, use `AdamW`.

    Reference: Sutskever et al., 2013, http://proceedings.mlr.press/v28/sutskever13.html

    Args:
        learning_rate: float of at least 0, schedule or callable.
        momentum: float in [0, 1]. 0 keeps no state, so it can't be changed
            from or to 0 once the optimizer is built.
        nesterov: bool, Nesterov's momentum; needs `momentum` above 0.

    Example:

    >>> import keras, tf_effopt
    >>> w = keras.Variable([1.0])
    >>> optimizer = tf_effopt.SGD(learning_rate=0.5, momentum=0.5)
    >>> for _ in range(2):
    ...     optimizer.apply([keras.ops.convert_to_tensor([1.0])], [w])
    >>> w.numpy().tolist()  # 1 - 0.5 - (0.5 + 0.25)
    [-0.25]
    """

    learning_rate: hp.RateOrSchedule = hp.LearningRate(default=0.01)
    momentum: hp.FloatOrSchedule = hp.Fraction(zero_is_off=True, default=0.0)
    nesterov: bool = hp.Switch(default=False)

    @property
    def rule(self):
        return momentum_rule if self.momentum else sgd_rule

    @property
    def slots(self):
        return Slots(v="momentum") if self.momentum else Slots()
