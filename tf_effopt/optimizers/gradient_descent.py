"""Gradient descent, the rule of Cauchy, "Méthode générale pour la résolution
des systèmes d'équations simultanées", 1847."""

from tf_effopt.base import Optimizer, hp


def gradient_descent_rule(g, slots, *, learning_rate):
    """Returns the step down the gradient, `-learning_rate * g`."""
    return -learning_rate * g, slots


class GradientDescent(Optimizer):
    """Gradient descent: each weight moves against its gradient.

    The rule knows nothing of data: on all of it (`fit(batch_size=len(x))`)
    this is gradient descent, on random batches it is SGD without momentum.

    Keeps no state.

    When not to use it: on ill-conditioned losses, that is on almost every
    deep network, `SGD` with momentum or `Adam` need far fewer steps.

    Reference: Cauchy, 1847; Goodfellow et al., Deep Learning, 2016, §4.3.

    Args:
        learning_rate: float of at least 0, schedule or callable; the step per
            unit of the gradient. Above `2 / L`, with `L` the largest
            curvature of the loss, it diverges.

    Raises:
        ValueError: `learning_rate` or a shared argument is out of its range.

    Example:

    >>> import keras, tf_effopt
    >>> w = keras.Variable([1.0, 2.0])
    >>> optimizer = tf_effopt.GradientDescent(learning_rate=0.5)
    >>> optimizer.apply([keras.ops.convert_to_tensor([1.0, -1.0])], [w])
    >>> w.numpy().tolist()
    [0.5, 2.5]
    """

    rule = staticmethod(gradient_descent_rule)
    learning_rate: hp.RateOrSchedule = hp.LearningRate(default=0.01)
