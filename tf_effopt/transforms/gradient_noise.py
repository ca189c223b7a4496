"""Annealed gradient noise, from Neelakantan et al., "Adding Gradient Noise
Improves Learning for Very Deep Networks", 2015.

https://arxiv.org/abs/1511.06807
"""

from __future__ import annotations

from keras import ops

from tf_effopt.hyperparameters import FloatOrSchedule, Integer, NonNegative
from tf_effopt.transforms.base import Transform


def noisy(g, *, t, noise, variance, gamma, seed):
    """Returns `g` with Gaussian noise of variance `variance / t**gamma`.

    Args:
        g: gradient.
        t: scalar, the number of this update, from 1.
        noise: makes standard normal numbers of the shape of `g` from a seed.
        variance: scalar, in the units of `g**2`, that of the first update.
        gamma: scalar, how fast it falls.
        seed: int.
    """
    return g + ops.sqrt(variance / t**gamma) * noise(seed)


class GradientNoise(Transform):
    """Adds Gaussian noise, less in each update, to the gradient.

    After clipping, as all transforms; after the sum over replicas, the same on
    each. The paper's equation 1; its step counts from 0, `t` here from 1.

    Keeps no state: the numbers are a hash of seed, update, variable and element.

    When not to use it: with small batches, whose gradient has noise of its own.

    Reference: Neelakantan et al., 2015, https://arxiv.org/abs/1511.06807

    Args:
        variance: float of at least 0, of the first update, the paper's eta; it
            tried 0.01, 0.3 and 1.
        gamma: float of at least 0, the power of the fall.
        seed: int of at least 0.

    Raises:
        ValueError: an argument is out of its range.

    Example:

    >>> import keras, tf_effopt
    >>> w = keras.Variable(keras.ops.zeros(10000))
    >>> noise = tf_effopt.transforms.GradientNoise(variance=0.01)
    >>> optimizer = tf_effopt.SGD(1.0, transforms=[noise])
    >>> optimizer.apply([keras.ops.zeros(10000)], [w])
    >>> round(float(keras.ops.std(w)), 2)
    0.1
    """

    before = staticmethod(noisy)
    variance: FloatOrSchedule = NonNegative(default=0.3)
    gamma: FloatOrSchedule = NonNegative(default=0.55)
    seed: int = Integer(low=0, default=0)
