"""Lion, from Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023.

https://arxiv.org/abs/2302.06675
"""

from keras import ops

from tf_effopt.base import Optimizer, Slots, hp


def lion_rule(g, slots, *, learning_rate, beta_1, beta_2):
    """Returns Lion's change to one tensor, and its next moment.

    Args:
        g: gradient, of any shape `S`.
        slots: `m`, of shape `S`: the decayed mean of `g`, in its units.
        learning_rate: scalar, in the weight's units: how far each coordinate
            moves.
        beta_1: share of `m` in the step's direction.
        beta_2: share of `m` kept per update.

    Returns:
        `(delta, slots)`: what to add to the weight, and the next `m`.
    """
    u = ops.sign(beta_1 * slots["m"] + (1 - beta_1) * g)
    m = beta_2 * slots["m"] + (1 - beta_2) * g
    return -learning_rate * u, {"m": m}


class Lion(Optimizer):
    """Lion: each coordinate moves by the learning rate, in its moment's direction.

    The variant is the paper's Algorithm 2, as in the authors' code and in
    Keras; a coordinate whose moment is 0 stays. Weight decay is decoupled and
    times the learning rate.

    Keeps 1 value per parameter. Takes `keras.optimizers.Lion`'s arguments and
    loads its state. Its default learning rate is Keras's, 1e-3; the authors'
    is 1e-4.

    When not to use it: on small batches, whose gradient has more noise than
    sign. Take 3 to 10 times less learning rate than for `AdamW`, and as many
    times more weight decay.

    Reference: Chen et al., 2023, https://arxiv.org/abs/2302.06675

    Args:
        learning_rate: float of at least 0, schedule or callable; how far each
            weight moves in one update.
        beta_1: float in [0, 1), share of the moment in the direction.
        beta_2: float in [0, 1), share of the moment kept per update.

    Example:

    >>> import keras, tf_effopt
    >>> w = keras.Variable([1.0, 1.0, 1.0])
    >>> optimizer = tf_effopt.Lion(learning_rate=0.5)
    >>> optimizer.apply([keras.ops.convert_to_tensor([3.0, -0.01, 0.0])], [w])
    >>> w.numpy().tolist()
    [0.5, 1.5, 1.0]
    """

    rule = staticmethod(lion_rule)
    slots = Slots(m="momentum")
    beta_1: hp.FloatOrSchedule = hp.DecayRate(default=0.9)
    beta_2: hp.FloatOrSchedule = hp.DecayRate(default=0.99)
