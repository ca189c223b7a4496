"""Nadam, from Dozat, "Incorporating Nesterov Momentum into Adam", 2016.

https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ
"""

from keras import ops

from tf_effopt.base import ModelRule, Optimizer, Slots, hp


def nadam_schedule(sums, slots, *, t, beta_1):
    """Returns this and the next step's momentum, and their products so far.

    Args:
        slots: `mu_product`, a scalar: the product of `mu` over all updates.
        t: scalar, the number of this update, from 1.
        beta_1: share of the first moment, which `mu` tends to.

    Returns:
        `(numbers, slots)`: `mu` of this update, `mu_next` of the next one,
        and the products up to each.
    """
    mu = beta_1 * (1 - 0.5 * 0.96**t)
    mu_next = beta_1 * (1 - 0.5 * 0.96 ** (t + 1))
    product = slots["mu_product"] * mu
    numbers = {
        "mu": mu,
        "mu_next": mu_next,
        "product": product,
        "product_next": product * mu_next,
    }
    return numbers, {"mu_product": product}


def nadam_rule(
    g,
    slots,
    *,
    t,
    learning_rate,
    beta_1,
    beta_2,
    epsilon,
    mu,
    mu_next,
    product,
    product_next,
):
    """Returns Nadam's change to one tensor, and its next moments.

    Args:
        g: gradient, of any shape `S`.
        slots: tensors of shape `S`: `m`, the decayed mean of `g`; `v`, that of
            `g**2`.
        t: scalar, the number of this update, from 1.
        learning_rate: scalar.
        beta_1, beta_2: share of `m` and of `v` kept per update, in [0, 1).
        epsilon: above 0, in the units of `g`.
        mu, mu_next, product, product_next: see `nadam_schedule`.

    Returns:
        `(delta, slots)`: what to add to the weight, and the next slots.
    """
    m = beta_1 * slots["m"] + (1 - beta_1) * g
    v = beta_2 * slots["v"] + (1 - beta_2) * ops.square(g)
    m_hat = mu_next * m / (1 - product_next) + (1 - mu) * g / (1 - product)
    v_hat = v / (1 - beta_2**t)
    return -learning_rate * m_hat / (ops.sqrt(v_hat) + epsilon), {"m": m, "v": v}


class Nadam(Optimizer):
    """Nadam: Adam that looks ahead along its momentum, as Nesterov's does.

    The variant is the paper's, with its momentum schedule
    `mu_t = beta_1 * (1 - 0.5 * 0.96**t)`, as in Keras; `epsilon` is added to the
    bias-corrected root. (PyTorch's schedule is 250 times slower,
    `0.96**(0.004 * t)`; Optax has none.)

    Keeps 2 values per parameter, and 1 in all. Takes
    `keras.optimizers.Nadam`'s arguments and loads its state.

    Its schedule of momentum belongs to the whole model: a variable that joins later
    has the model's count of updates, so its first steps aren't corrected for moments
    that start at 0, and are several learning rates long.

    When not to use it: where a learning rate for `Adam` is at its edge of
    stability; this one's first steps are longer.

    Reference: Dozat, 2016, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ

    Args:
        learning_rate: float of at least 0, schedule or callable.
        beta_1: float in [0, 1), share of the first moment kept per update, and
            the limit of the momentum schedule. (Changed while training, it
            counts from then on.)
        beta_2: float in [0, 1), share of the second moment kept per update.
        epsilon: float above 0.

    Example:

    >>> import keras, tf_effopt
    >>> w = keras.Variable([1.0, 1.0])
    >>> optimizer = tf_effopt.Nadam(learning_rate=0.1)
    >>> optimizer.apply([keras.ops.convert_to_tensor([3.0, -0.01])], [w])
    >>> [round(x, 4) for x in w.numpy().tolist()]
    [0.8937, 1.1063]
    """

    rule = staticmethod(nadam_rule)
    slots = Slots(m="momentum", v="velocity")
    model_rule = ModelRule(nadam_schedule, slots={"mu_product": ("u_product", 1.0)})
    beta_1: hp.FloatOrSchedule = hp.DecayRate(default=0.9)
    beta_2: hp.FloatOrSchedule = hp.DecayRate(default=0.999)
    epsilon: hp.FloatOrSchedule = hp.Positive(default=1e-7)
