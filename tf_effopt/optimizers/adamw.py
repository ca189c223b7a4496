"""AdamW, from Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019.

https://arxiv.org/abs/1711.05101
"""

from tf_effopt.base import hp
from tf_effopt.optimizers.adam import Adam


class AdamW(Adam):
    """AdamW: Adam, and weights that decay apart from their gradient.

    The decay is `learning_rate * weight_decay * w` per update, as in Keras,
    PyTorch and Optax. (In the paper only the schedule's multiplier scales it,
    not the base learning rate.) It acts on the weight before the step, and
    not on what `exclude_from_weight_decay` names.

    Keeps 2 values per parameter, 3 with `amsgrad`. Takes
    `keras.optimizers.AdamW`'s arguments and loads its state.

    When not to use it: on small models that underfit; decay only hinders.

    Reference: Loshchilov & Hutter, 2019, https://arxiv.org/abs/1711.05101

    Args:
        learning_rate: float of at least 0, schedule or callable.
        weight_decay: float of at least 0, share of the weight that one
            update at learning rate 1 takes away. Keras's default is 0.004;
            Transformers are usually trained with 0.01 to 0.1.
        beta_1, beta_2, epsilon, amsgrad, bias_correction: see `Adam`.

    Example:

    >>> import keras, tf_effopt
    >>> w = keras.Variable([1.0])
    >>> optimizer = tf_effopt.AdamW(learning_rate=0.1, weight_decay=0.5)
    >>> optimizer.apply([keras.ops.convert_to_tensor([0.0])], [w])
    >>> round(float(w.numpy()[0]), 6)
    0.95
    """

    weight_decay: hp.FloatOrSchedule = hp.NonNegative(default=0.004)
