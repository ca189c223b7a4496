"""MARS, from Yuan et al., "MARS: Unleashing the Power of Variance Reduction for
Training Large Models", 2024.

https://arxiv.org/abs/2411.10438
"""

from __future__ import annotations

from keras import ops

from tf_effopt.base.stage import Stage
from tf_effopt.hyperparameters import DecayRate, FloatOrSchedule, NonNegative, Patterns
from tf_effopt.rules import Slots
from tf_effopt.state.variables import matches

# Squares of a gradient whose own squares just fit must fit as well.
SCALE = 2.0**-16


def corrected(g, slots, *, gamma, beta_1):
    """Returns `g` with less variance, its norm at most 1, and what to keep.

    Args:
        g: gradient.
        slots: `last`, the gradient of the update before, 0 at first.
        gamma: scalar, how much of the correction is used.
        beta_1: decay rate of the rule's first moment.
    """
    share = gamma * beta_1 / (1 - beta_1)
    change = g - slots["last"]
    c = g + share * change
    # A sum of two products: XLA would take a common factor out of the squares.
    small = SCALE * g + (SCALE * share) * change
    norm = ops.sqrt(ops.sum(ops.square(small))) / SCALE
    return c / ops.maximum(norm, ops.ones_like(norm)), {"last": g}


class MARS(Stage):
    """Corrects each gradient by how it differs from the last one.

    `c = g + gamma * beta_1 / (1 - beta_1) * (g - last_g)` has less variance than `g`
    in the average that the rule keeps; it is scaled to a norm of at most 1, tensor by
    tensor. With `AdamW` it is the authors' MARS-AdamW, with `Lion` their MARS-Lion. The
    variant is their approximate one, in which the last gradient is that of the last
    batch, and their `optimize_1d=True`, in which vectors are treated like matrices.
    (By default the authors leave vectors to a plain AdamW with a learning rate of its
    own: see `exclude`, and `tf_effopt.Group`.)

    Keeps 1 value per parameter; one more norm of each gradient.

    When not to use it: with rules without a first moment; where gradients of
    successive batches have nothing in common.

    Reference: Yuan et al., 2024, https://arxiv.org/abs/2411.10438

    Args:
        gamma: float of at least 0; the authors' is 0.025.
        beta_1: float in [0, 1): that of the rule; the authors' is 0.95.
        exclude: list of regular expressions: variables whose path has a match
            anywhere are left alone.

    Raises:
        ValueError: an argument is out of its range.

    Example:

    >>> import keras, tf_effopt
    >>> w = keras.Variable([0.0])
    >>> mars = tf_effopt.transforms.MARS(gamma=0.5, beta_1=0.5)
    >>> optimizer = tf_effopt.SGD(1.0, transforms=[mars])
    >>> for g in (0.2, 0.4):  # 0.2 + 0.5 * 0.2, then 0.4 + 0.5 * (0.4 - 0.2)
    ...     optimizer.apply([keras.ops.convert_to_tensor([g])], [w])
    >>> round(float(w.numpy()[0]), 6)
    -0.8
    """

    where = "gradient"
    slots = Slots(last="last_gradient")
    function = staticmethod(corrected)
    gamma: FloatOrSchedule = NonNegative(default=0.025)
    beta_1: FloatOrSchedule = DecayRate(default=0.95)
    exclude: list = Patterns(default=())

    def acts_on(self, path, shape):
        return not matches(self.exclude, path)
