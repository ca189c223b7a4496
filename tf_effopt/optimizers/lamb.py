"""LAMB, from You et al., "Large Batch Optimization for Deep Learning: Training
BERT in 76 minutes", 2020.

https://arxiv.org/abs/1904.00962
"""

from keras import ops

from tf_effopt.base import ModelRule, Optimizer, Part, Slots, hp
from tf_effopt.engine.linalg import trust_ratio
from tf_effopt.state.variables import matches


def biases(sums, slots, *, t, beta_1, beta_2):
    """Returns the share of a mean of gradients in a moment that started at 0.

    Args:
        t: scalar or vector, the numbers of updates, from 1.
        beta_1, beta_2: share of the moments kept per update, in [0, 1).

    Returns:
        `(numbers, slots)`: `bias_1` and `bias_2`, of each tensor by its count; no
        slots.
    """
    return {"bias_1": 1 - beta_1**t, "bias_2": 1 - beta_2**t}, {}


def lamb_rule(
    g,
    slots,
    *,
    bias_1,
    bias_2,
    w,
    learning_rate,
    beta_1,
    beta_2,
    epsilon,
    weight_decay,
    adapts,
):
    """Returns LAMB's change to one tensor, and its next moments.

    Args:
        g: gradient, of any shape `S`.
        slots: tensors of shape `S`: `m`, the decayed mean of `g`; `v`, that of
            `g**2`.
        bias_1, bias_2: scalars, see `biases`.
        w: the weight, of shape `S`.
        learning_rate: scalar: about the share of the weight's norm that it
            moves in one update.
        beta_1, beta_2: share of `m` and of `v` kept per update, in [0, 1).
        epsilon: above 0, in the units of `g`.
        weight_decay: scalar, added to the step times `w`, inside the ratio.
        adapts: whether the step is scaled by the trust ratio.

    Returns:
        `(delta, slots)`: what to add to the weight, and the next slots.
    """
    m = beta_1 * slots["m"] + (1 - beta_1) * g
    v = beta_2 * slots["v"] + (1 - beta_2) * ops.square(g)
    m_hat = m / bias_1
    v_hat = v / bias_2
    r = m_hat / (ops.sqrt(v_hat) + epsilon) + weight_decay * w
    phi = trust_ratio(w, r) if adapts else 1
    return -learning_rate * phi * r, {"m": m, "v": v}


class Lamb(Optimizer):
    """LAMB: Adam whose step is a share of each tensor's own norm.

    The variant is the paper's Algorithm 2: the weight decay stands inside the
    trust ratio, and the ratio isn't clipped. (Keras's Lamb decays apart from
    the ratio: with decay the two differ, without they are equal.) `epsilon` is
    added to the bias-corrected root. The ratio is 1 where a norm is 0.

    Keeps 2 values per parameter. Takes `keras.optimizers.Lamb`'s arguments and
    loads its state.

    When not to use it: with batches of less than some thousand examples,
    `AdamW` is as good and has one norm less to compute.

    Reference: You et al., 2020, https://arxiv.org/abs/1904.00962

    Args:
        learning_rate: float of at least 0, schedule or callable.
        beta_1: float in [0, 1), share of the first moment kept per update.
        beta_2: float in [0, 1), share of the second moment kept per update.
        epsilon: float above 0. Keras's default is 1e-7, the authors' 1e-6.
        exclude_from_adaptation: list of regular expressions: variables whose
            path has a match anywhere take Adam's step, without the ratio; the
            authors exclude `["bias", "norm"]`. To take them out of the decay,
            too, call `exclude_from_weight_decay`.
        **kwargs: what every optimizer takes; see `tf_effopt.Optimizer`. Here
            `weight_decay` is part of the rule.

    Example:

    >>> import keras, tf_effopt
    >>> w = keras.Variable([3.0, 4.0])
    >>> optimizer = tf_effopt.Lamb(learning_rate=0.1)
    >>> optimizer.apply([keras.ops.convert_to_tensor([2.0, -2.0])], [w])
    >>> [round(x, 4) for x in w.numpy().tolist()]  # moved by 0.1 * norm(w)
    [2.6464, 4.3536]
    """

    slots = Slots(m="momentum", v="velocity")
    elementwise = False
    model_rule = ModelRule(biases, each_count=True)
    adapted = Part(lamb_rule, slots, settings={"adapts": True}, name="lamb")
    excluded = Part(lamb_rule, slots, settings={"adapts": False}, name="adam")
    beta_1: hp.FloatOrSchedule = hp.DecayRate(default=0.9)
    beta_2: hp.FloatOrSchedule = hp.DecayRate(default=0.999)
    epsilon: hp.FloatOrSchedule = hp.Positive(default=1e-7)
    exclude_from_adaptation: list = hp.Patterns(default=())

    def part(self, path, shape):
        excluded = matches(self.exclude_from_adaptation, path)
        return self.excluded if excluded else self.adapted
