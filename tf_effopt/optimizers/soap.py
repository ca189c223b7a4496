"""SOAP, from Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam",
2024.

https://arxiv.org/abs/2409.11321
"""

import functools

import keras
from keras import ops

from tf_effopt.base import ModelRule, Optimizer, Part, Slot, Slots, hp
from tf_effopt.engine.linalg import (
    gram,
    left_singular_vectors,
    orthonormal,
    power_iteration,
    rotated,
    squares,
    together,
    unfolded,
)


def soap_correction(sums, slots, *, t, beta_1, beta_2):
    """Returns Adam's correction: the first update only makes the bases.

    Args:
        t: scalar or vector, the numbers of updates, from 1; Adam counts from the
            second.
        beta_1, beta_2: share of the moments kept per update, in [0, 1).

    Returns:
        `(numbers, slots)`, of each tensor by its count: `moves`, 1, but 0 at the first
        update; `correction`; no slots.
    """
    n = ops.maximum(t - 1, 1 + 0 * t)
    correction = ops.sqrt(1 - beta_2**n) / (1 - beta_1**n)
    return {"moves": ops.where(t > 1, 1 + 0 * t, 0 * t), "correction": correction}, {}


def soap_rule(
    g,
    slots,
    *,
    moves,
    correction,
    w,
    learning_rate,
    beta_1,
    beta_2,
    shampoo_beta,
    epsilon,
    weight_decay,
    axes,
):
    """Returns SOAP's change to one tensor, and its next slots.

    Args:
        g: gradient, of any shape `S`.
        slots: `m`, of shape `S`, the decayed mean of `g`; `v`, of shape `S`, that
            of the square of `g` in terms of the bases; for each k of `axes`:
            `Lk`, the decayed mean of the products of `g`'s slices along the axis,
            and `Qk`, a basis of it, near the eigenvectors of `Lk`.
        moves, correction: scalars, see `soap_correction`.
        w: the weight, of shape `S`.
        learning_rate: scalar, in the weight's units: about the most a
            coordinate, in terms of the bases, moves in one update.
        beta_1, beta_2: share of `m` and of `v` kept per update, in [0, 1).
        shampoo_beta: that of `Lk`; None for `beta_2`.
        epsilon: above 0, in the units of `g`.
        weight_decay: scalar, times the learning rate, of the weight after its step.
        axes: those that have a basis.

    Returns:
        `(delta, slots)`: what to add to the weight, and the next slots.
    """
    beta = beta_2 if shampoo_beta is None else shampoo_beta
    Q = [slots[f"Q{k}"] if k in axes else None for k in range(len(g.shape))]
    m = beta_1 * slots["m"] + (1 - beta_1) * moves * g
    v = beta_2 * slots["v"] + (1 - beta_2) * squares(rotated(moves * g, Q), axes)
    eta = learning_rate * correction
    step = -eta * rotated(rotated(m, Q) / (ops.sqrt(v) + epsilon), Q, back=True)
    delta = step - moves * learning_rate * weight_decay * (w + step)
    new_slots = {"m": m, "v": v}
    for k in axes:
        new_slots[f"L{k}"] = beta * slots[f"L{k}"] + (1 - beta) * gram(unfolded(g, k))
        new_slots[f"Q{k}"] = Q[k]
    return delta, new_slots


def soap_upkeep(gs, slots, *, t, counts, precondition_frequency):
    """Returns all tensors' next slots, with bases that follow the statistics.

    Args:
        gs: for each tensor its gradient.
        slots: for each tensor a dict, see `soap_rule`, after its rule.
        t: scalar, the number of this update of the model, from 1: all bases are
            renewed at the same updates.
        counts: for each tensor the number of its update, from 1. The first one
            makes its bases, of its gradient.
        precondition_frequency: after so many updates the bases take one step
            of power iteration; None for never.
    """
    axes = [
        (i, k)
        for i, g in enumerate(gs)
        for k in range(len(g.shape))
        if f"Q{k}" in slots[i]
    ]
    if not axes:
        return slots
    L = [slots[i][f"L{k}"] for i, k in axes]
    Q = [slots[i][f"Q{k}"] for i, k in axes]
    v = [s["v"] for s in slots]
    counts = ops.stack(counts)
    starts = ops.any(counts < 2)

    def first():
        return left_singular_vectors([unfolded(gs[i], k) for i, k in axes]), v

    def renewed():
        columns, moved = [], list(v)
        for (i, k), (image, order) in zip(
            axes, together(power_iteration, L, Q), strict=True
        ):
            columns.append(image)
            moved[i] = ops.take(moved[i], order, axis=k)
        return columns, moved

    def changed():
        columns, moved = ops.cond(starts, first, renewed)
        bases = together(orthonormal, columns)
        # Where some tensors start, the others' bases wait for the next renewal.
        changes = ops.logical_or(ops.logical_not(starts), counts < 2)
        return [
            ops.where(changes[i], basis, old)
            for (i, k), basis, old in zip(axes, bases, Q, strict=True)
        ], moved

    is_due = starts
    if precondition_frequency is not None:
        is_due = is_due | ((t - 1) % precondition_frequency == 0)
    bases, moved = ops.cond(is_due, changed, lambda: (Q, v))
    after = [s | {"v": x} for s, x in zip(slots, moved, strict=True)]
    for (i, k), basis in zip(axes, bases, strict=True):
        after[i][f"Q{k}"] = basis
    return after


