"""The cautious mask, from Liang et al., "Cautious Optimizers: Improving Training
with One Line of Code", 2024.

https://arxiv.org/abs/2411.16085
"""

from __future__ import annotations

from keras import ops

from tf_effopt.transforms.base import Transform


def masked(delta, g):
    """Returns `delta` where it goes against the gradient, scaled up, else 0."""
    # Not the product of the two, which can be too small a number for float32.
    mask = ops.cast(ops.sign(delta) * ops.sign(g) < 0, g.dtype)
    least = 1e-3 + 0 * ops.mean(mask)
    return delta * mask / ops.maximum(ops.mean(mask), least)


class Cautious(Transform):
    """Leaves out the coordinates in which a step goes along the gradient.

    With momentum a step may; those that are left are scaled up by the share that
    was left out, tensor by tensor. The variant is the authors' code for AdamW:
    the scale is `1 / max(mean(mask), 1e-3)`. Weight decay, unless part of the
    rule, isn't masked.

    Keeps no state.

    When not to use it: with rules without momentum, whose every step goes
    against the gradient.

    Reference: Liang et al., 2024, https://arxiv.org/abs/2411.16085

    Example:

    >>> import keras, tf_effopt
    >>> w = keras.Variable([0.0, 0.0])
    >>> mask = tf_effopt.transforms.Cautious()
    >>> optimizer = tf_effopt.SGD(1.0, momentum=0.5, transforms=[mask])
    >>> for g in ([1.0, 1.0], [1.0, -0.1]):
    ...     optimizer.apply([keras.ops.convert_to_tensor(g)], [w])
    >>> w.numpy().tolist()  # the second step is (-1.5, -0.4): only its first half
    [-4.0, -1.0]
    """

    after = staticmethod(masked)
