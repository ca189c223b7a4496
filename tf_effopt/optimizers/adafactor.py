"""Adafactor, from Shazeer & Stern, "Adafactor: Adaptive Learning Rates with
Sublinear Memory Cost", 2018.

https://arxiv.org/abs/1804.04235
"""

import keras
from keras import ops

from tf_effopt.base import ModelRule, Optimizer, Part, Slot, Slots, hp
from tf_effopt.conversion.adafactor import adafactor_slots
from tf_effopt.engine.linalg import root_mean_square


def factored_moment(q, slots, beta, axes):
    """Returns `1 / sqrt(v)` as two factors, of rows and of columns, and the means.

    Their product isn't made: where a row and a column have had no gradient it is
    larger than any number of float32, and 0 times it would be NaN.

    Args:
        q: squared gradient, of shape `S`.
        slots: `r`, of `S` without the second of `axes`: means over it; `c`, of
            `S` without the first: means over that.
        beta: scalar, share of both kept in this update.
        axes: the two axes, in order, that are factored.
    """
    rows, columns = axes
    r = beta * slots["r"] + (1 - beta) * ops.mean(q, axis=columns)
    c = beta * slots["c"] + (1 - beta) * ops.mean(q, axis=rows)
    size = ops.sqrt(ops.mean(r, axis=rows, keepdims=True))
    # Two roots: the quotient of `r` and its mean can be too small for float32.
    row_factor = ops.expand_dims(size / ops.sqrt(r), columns)
    column_factor = ops.expand_dims(1 / ops.sqrt(c), rows)
    return (row_factor, column_factor), {"r": r, "c": c}


def adafactor_schedule(sums, slots, *, t, beta_2_decay):
    """Returns the numbers of the paper that depend on the update.

    Args:
        t: scalar or vector, the numbers of updates, from 1.
        beta_2_decay: scalar below 0.

    Returns:
        `(numbers, slots)`, of each tensor by its count: `beta`, the share of the second
        moment that is kept; `most`, the largest relative step; no slots.
    """
    return {"beta": 1 - t**beta_2_decay, "most": t**-0.5}, {}


def adafactor_rule(
    g,
    slots,
    *,
    beta,
    most,
    w,
    learning_rate,
    epsilon_1,
    epsilon_2,
    clip_threshold,
    is_relative,
    axes,
):
    """Returns Adafactor's change to one tensor, and its next second moment.

    Args:
        g: gradient, of any shape `S`.
        slots: `r` and `c`, see `factored_moment`; or `v`, of shape `S`,
            where nothing is factored.
        beta, most: scalars, see `adafactor_schedule`.
        w: the weight, of shape `S`.
        learning_rate: scalar, the largest relative step: the share of its root
            mean square that the weight moves.
        epsilon_1: in the units of `g**2`.
        epsilon_2: in the weight's units: the least that counts as its size.
        clip_threshold: largest root mean square of the step before scaling.
        is_relative: whether the relative step falls as `1 / sqrt(t)`.
        axes: the two axes that are factored, or None.

    Returns:
        `(delta, slots)`: what to add to the weight, and the next slots.
    """
    rho = ops.minimum(learning_rate, most) if is_relative else learning_rate
    alpha = ops.maximum(epsilon_2, root_mean_square(w)) * rho
    q = ops.square(g) + epsilon_1
    if axes:
        (row_factor, column_factor), slots = factored_moment(q, slots, beta, axes)
        u = g * row_factor * column_factor
    else:
        v = beta * slots["v"] + (1 - beta) * q
        slots = {"v": v}
        u = g / ops.sqrt(v)
    u = u / ops.maximum(1 + 0 * alpha, root_mean_square(u) / clip_threshold)
    return -alpha * u, slots


def factored_axes(shape):
    """Returns the two largest axes, in order, or None if one of them has 1 element.

    Then the factors would be the second moment itself.
    """
    if len(shape) < 2 or 0 in shape:
        return None
    largest = sorted(range(len(shape)), key=lambda axis: (shape[axis], axis))[-2:]
    rows, columns = sorted(largest)
    if 1 in (shape[rows], shape[columns]):
        return None
    return rows, columns


class Adafactor(Optimizer):
    """Adafactor: a second moment kept as row and column means only.

    The variant is the paper's Algorithm 4 with its update clipping and its
    relative step; the two largest axes are factored. (Keras's keeps the whole
    second moment beside its factors, and takes the relative step whatever
    `relative_step` says; it factors the last two axes.)

    Keeps `(m + n) / (m * n)` values per parameter of an m x n matrix, 0.002 for
    1024 x 1024, and 1 for vectors. Takes `keras.optimizers.Adafactor`'s
    arguments, and converts the state it saved.

    When not to use it: when memory isn't a constraint; `AdamW` has a first moment and
    is easier to tune.

    Reference: Shazeer & Stern, 2018, https://arxiv.org/abs/1804.04235

    Args:
        learning_rate: float of at least 0, schedule or callable: the largest
            share of its own root mean square that a tensor moves. Keras's
            default is 0.001, the paper's 0.01.
        beta_2_decay: float below 0; the second moment's decay rate is
            `1 - t**beta_2_decay`.
        epsilon_1: float above 0, added to the squared gradient.
        epsilon_2: float above 0, the least root mean square of a weight.
        clip_threshold: float above 0, largest root mean square of a step.
        relative_step: bool, whether a learning rate that is a number is lowered
            to `1 / sqrt(t)` where that is less. A schedule is taken as it is, if
            it is there when the optimizer is built.

    Example:

    >>> import keras, tf_effopt
    >>> w = keras.Variable([[3.0, 3.0], [3.0, 3.0]])
    >>> optimizer = tf_effopt.Adafactor(learning_rate=0.1)
    >>> optimizer.apply([keras.ops.ones((2, 2))], [w])
    >>> round(float(w.numpy()[0, 0]), 4)  # moved by 0.1 of its size
    2.7
    """

    model_rule = ModelRule(adafactor_schedule, each_count=True)
    elementwise = False
    beta_2_decay: hp.FloatOrSchedule = hp.Negative(default=-0.8)
    epsilon_1: hp.FloatOrSchedule = hp.Positive(default=1e-30)
    epsilon_2: hp.FloatOrSchedule = hp.Positive(default=1e-3)
    clip_threshold: hp.FloatOrSchedule = hp.Positive(default=1.0)
    relative_step: bool = hp.Switch(default=True)
    convert_keras_slots = adafactor_slots

    def part(self, path, shape):
        is_number = isinstance(self._learning_rate, keras.Variable)
        axes = factored_axes(shape)
        settings = {"is_relative": self.relative_step and is_number, "axes": axes}
        if axes is None:
            return Part(adafactor_rule, Slots(v="velocity"), settings, name="vector")
        rows, columns = axes
        slots = Slots(
            r=Slot("row", lambda shape: _without(shape, columns)),
            c=Slot("column", lambda shape: _without(shape, rows)),
        )
        return Part(adafactor_rule, slots, settings, name="factored")


def _without(shape, axis):
    return shape[:axis] + shape[axis + 1 :]