class SOAP(Optimizer):
    """SOAP: Adam in the eigenbases of Shampoo's statistics.

    Each axis of a tensor has a basis, near the eigenvectors of a decayed mean of
    `g @ g.T`; Adam runs in terms of these bases, which accounts for correlated
    gradient elements. The variant is the authors' code, which goes
    beyond the paper: the first update makes the bases and leaves the weights; a
    gradient enters the statistics after its step; the decay is times the
    learning rate, of the weight after its step; `epsilon` is added to `sqrt(v)`
    before the bias correction. Vectors take Adam's step. (Theirs also scales up
    what rounding alone puts where there is no gradient.)

    Keeps 6 values per parameter of a square matrix, `2 + 2 * (m / n + n / m)` of
    an m x n one, 2 of a vector.

    When not to use it: with small batches, whose gradients say little about
    correlations; or where time counts more than updates. One update of
    an n x n matrix takes `16 * n**3` multiplications and additions, and the first
    solves an eigenproblem, slowly in XLA: on 2 CPU cores 15 ms for 128 x 128,
    1 to 2 s for 512 x 512, over 10 s for 768 x 768. Lower
    `max_precondition_dim` then. In float32, eigenvectors for eigenvalues below
    some 1e-4 of the largest are rounding's choice, and steps along them too: two
    runs that add in another order (1 device or 2) drift apart there.

    The first update of a tensor makes its bases, even if it gets its first gradient
    later than others.

    Reference: Vyas et al., 2024, https://arxiv.org/abs/2409.11321; authors'
    code: https://github.com/nikhilvyas/SOAP

    Args:
        learning_rate: float of at least 0, schedule or callable; about the
            most that a coordinate, in terms of the bases, moves in one update.
        beta_1: float in [0, 1), share of the first moment kept per update.
        beta_2: float in [0, 1), share of the second moment kept per update.
        shampoo_beta: None, for `beta_2`, or float in [0, 1), share of the
            statistics kept per update.
        epsilon: float above 0.
        weight_decay: float of at least 0, share of the weight that one update
            at learning rate 1 takes away.
        precondition_frequency: int of at least 1: after so many updates the
            bases take one step of power iteration towards the statistics'
            eigenvectors; None to keep the first ones.
        max_precondition_dim: int of at least 1, the largest axis that has a
            basis: longer ones, usually of an embedding, are left as they are.

    Example:

    >>> import keras, tf_effopt
    >>> w = keras.Variable([[1.0, 1.0], [1.0, 1.0]])
    >>> optimizer = tf_effopt.SOAP(learning_rate=0.1, weight_decay=0.0)
    >>> for _ in range(2):  # the first update only makes the bases
    ...     optimizer.apply([keras.ops.convert_to_tensor([[3.0, 3.0], [3.0, 3.0]])], [w])
    >>> round(float(w.numpy()[0, 0]), 2)  # one learning rate, shared by all four
    0.95
    """

    upkeep = staticmethod(soap_upkeep)
    model_rule = ModelRule(soap_correction, each_count=True)
    elementwise = False
    learning_rate: hp.RateOrSchedule = hp.LearningRate(default=0.003)
    beta_1: hp.FloatOrSchedule = hp.DecayRate(default=0.95)
    beta_2: hp.FloatOrSchedule = hp.DecayRate(default=0.95)
    shampoo_beta: hp.FloatOrSchedule | None = hp.DecayRate(optional=True, default=None)
    epsilon: hp.FloatOrSchedule = hp.Positive(default=1e-8)
    weight_decay: hp.FloatOrSchedule = hp.NonNegative(default=0.01)
    precondition_frequency: int | None = hp.Count(low=1, default=10)
    max_precondition_dim: int = hp.Integer(low=1, default=10000)

    def part(self, path, shape):
        axes = tuple(
            k
            for k, n in enumerate(shape)
            if len(shape) > 1 and 0 not in shape and n <= self.max_precondition_dim
        )
        return part_of(axes)


@functools.cache  # One object for all tensors with the same axes.
def part_of(axes):
    slots = Slots(m="momentum", v="velocity")
    for k in axes:
        slots[f"L{k}"] = Slot(f"statistics_{k}", lambda shape, k=k: (shape[k],) * 2)
        slots[f"Q{k}"] = Slot(
            f"basis_{k}",
            lambda shape, k=k: (shape[k],) * 2,
            start=keras.initializers.Identity(),
        )
    return Part(soap_rule, slots, {"axes": axes}, name="soap" if axes else "adam")
