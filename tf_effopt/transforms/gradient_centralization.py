"""Gradient centralization, from Yong et al., "Gradient Centralization: A New
Optimization Technique for Deep Neural Networks", 2020.

https://arxiv.org/abs/2004.01461
"""

from __future__ import annotations

from keras import ops

from tf_effopt.hyperparameters import Patterns
from tf_effopt.state.variables import matches
from tf_effopt.transforms.base import Transform


def centralized(g, *, input_axes):
    """Returns `g` less its mean over each output unit's weights."""
    return g - ops.mean(g, axis=input_axes, keepdims=True)


class GradientCentralization(Transform):
    """Takes from the gradient of each output unit's weights their mean.

    The variant is the paper's equation 1, before the rule's moments, for all
    tensors of two axes and more; vectors are left alone. Input axes are inferred
    from Keras's standard variable names, including those of transposed and depthwise
    convolutions and of attention's projections. With a rule that is linear in the gradient, such as `SGD`,
    the sum of a unit's weights then stays as it is.

    Keeps no state.

    When not to use it: where the mean of a unit's weights matters, as after inputs
    whose mean isn't 0 and without normalization. In an embedding's table it would
    mix rows that have nothing to do with each other: it is left out by default.

    Reference: Yong et al., 2020, https://arxiv.org/abs/2004.01461

    Args:
        exclude: list of regular expressions: variables whose path has a match
            anywhere are left alone. For the authors' `gc_conv_only`, name the dense
            layers, too.

    Raises:
        ValueError: an argument is out of its range.

    Example:

    >>> import keras, tf_effopt
    >>> w = keras.Variable([[0.0, 0.0], [0.0, 0.0]])
    >>> centralization = tf_effopt.transforms.GradientCentralization()
    >>> optimizer = tf_effopt.SGD(1.0, transforms=[centralization])
    >>> optimizer.apply([keras.ops.convert_to_tensor([[1.0, 5.0], [3.0, 5.0]])], [w])
    >>> w.numpy().tolist()  # column by column
    [[1.0, 0.0], [-1.0, 0.0]]
    """

    before = staticmethod(centralized)
    exclude: list = Patterns(default=("embeddings$",))

    def acts_on(self, path, shape):
        return len(shape) > 1 and not matches(self.exclude, path)
