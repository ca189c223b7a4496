"""Dynamic loss scaling that looks at the gradients of all replicas."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from tf_effopt import engine
from tf_effopt.base import Optimizer


@keras.saving.register_keras_serializable("tf_effopt")
class LossScaleOptimizer(keras.optimizers.LossScaleOptimizer):
    """Multiplies the loss so that float16 gradients don't underflow.

    As `keras.optimizers.LossScaleOptimizer`, whose arguments it takes and
    whose state it loads; but the gradient is checked on all replicas and
    workers. (Keras's looks at the first replica only: an infinity on another
    one reaches the weights; the scale isn't lowered; several workers hang.)
    A step whose gradient isn't finite anywhere changes no weight and no count,
    and halves the scale.

    With the dtype policy `mixed_float16`, `compile` puts Keras's own around an
    optimizer that isn't wrapped yet; wrap it in this one instead:

    >>> import keras, tf_effopt
    >>> optimizer = tf_effopt.LossScaleOptimizer(tf_effopt.Adam(1e-3))
    >>> float(optimizer.scale_loss(1.0))
    32768.0

    Keeps 2 values in all.

    Reference: Micikevicius et al., "Mixed Precision Training", 2018,
    https://arxiv.org/abs/1710.03740

    Args:
        inner_optimizer: the optimizer to wrap.
        initial_scale: float above 0, the first scale.
        dynamic_growth_steps: int, finite steps after which the scale doubles.
        name: string, the optimizer's name.
        **kwargs: as Keras's.
    """

    def apply(self, grads: list[Any], trainable_variables: Any = None) -> None:
        """Updates variables by the gradients of the scaled loss."""
        if not isinstance(self.inner_optimizer, Optimizer):
            return super().apply(grads, trainable_variables)
        if not self.built:
            self.build(list(trainable_variables))
        variables = trainable_variables or self._trainable_variables
        unscaled = [
            g
            if g is None or self._overwrite_variable_with_gradient(v)
            else ops.divide(g, self.dynamic_scale)
            for g, v in zip(grads, variables, strict=True)
        ]
        # The inner optimizer checks the gradient it has reduced anyway.
        finite = self.inner_optimizer.apply_and_check(unscaled, variables)
        steps = self.step_counter + 1
        grows = ops.equal(steps, self.dynamic_growth_steps)
        factor = ops.where(finite, ops.where(grows, 2.0, 1.0), 0.5)
        counter = ops.where(ops.logical_or(grows, ops.logical_not(finite)), 0, steps)
        assign = self.inner_optimizer._engine.assign_alike
        assign(self.dynamic_scale, self.dynamic_scale * factor)
        assign(self.step_counter, ops.cast(counter, self.step_counter.dtype))

    def check_finite(self, grads: list[Any]) -> Any:
        """Whether the gradients are finite on every replica."""
        finite = super().check_finite(grads)
        if not hasattr(self, "_engine"):
            self._engine = engine.create(self)
        return self._engine.finite_everywhere(finite)
