"""Work on matrices that each replica would do alike, divided among them."""

from __future__ import annotations

from typing import Any

from tf_effopt.communication.unbuilt import require_unbuilt


def divide_matrix_work(optimizer: Any) -> None:
    """Lets each replica work on its share of an optimizer's matrices.

    Under a strategy every replica has all gradients, and updates all weights. Where
    the update is much work, as in `Muon`, each can do a part of it: they then sum
    up what each has, which is one more all-reduce, of what a step changes in
    matrices and in their slots. The weights are those that they would be without.
    On one device nothing changes.

    It is part of the optimizer's configuration, and saved with it.

    When not to use it: where sums take longer than products. For GPT-2 small's
    matrices on 4 chips of TPU v5e the compiler's estimate falls from 19.3 to 16.7
    million cycles, before the time of the sum, which it doesn't tell
    (`recipes/benchmarks/results/tpu`). Measure it on your devices.

    Args:
        optimizer: of tf_effopt, or a `LossScaleOptimizer` around one, that isn't
            built yet.

    Raises:
        ValueError: the optimizer is built already, accumulates gradients (the
            work would be done on each of them), or isn't one of tf_effopt.

    Example:

    >>> import tensorflow as tf
    >>> import tf_effopt
    >>> with tf.distribute.MirroredStrategy(["cpu:0"]).scope():
    ...     optimizer = tf_effopt.Muon(1e-3)
    >>> tf_effopt.distribute.divide_matrix_work(optimizer)
    """
    inner = require_unbuilt(optimizer, "divide_matrix_work")
    if inner.gradient_accumulation_steps:
        raise ValueError(
            "`divide_matrix_work` can't be combined with gradient accumulation: no "
            "sum over replicas may depend on whether an update is due, so that the "
            "work would be done for each gradient. Received: "
            f"gradient_accumulation_steps={inner.gradient_accumulation_steps}"
        )
    inner._engine.communication.divides_matrices = True
