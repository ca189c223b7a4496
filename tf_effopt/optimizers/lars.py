"""LARS, from You et al., "Large Batch Training of Convolutional Networks", 2017.

https://arxiv.org/abs/1708.03888
"""

from tf_effopt.base import Optimizer, Part, Slots, hp
from tf_effopt.engine.linalg import trust_ratio
from tf_effopt.state.variables import matches


def lars_rule(
    g,
    slots,
    *,
    w,
    learning_rate,
    momentum,
    nesterov,
    trust_coefficient,
    weight_decay,
    adapts,
):
    """Returns LARS's change to one tensor, and its next velocity.

    Args:
        g: gradient, of any shape `S`.
        slots: `v`, of shape `S`: minus the last step, in the weight's units.
        w: the weight, of shape `S`.
        learning_rate: scalar.
        momentum: share of the last step that is repeated.
        nesterov: whether to look ahead along the new velocity.
        trust_coefficient: scalar, the share of its norm that a weight may move
            per unit of the learning rate.
        weight_decay: scalar.
        adapts: whether the step is scaled by the local learning rate.

    Returns:
        `(delta, slots)`: what to add to the weight, and the next `v`.
    """
    d = g + weight_decay * w
    if adapts:
        d = trust_ratio(w, d, trust_coefficient) * d
    v = momentum * slots["v"] + learning_rate * d
    delta = momentum * v + learning_rate * d if nesterov else v
    return -delta, {"v": v}


class Lars(Optimizer):
    """LARS: momentum whose step is a share of each tensor's own norm.

    The local learning rate is `trust_coefficient * norm(w) / norm(d)` with
    `d = g + weight_decay * w`, as in TensorFlow's model garden and in Optax; 1
    where a norm is 0. (The paper's Algorithm 1 divides by
    `norm(g) + weight_decay * norm(w)`, which is the same without decay.) The
    learning rate stands inside the velocity, as in the paper.

    Keeps 1 value per parameter.

    When not to use it: with batches of less than some thousand examples, `SGD`
    with momentum is as good; for Transformers use `Lamb`.

    Reference: You et al., 2017, https://arxiv.org/abs/1708.03888

    Args:
        learning_rate: float of at least 0, schedule or callable. Usually large,
            1 to 30, after a warm-up.
        momentum: float in [0, 1], share of the last step that is repeated.
        trust_coefficient: float above 0, the paper's eta.
        nesterov: bool, Nesterov's momentum.
        exclude_from_adaptation: list of regular expressions: variables whose
            path has a match anywhere take the step of `SGD`. Usually
            `["bias", "norm", "batch_normalization"]`; to take them out of the
            decay, too, call `exclude_from_weight_decay`.
        **kwargs: what every optimizer takes; see `tf_effopt.Optimizer`. Here
            `weight_decay` is part of the rule.

    Example:

    >>> import keras, tf_effopt
    >>> w = keras.Variable([3.0, 4.0])
    >>> optimizer = tf_effopt.Lars(learning_rate=1.0, trust_coefficient=0.1)
    >>> optimizer.apply([keras.ops.convert_to_tensor([0.0, 20.0])], [w])
    >>> w.numpy().tolist()  # moved by 0.1 * norm(w)
    [3.0, 3.5]
    """

    slots = Slots(v="momentum")
    elementwise = False
    adapted = Part(lars_rule, slots, settings={"adapts": True}, name="lars")
    excluded = Part(lars_rule, slots, settings={"adapts": False}, name="sgd")
    learning_rate: hp.RateOrSchedule = hp.LearningRate(default=0.1)
    momentum: hp.FloatOrSchedule = hp.Fraction(default=0.9)
    trust_coefficient: hp.FloatOrSchedule = hp.Positive(default=0.001)
    nesterov: bool = hp.Switch(default=False)
    exclude_from_adaptation: list = hp.Patterns(default=())

    def part(self, path, shape):
        excluded = matches(self.exclude_from_adaptation, path)
        return self.excluded if excluded else self.adapted
