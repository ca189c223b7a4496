"""The learning rate, which Keras keeps."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule

from tf_effopt.hyperparameters.base import Hyperparameter
from tf_effopt.hyperparameters.numbers import NonNegative
from tf_effopt.state.variables import is_variable


class LearningRate(Hyperparameter):
    """The learning rate: Keras's, which is a variable, a schedule or a callable."""

    def __get__(self, optimizer: Any, owner: type | None = None) -> Any:
        return self if optimizer is None else optimizer._get_current_learning_rate()

    def __set__(self, optimizer: Any, value: Any) -> None:
        setter = keras.optimizers.Optimizer.learning_rate.fset
        setter(optimizer, self.check(value))

    def check(self, value: Any) -> Any:
        """A number as a float, checked; schedules and callables as they are."""
        if isinstance(value, LearningRateSchedule) or (
            callable(value) and not isinstance(value, type)
        ):
            return value
        if is_variable(value):
            raise ValueError(
                "`learning_rate` can't be a variable, of which only the value now would "
                "be used. To follow the variable, pass a callable: "
                "`learning_rate=lambda: variable`. For its value now, pass "
                "`float(variable)`; `optimizer.learning_rate = 0.1` changes it later. "
                f"Received: learning_rate={value!r}"
            )
        if ops.is_tensor(value):
            try:
                value = ops.convert_to_numpy(value)
            except Exception:  # noqa: BLE001  # Known only when its graph runs.
                return value
        number = NonNegative()
        number.__set_name__(keras.optimizers.Optimizer, "learning_rate")
        try:
            return number.check(value)
        except ValueError:
            raise ValueError(
                "`learning_rate` must be a number of at least 0, a "
                "`keras.optimizers.schedules.LearningRateSchedule`, or a callable "
                f"without arguments. Received: learning_rate={value!r}"
            ) from None
