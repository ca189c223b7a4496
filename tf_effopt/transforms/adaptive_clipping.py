"""Adaptive gradient clipping, from Brock et al., "High-Performance Large-Scale
Image Recognition Without Normalization", 2021.

https://arxiv.org/abs/2102.06171
"""

from __future__ import annotations

from keras import ops

from tf_effopt.engine.clipping import shrink
from tf_effopt.hyperparameters import FloatOrSchedule, Patterns, Positive
from tf_effopt.state.variables import matches
from tf_effopt.transforms.base import Transform


def unit_norm(x, input_axes):
    """Returns the norm of each output unit's part of `x`."""
    if not input_axes:
        return ops.abs(x)
    return ops.sqrt(ops.sum(ops.square(x), axis=input_axes, keepdims=True))


def unit_norms(g, *, input_axes, large):
    """Returns each unit's norm, and what it was multiplied by: 1, or what shrinks it."""
    norm = unit_norm(g, input_axes)
    scale = ops.ones_like(norm)
    if large:
        scale = ops.where(ops.isfinite(norm), scale, shrink(g) * scale)
        norm = unit_norm(g * scale, input_axes)
    return {"norm": norm, "scale": scale}


def clip_by_unit(g, *, w, input_axes, clipping, epsilon, norm, scale):
    """Returns `g`, each unit's norm at most `clipping` times that of its weight.

    Args:
        g: gradient.
        w: the weight, of the same shape.
        input_axes: those along which the weights of a unit lie.
        clipping: scalar, the largest ratio of the two norms.
        epsilon: scalar, the least norm of a weight that counts.
        norm, scale: each unit's norm times its scale.
    """
    largest = clipping * ops.maximum(unit_norm(w, input_axes), epsilon)
    factor = largest / ops.maximum(norm, 1e-6 * scale)
    return g * scale * ops.where(norm > largest * scale, factor, 1 / scale)


class AdaptiveClipping(Transform):
    """Clips each unit's gradient to a share of the norm of its weights.

    The variant is the authors' code: per output unit, a bias as a whole, a depthwise
    convolution by channel. Input axes are inferred from Keras's standard variable names,
    including those of transposed convolutions and attention's projections.

    Keeps no state; one more norm of weight and gradient.

    When not to use it: on the classifier's last layer: exclude it, as the
    authors do.

    Reference: Brock et al., 2021, https://arxiv.org/abs/2102.06171

    Args:
        clipping: float above 0, the largest ratio of the gradient's norm to the
            weight's; 0.01 for batches of some thousand, more for small ones.
        epsilon: float above 0, the least norm of a weight that counts, so that
            weights that start at 0 can leave it.
        exclude: list of regular expressions: variables whose path has a match
            anywhere aren't clipped.

    Raises:
        ValueError: an argument is out of its range.

    Example:

    >>> import keras, tf_effopt
    >>> w = keras.Variable([[3.0], [4.0]])  # one unit, of norm 5
    >>> clip = tf_effopt.transforms.AdaptiveClipping(0.1)
    >>> optimizer = tf_effopt.SGD(1.0, transforms=[clip])
    >>> optimizer.apply([keras.ops.convert_to_tensor([[10.0], [0.0]])], [w])
    >>> w.numpy().tolist()
    [[2.5], [4.0]]
    """

    look = staticmethod(unit_norms)
    before = staticmethod(clip_by_unit)
    clips = True
    clipping: FloatOrSchedule = Positive(default=0.01)
    epsilon: FloatOrSchedule = Positive(default=1e-3)
    exclude: list = Patterns(default=())

    def acts_on(self, path, shape):
        return not matches(self.exclude, path)
