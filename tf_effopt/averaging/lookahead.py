"""Lookahead, from Zhang et al., "Lookahead Optimizer: k steps forward, 1 step back",
2019.

https://arxiv.org/abs/1907.08610
"""

from __future__ import annotations

from keras import ops

from tf_effopt.base.stage import Stage
from tf_effopt.hyperparameters import FloatOrSchedule, Fraction, Integer
from tf_effopt.rules import Slot, Slots


def lookahead(w, slots, *, t, period, step_size):
    """Returns the weight, moved to the slow one every `period` updates.

    Args:
        w: the fast weight, after this update.
        slots: `slow`, the slow weight.
        t: integer scalar, the number of this update, from 1.
        period: int, updates from one step of the slow weight to the next.
        step_size: scalar, the share of the way to the fast weight that it goes.
    """
    due = t % period == 0
    slow = slots["slow"]
    slow = ops.where(due, slow + step_size * (w - slow), slow)
    return ops.where(due, slow, w), {"slow": slow}


class Lookahead(Stage):
    """Every few updates, steps back on the line to where the last few started.

    The optimizer trains the weights as ever. After each `period` updates, slow weights
    go a share `step_size` of the way towards them, and the optimizer goes on from there.
    The variant is the paper's Algorithm 1; the optimizer's state is kept.

    Keeps 1 value per parameter.

    When not to use it: with a schedule that ends at a learning rate of 0, it changes
    little. Validate after a multiple of `period` updates: between them the weights in
    the model are the fast ones.

    Reference: Zhang et al., 2019, https://arxiv.org/abs/1907.08610

    Args:
        period: int of at least 1, updates, the paper's k. With accumulation, an update
            is one of all its micro-steps.
        step_size: float in [0, 1], the paper's alpha.

    Raises:
        ValueError: an argument is out of its range.

    Example:

    >>> import keras, tf_effopt
    >>> w = keras.Variable([0.0])
    >>> lookahead = tf_effopt.averaging.Lookahead(period=2, step_size=0.5)
    >>> optimizer = tf_effopt.SGD(1.0, averaging=lookahead)
    >>> for _ in range(2):
    ...     optimizer.apply([keras.ops.convert_to_tensor([1.0])], [w])
    >>> w.numpy().tolist()  # two steps to -2, and half the way back
    [-1.0]
    """

    where = "average"
    slots = Slots(slow=Slot("slow_weight", starts_at_weight=True))
    function = staticmethod(lookahead)
    elementwise = True
    period: int = Integer(default=6, low=1)
    step_size: FloatOrSchedule = Fraction(default=0.5)
