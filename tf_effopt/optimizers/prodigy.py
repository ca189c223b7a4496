"""Prodigy, from Mishchenko & Defazio, "Prodigy: An Expeditiously Adaptive
Parameter-Free Learner", 2024.

https://arxiv.org/abs/2306.06101
"""

from keras import ops

from tf_effopt.base import ModelRule, Optimizer, Slot, Slots, hp


def step_size(d, t, learning_rate, beta_1, beta_2, bias_correction):
    """Returns how far a coordinate moves: the estimate times the schedule."""
    if bias_correction:
        learning_rate = learning_rate * ops.sqrt(1 - beta_2**t) / (1 - beta_1**t)
    return d * learning_rate


def prodigy_sum(g, s, d, d_lr, beta_2, initial_estimate, safeguard_warmup):
    """Returns the next `s`, the decayed sum of weighted gradients."""
    weight = d if safeguard_warmup else d_lr
    return beta_2**0.5 * s + d / initial_estimate * weight * g


def prodigy_measure(
    g,
    slots,
    *,
    t,
    w,
    d,
    learning_rate,
    beta_1,
    beta_2,
    initial_estimate,
    bias_correction,
    safeguard_warmup,
):
    """Returns what one tensor adds to both parts of the estimate.

    Args:
        g: gradient, of any shape `S`.
        slots: tensors of shape `S`: `s`, see `prodigy_sum`, and `x0`, the
            weight before the first update.
        w: the weight, of shape `S`.
        d: scalar, the estimate before this update.
    """
    d_lr = step_size(d, t, learning_rate, beta_1, beta_2, bias_correction)
    s = prodigy_sum(g, slots["s"], d, d_lr, beta_2, initial_estimate, safeguard_warmup)
    return {
        "numerator": d / initial_estimate * d_lr * ops.sum(g * (slots["x0"] - w)),
        "denominator": ops.sum(ops.abs(s)),
    }


def prodigy_estimate(
    sums,
    slots,
    *,
    t,
    learning_rate,
    beta_1,
    beta_2,
    bias_correction,
    estimate_coefficient,
):
    """Returns the next estimate of the distance from the start to a solution.

    Args:
        sums: scalars, those of `prodigy_measure` over all tensors.
        slots: scalars: `d`, the estimate; `numerator`, decayed.

    Returns:
        `(numbers, slots)`: the estimate before and after, the step's size
        before; and the next slots.
    """
    d = slots["d"]
    numerator = beta_2**0.5 * slots["numerator"] + sums["numerator"]
    known = (sums["denominator"] > 0) & (learning_rate > 0)
    d_hat = (
        estimate_coefficient
        * numerator
        / ops.where(known, sums["denominator"], 1 + 0 * d)
    )
    d_next = ops.maximum(d, ops.where(known, d_hat, 0 * d))
    numbers = {"d": d, "d_next": d_next}
    return numbers, {"d": d_next, "numerator": numerator}


def prodigy_rule(
    g,
    slots,
    *,
    t,
    w,
    learning_rate,
    beta_1,
    beta_2,
    epsilon,
    weight_decay,
    initial_estimate,
    bias_correction,
    safeguard_warmup,
    d,
    d_next,
):
    """Returns Prodigy's change to one tensor, and its next slots.

    Args:
        g: gradient, of any shape `S`.
        slots: tensors of shape `S`: `m` and `v`, decayed means of `d * g` and of
            its square; `s`, see `prodigy_sum`; `x0`, the first weight.
        t: scalar, the number of this update, from 1.
        w: the weight, of shape `S`.
        learning_rate: scalar, 1 times a schedule.
        beta_1, beta_2: share of `m` and of `v` kept per update, in [0, 1).
        epsilon: above 0, in the units of `g`.
        weight_decay: scalar, times the step's size.
        d, d_next: scalars, the estimate before and after this update.

    Returns:
        `(delta, slots)`: what to add to the weight, and the next slots.
    """
    d_lr = step_size(d, t, learning_rate, beta_1, beta_2, bias_correction)
    m = beta_1 * slots["m"] + (1 - beta_1) * d * g
    v = beta_2 * slots["v"] + (1 - beta_2) * ops.square(d * g)
    s = prodigy_sum(g, slots["s"], d, d_lr, beta_2, initial_estimate, safeguard_warmup)
    delta = -d_lr * m / (ops.sqrt(v) + d_next * epsilon) - weight_decay * d_lr * w
    return delta, {"m": m, "v": v, "s": s, "x0": slots["x0"]}


class Prodigy(Optimizer):
    """Prodigy: Adam that finds its learning rate.

    One number for the whole model, an estimate of the distance from the first
    weights to a solution, takes the learning rate's place and only grows. The
    variant is the paper's Algorithm 4 as the authors' package runs it, with
    decoupled weight decay times the step's size and without a limit to the
    estimate's growth. Where the authors' code leaves out a step whose gradients
    have all been zero so far, this one counts it.

    Keeps 4 values per parameter, and 2 in all.

    Its step size belongs to the whole model: a variable that joins later starts at
    its weight of then, with the model's step size and count of updates.

    When not to use it: where memory is short, or a good learning rate is known.
    With weight sizes that differ widely between layers the estimate is that of
    the largest.

    Reference: Mishchenko & Defazio, 2024, https://arxiv.org/abs/2306.06101

    Args:
        learning_rate: float of at least 0, schedule or callable: 1 times the
            shape of a schedule, usually a cosine to 0.
        beta_1: float in [0, 1), share of the first moment kept per update.
        beta_2: float in [0, 1), share of the second moment kept per update; its
            root that of the estimate's sums.
        epsilon: float above 0.
        bias_correction: bool, whether to make up for moments that start at 0.
        safeguard_warmup: bool, whether the learning rate is left out of the
            estimate's denominator; set it with a warm-up.
        initial_estimate: float above 0, the first estimate.
        estimate_coefficient: float above 0: a lasting factor of the estimate; to
            get larger or smaller steps, change this one.
        **kwargs: what every optimizer takes; see `tf_effopt.Optimizer`. Here
            `weight_decay` is part of the rule.

    Example:

    >>> import keras, tf_effopt
    >>> w = keras.Variable([1.0])
    >>> optimizer = tf_effopt.Prodigy()
    >>> for _ in range(60):  # minimize w**2 / 2
    ...     optimizer.apply([w.value], [w])
    >>> bool(abs(w.numpy()[0]) < 0.2)
    True
    """

    rule = staticmethod(prodigy_rule)
    slots = Slots(
        m="momentum",
        v="velocity",
        s="gradient_sum",
        x0=Slot("initial", starts_at_weight=True),
    )
    elementwise = False
    learning_rate: hp.RateOrSchedule = hp.LearningRate(default=1.0)
    beta_1: hp.FloatOrSchedule = hp.DecayRate(default=0.9)
    beta_2: hp.FloatOrSchedule = hp.DecayRate(default=0.999)
    epsilon: hp.FloatOrSchedule = hp.Positive(default=1e-8)
    bias_correction: bool = hp.Switch(default=False)
    safeguard_warmup: bool = hp.Switch(default=False)
    initial_estimate: hp.FloatOrSchedule = hp.Positive(default=1e-6)
    estimate_coefficient: hp.FloatOrSchedule = hp.Positive(default=1.0)

    @property
    def model_rule(self):
        slots = {
            "d": ("estimate", self.initial_estimate),
            "numerator": ("estimate_numerator", 0.0),
        }
        return ModelRule(prodigy_estimate, slots, prodigy_measure)
