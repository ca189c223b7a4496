"""RAdam, from Liu et al., "On the Variance of the Adaptive Learning Rate and
Beyond", 2020.

https://arxiv.org/abs/1908.03265
"""

from keras import ops

from tf_effopt.base import ModelRule, Optimizer, Slots, hp

# Of one coefficient of `bend`'s power series, B_2k / (2k)!, to the next.
BERNOULLI_RATIOS = (
    60,
    42,
    40,
    39.6,
    39.50795947902,
    39.48571428571,
    39.48023223666,
    39.47887022135,
)


def radam_rectification(sums, slots, *, t, beta_1, beta_2):
    """Returns how a step of Adam is corrected, and by how much it is adaptive.

    Args:
        t: scalar or vector, the numbers of updates, from 1.
        beta_1, beta_2: share of the moments kept per update, in [0, 1).

    Returns:
        `(numbers, slots)`, of each tensor by its count: `bias`, the share of a mean of
        gradients in `m`; `r`, the paper's `r_t` times the root of that in `v`, or 0 if
        its `rho_t` is below 5; no slots.
    """
    rho_inf = 1 + 2 * beta_2 / (1 - beta_2)
    rho = average_length(beta_2, t)
    r = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
    r = ops.sqrt(ops.where(rho >= 5, r, 0 * r) * (1 - beta_2**t))
    return {"bias": 1 - beta_1**t, "r": r}, {}


def radam_rule(g, slots, *, learning_rate, beta_1, beta_2, epsilon, bias, r):
    """Returns RAdam's change to one tensor, and its next moments.

    Args:
        g: gradient, of any shape `S`.
        slots: tensors of shape `S`: `m`, the decayed mean of `g`; `v`, that of
            `g**2`.
        learning_rate: scalar.
        beta_1, beta_2: share of `m` and of `v` kept per update, in [0, 1).
        epsilon: above 0, in the units of `g`.
        bias, r: scalars, see `radam_rectification`.

    Returns:
        `(delta, slots)`: what to add to the weight, and the next slots.
    """
    m = beta_1 * slots["m"] + (1 - beta_1) * g
    v = beta_2 * slots["v"] + (1 - beta_2) * ops.square(g)
    scale = r / (ops.sqrt(v) + epsilon)
    step = m / bias * ops.where(r > 0, scale, 1 + 0 * scale)
    return -learning_rate * step, {"m": m, "v": v}


def average_length(beta, t):
    """Returns the paper's rho_t, `rho_inf - 2 * t * beta**t / (1 - beta**t)`.

    In early steps that is a small difference of large numbers. With
    `y = -log(beta)` and `b(u) = u / (exp(u) - 1)` it equals
    `1 + 2 * (b(y) - b(y * t)) / y`, where the linear terms of `b` cancel.
    """
    y = -ops.log1p(-(1 - beta))
    early = t - 2 * (bend(y * t) - bend(y)) / y
    late = 1 + 2 * beta / (1 - beta) - 2 * t / ops.expm1(y * t)
    return ops.where(y * t < 1, early, late)


def bend(u):
    """Returns `u / (exp(u) - 1) - 1 + u / 2` for `u` below 1, else 0."""
    square = ops.square(ops.where(u < 1, u, 0 * u))
    series = 1
    for ratio in reversed(BERNOULLI_RATIOS):
        series = 1 - square / ratio * series
    return square / 12 * series


class RAdam(Optimizer):
    """RAdam: Adam whose first steps aren't scaled until their scale is reliable.

    The variant is the paper's Algorithm 2 as the authors' code and PyTorch run
    it: from `rho_t` = 5 on (the paper's text has 4) Adam's step times the
    rectification, before that the bias-corrected moment itself (which the
    authors' code has as an option); `epsilon` is added to `sqrt(v)` before the
    bias correction, as in both.

    Keeps 2 values per parameter.

    When not to use it: where a warm-up schedule is tuned already, `AdamW` does
    the same with one setting less hidden.

    Reference: Liu et al., 2020, https://arxiv.org/abs/1908.03265

    Args:
        learning_rate: float of at least 0, schedule or callable.
        beta_1: float in [0, 1), share of the first moment kept per update.
        beta_2: float in [0, 1), share of the second moment kept per update. At
            0.6 or less, no step is ever rectified.
        epsilon: float above 0.

    Example:

    >>> import keras, tf_effopt
    >>> w = keras.Variable([1.0, 1.0])
    >>> optimizer = tf_effopt.RAdam(learning_rate=0.1)
    >>> optimizer.apply([keras.ops.convert_to_tensor([3.0, -0.01])], [w])
    >>> [round(x, 4) for x in w.numpy().tolist()]  # not yet one size for all
    [0.7, 1.001]
    """

    rule = staticmethod(radam_rule)
    slots = Slots(m="momentum", v="velocity")
    model_rule = ModelRule(radam_rectification, each_count=True)
    beta_1: hp.FloatOrSchedule = hp.DecayRate(default=0.9)
    beta_2: hp.FloatOrSchedule = hp.DecayRate(default=0.999)
    epsilon: hp.FloatOrSchedule = hp.Positive(default=1e-8)
