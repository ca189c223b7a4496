"""Other weights than those that are trained: averages, and those for evaluation."""

from __future__ import annotations

import warnings
from typing import Any

import keras

from tf_effopt.base import summary
from tf_effopt.engine.plan import EVALUATING, OPTIMIZER
from tf_effopt.runtime import keras_hooks


class Evaluating(keras.optimizers.Optimizer):
    """The part of `Optimizer` that puts other weights in place."""

    def finalize_variable_values(self, var_list: list[Any]) -> None:
        """Ends training: averages take the place of the weights.

        `fit` calls it after its last epoch.

        Args:
            var_list: the model's trainable variables; others stay as they are.
        """
        if not keras_hooks.has_value(self._iterations):
            return  # JAX's `fit` took the values, and ends by an error of the step.
        # Weights for evaluation are an average already.
        if self.use_ema and self._has_updated() and self.evaluation is None:
            indices = [
                self._trainable_variables_indices[self._var_key(v)]
                for v in var_list
                if self._var_key(v) in self._trainable_variables_indices
            ]
            self._engine.overwrite_with_averages(indices)
        if self.evaluation is not None and self.built and not self.is_evaluating:
            self.use_evaluation_weights()
            warnings.warn(
                f"{self.name}: the weights for evaluation are in place now; during "
                "`fit` they weren't, also not for its validation and checkpoints. "
                "Pass `callbacks=[tf_effopt.callbacks.EvaluationWeights()]` to `fit`.",
                stacklevel=2,
            )
        skipped = self.skipped_steps or 0
        if skipped > self._skipped_before:
            names = summary.not_finite(self)
            advice = (
                "If it isn't for loss scaling that finds its scale, look for a "
                "division by zero or a too high learning rate."
            )
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                advice = (
                    "These variables aren't finite, so that no later step can be: "
                    f"{', '.join(names[:5])}{more}. Start again from a checkpoint."
                )
            warnings.warn(
                f"{self.name}: {skipped - self._skipped_before} steps changed "
                "nothing: the norm of their gradient, or their learning rate, wasn't "
                f"finite. {advice}",
                stacklevel=2,
            )
        self._skipped_before = skipped

    def use_evaluation_weights(self) -> None:
        """Puts in place the weights at which to evaluate and use the model.

        For optimizers such as `ScheduleFreeAdamW`, which train at others; for
        the rest nothing happens. In `fit`, `callbacks.EvaluationWeights` calls it.
        """
        self._switch(to_evaluation=True)

    def use_training_weights(self) -> None:
        """Puts back the weights at which to train; see `use_evaluation_weights`."""
        self._switch(to_evaluation=False)

    @property
    def is_evaluating(self) -> bool:
        """Whether the weights in place are those for evaluation."""
        if self.evaluation is None or not self.built:
            return False
        mark = self._engine.model_state[OPTIMIZER][EVALUATING]
        return bool(float(keras.ops.convert_to_numpy(mark)) > 0)

    def _switch(self, to_evaluation: bool) -> None:
        if self.evaluation is None:
            return
        if not self.built:
            if self._state_to_load is not None:
                raise ValueError(
                    f"{self.name}: which weights are in place is part of the state that "
                    "was loaded and waits for `build`: call "
                    "`optimizer.build(model.trainable_variables)` first."
                )
            return
        if self._has_updated() and self.is_evaluating != to_evaluation:
            self._engine.switch(to_evaluation)

    def _has_updated(self) -> bool:
        """Whether at least one update was applied."""
        micro_steps = int(keras.ops.convert_to_numpy(self._iterations))
        return self.built and micro_steps >= (self.gradient_accumulation_steps or 1)
