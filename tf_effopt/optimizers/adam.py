"""Adam, from Kingma & Ba, "Adam: A Method for Stochastic Optimization", 2015.

https://arxiv.org/abs/1412.6980
"""

from keras import ops

from tf_effopt.base import ModelRule, Optimizer, Slots, hp


def adam_correction(sums, slots, *, t, beta_1, beta_2, bias_correction):
    """Returns what makes up for moments that start at 0.

    Args:
        t: scalar or vector, the numbers of updates, from 1.
        beta_1, beta_2: share of the moments kept per update, in [0, 1).
        bias_correction: whether to make up for it.

    Returns:
        `(numbers, slots)`: `correction`, of each tensor by its count; no slots.
    """
    if not bias_correction:
        return {"correction": 1 + 0 * t}, {}
    return {"correction": ops.sqrt(1 - beta_2**t) / (1 - beta_1**t)}, {}


def adam_rule(g, slots, *, correction, learning_rate, beta_1, beta_2, epsilon, amsgrad):
    """Returns Adam's change to one tensor, and its next moments.

    Args:
        g: gradient, of any shape `S`; loss per unit of the weight.
        slots: tensors of shape `S`: `m`, the decayed mean of `g`, in its
            units; `v`, the decayed mean of `g**2`, in their square; with
            `amsgrad` also `v_hat`, the largest `v` so far.
        correction: scalar, see `adam_correction`.
        learning_rate: scalar, in the weight's units: about the most a
            coordinate moves in one update (§2.1 of the paper).
        beta_1, beta_2: share of `m` and of `v` kept per update, in [0, 1).
        epsilon: above 0, in the units of `g`.
        amsgrad: whether the denominator may never shrink.

    Returns:
        `(delta, slots)`: what to add to the weight, and the next slots.
    """
    m = beta_1 * slots["m"] + (1 - beta_1) * g
    v = beta_2 * slots["v"] + (1 - beta_2) * ops.square(g)
    new_slots = {"m": m, "v": v}
    if amsgrad:
        v = new_slots["v_hat"] = ops.maximum(slots["v_hat"], v)
    alpha = learning_rate * correction
    return -alpha * m / (ops.sqrt(v) + epsilon), new_slots


class Adam(Optimizer):
    """Adam: each coordinate's step is scaled by its gradient's recent moments.

    The variant is the paper's "just before Section 2.1", as in Keras:
    `epsilon` is its epsilon-hat, added to `sqrt(v)` before the bias
    correction. (PyTorch and Optax follow Algorithm 1, whose epsilon is added
    after it: a difference in early steps and for tiny gradients.) AMSGrad
    takes the largest `v` before its correction, as Keras does.

    Keeps 2 values per parameter, 3 with `amsgrad`. Takes
    `keras.optimizers.Adam`'s arguments and loads its state.

    When not to use it: with weight decay use `AdamW`'s default; where memory
    is short, its state is twice the model.

    Reference: Kingma & Ba, 2015, https://arxiv.org/abs/1412.6980;
    `amsgrad`: Reddi et al., 2018, https://openreview.net/forum?id=ryQu7f-RZ

    Args:
        learning_rate: float of at least 0, schedule or callable; about the
            most that a weight moves in one update.
        beta_1: float in [0, 1), share of the first moment kept per update.
        beta_2: float in [0, 1), share of the second moment kept per update.
        epsilon: float above 0, the paper's epsilon-hat.
        amsgrad: bool, whether the denominator may never shrink.
        bias_correction: bool. `False` is the rule without the correction for
            moments that start at 0: its first steps are about
            `(1 - beta_1) / sqrt(1 - beta_2)` as long, 3.16 times with the
            defaults.

    Example:

    >>> import keras, tf_effopt
    >>> w = keras.Variable([1.0, 1.0])
    >>> optimizer = tf_effopt.Adam(learning_rate=0.1)
    >>> optimizer.apply([keras.ops.convert_to_tensor([3.0, -0.01])], [w])
    >>> [round(x, 4) for x in w.numpy().tolist()]  # one learning rate each
    [0.9, 1.1]
    """

    rule = staticmethod(adam_rule)
    model_rule = ModelRule(adam_correction, each_count=True)
    beta_1: hp.FloatOrSchedule = hp.DecayRate(default=0.9)
    beta_2: hp.FloatOrSchedule = hp.DecayRate(default=0.999)
    epsilon: hp.FloatOrSchedule = hp.Positive(default=1e-7)
    amsgrad: bool = hp.Switch(default=False)
    bias_correction: bool = hp.Switch(default=True, kw_only=True)

    @property
    def slots(self):
        moments = Slots(m="momentum", v="velocity")
        return (moments, Slots(v_hat="velocity_hat")) if self.amsgrad else moments
