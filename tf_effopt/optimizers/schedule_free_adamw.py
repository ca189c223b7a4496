"""Schedule-Free AdamW, from Defazio et al., "The Road Less Scheduled", 2024.

https://arxiv.org/abs/2405.15682
"""

from keras import ops

from tf_effopt.base import Evaluation, ModelRule, Optimizer, Slot, Slots, hp
from tf_effopt.conversion.schedule_free import schedule_free_slots


def schedule_free_average(sums, slots, *, t, learning_rate, warmup_steps):
    """Returns the share `c` of `z` in the average `x`, and the warm-up's factor.

    Args:
        slots: scalars: `lr_max`, the largest learning rate so far; `weight_sum`,
            the sum of its squares over all updates.
        t: scalar, the number of this update, from 1.
        learning_rate: scalar.
        warmup_steps: None, or over how many updates the rate rises to its value.
    """
    warmup = 1 + 0 * t
    if warmup_steps is not None:
        warmup = ops.minimum(t / warmup_steps, warmup)
    lr_max = ops.maximum(slots["lr_max"], learning_rate * warmup)
    weight_sum = slots["weight_sum"] + ops.square(lr_max)
    c = ops.square(lr_max) / ops.where(weight_sum > 0, weight_sum, 1 + 0 * t)
    return {"c": c, "warmup": warmup}, {"lr_max": lr_max, "weight_sum": weight_sum}


def schedule_free_rule(
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
    c,
    warmup,
):
    """Returns the change to the weights `y` at which gradients are taken.

    Args:
        g: gradient at `y`, of any shape `S`.
        slots: tensors of shape `S`: `z`, the weights that plain steps make; `v`,
            the decayed mean of `g**2`.
        t: scalar, the number of this update, from 1.
        w: `y`, of shape `S`, which lies between `z` and the average `x`.
        learning_rate: scalar.
        beta_1: where `y` lies: this share of the way from `z` to `x`.
        beta_2: share of `v` kept per update, in [0, 1).
        epsilon: above 0, in the units of `g`.
        weight_decay: scalar, of `y`.
        c, warmup: scalars, see `schedule_free_average`.

    Returns:
        `(delta, slots)`: what to add to `y`, and the next slots.
    """
    eta, y, z = learning_rate * warmup, w, slots["z"]
    v = beta_2 * slots["v"] + (1 - beta_2) * ops.square(g)
    u = g / (ops.sqrt(v / (1 - beta_2**t)) + epsilon) + weight_decay * y
    delta = c * (z - y) + eta * (beta_1 * (1 - c) - 1) * u
    return delta, {"z": z - eta * u, "v": v}


def average(w, slots, *, beta_1):
    """Returns the average `x`, from `y = (1 - beta_1) * z + beta_1 * x`."""
    return w + (w - slots["z"]) * ((1 - beta_1) / (beta_1 * 1))


def interpolation(w, slots, *, beta_1):
    """Returns `y`, from the average `x`."""
    return w + (1 - beta_1) * (slots["z"] - w)


class Place(hp.DecayRate):
    """Where `y` lies between `z` and `x`: these stay as they are if it changes."""

    def __set__(self, optimizer, value):
        value = self.check(value)
        is_training = optimizer.__dict__.get("built") and not optimizer.is_evaluating
        if is_training:
            optimizer.use_evaluation_weights()
        super().__set__(optimizer, value)
        if is_training:
            optimizer.use_training_weights()

    def checked_schedule(self, schedule):
        raise ValueError(
            f"`{self.name}` can't be given by a schedule: it says where the weights of "
            "training lie between two others, which a change has to move. Assign "
            f"`optimizer.{self.name}` instead. Received: "
            f"{self.name}={type(schedule).__name__}(...)"
        )


class ScheduleFreeAdamW(Optimizer):
    """Schedule-Free AdamW: AdamW that needs no learning-rate schedule.

    Instead of lowering the learning rate it averages. Training is at `y`,
    between `z`, the weights of plain steps, and their average `x`; evaluate and
    use the model at `x`. One line does it in `fit`, for validation, prediction
    and checkpoints:

        model.fit(..., callbacks=[tf_effopt.callbacks.EvaluationWeights()])

    Without it, `x` is in place after `fit`, validation in `fit` was at `y`, and the
    first gradient of a second `fit` is taken at `x`.
    In a custom training loop call `optimizer.use_evaluation_weights()` and
    `optimizer.use_training_weights()`.

    The variant is the authors' code: averages weighted by the square of the
    largest learning rate so far, decay at `y`, bias-corrected `v`. (Keras's
    loses the weights in `fit`, and never evaluates at `x`.)

    Keeps 2 values per parameter, and 3 in all. Takes
    `keras.optimizers.ScheduleFreeAdamW`'s arguments, and converts the state it
    saved.

    Its averaging belongs to the whole model: a variable that joins later starts at its
    weight of then, with the model's count of updates and share of the average.

    When not to use it: with a learning-rate schedule, or with `use_ema`, whose average
    of `y` then takes the weights' place only by `ema_overwrite_frequency`. Statistics of
    `BatchNormalization` are those of `y`: run some batches at `x` in training
    mode before you evaluate.

    Reference: Defazio et al., 2024, https://arxiv.org/abs/2405.15682

    Args:
        learning_rate: float of at least 0; 1 to 10 times that of `AdamW`.
        beta_1: float in (0, 1), where between `z` and `x` gradients are taken.
        beta_2: float in [0, 1), share of the second moment kept per update.
        epsilon: float above 0.
        warmup_steps: int of at least 0, updates in which the learning rate
            rises from 0.
        **kwargs: what every optimizer takes; see `tf_effopt.Optimizer`. Here
            `weight_decay` is part of the rule.

    Example:

    >>> import keras, tf_effopt
    >>> w = keras.Variable([1.0])
    >>> optimizer = tf_effopt.ScheduleFreeAdamW(learning_rate=0.1, beta_1=0.5)
    >>> for _ in range(2):
    ...     optimizer.apply([keras.ops.convert_to_tensor([1.0])], [w])
    >>> round(float(w.numpy()[0]), 3)  # at y
    0.825
    >>> optimizer.use_evaluation_weights()
    >>> round(float(w.numpy()[0]), 3)  # x, the mean of z = 0.9 and 0.8
    0.85
    """

    rule = staticmethod(schedule_free_rule)
    slots = Slots(z=Slot("momentum", starts_at_weight=True), v="velocity")
    model_rule = ModelRule(
        schedule_free_average,
        slots={"lr_max": ("largest_rate", 0.0), "weight_sum": ("weight_sum", 0.0)},
    )
    evaluation = Evaluation(average, interpolation)
    learning_rate: hp.RateOrSchedule = hp.LearningRate(default=0.0025)
    beta_1: float = Place(allow_zero=False, default=0.9)
    beta_2: hp.FloatOrSchedule = hp.DecayRate(default=0.999)
    epsilon: hp.FloatOrSchedule = hp.Positive(default=1e-8)
    warmup_steps: int | None = hp.Count(low=1, default=0)
    convert_keras_slots = schedule_free_slots
