"""Numbers in a range, which may change while training or be given as a schedule."""

from __future__ import annotations

import math
import numbers
import warnings
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule

from tf_effopt.state.variables import is_variable

# At which a schedule is looked at when it is set.
SAMPLED_STEPS = (0, *(10**k for k in range(7)))
TINY = float(np.finfo("float32").tiny)
HUGE = float(np.finfo("float32").max)

from tf_effopt.hyperparameters.base import Hyperparameter
from tf_effopt.hyperparameters.decay import Decay


class Number(Hyperparameter):
    """A real number in a range. It may change while training.

    Args:
        low, high: the range; `None` is no bound.
        open_low, open_high: whether the bound itself is excluded.
        optional: whether `None` is allowed and means "off".
        zero_is_off: whether 0, too, means "off": there, the optimizer keeps
            no state and runs no operation for this setting.
        fixed: whether it can't change once the optimizer is built.
        **kwargs: `default` and `kw_only`, as of each `Hyperparameter`.

    A number that may change may also be given as a schedule, a
    `keras.optimizers.schedules.LearningRateSchedule`. It counts as that of a learning
    rate; its values are limited to the range.
    """

    low: float | None = None
    high: float | None = None
    open_low = False
    open_high = False

    def __init__(
        self,
        optional: bool = False,
        zero_is_off: bool = False,
        fixed: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.optional = optional
        self.zero_is_off = zero_is_off
        self.fixed = fixed

    @property
    def expected(self) -> str:
        low, high = self.low, self.high
        if low is None:
            text = "a finite number" if high is None else f"a number below {high}"
        elif high is None:
            text = f"a number {'above' if self.open_low else 'of at least'} {low}"
        else:
            text = (
                f"in {'(' if self.open_low else '['}{low}, "
                f"{high}{')' if self.open_high else ']'}"
            )
        return text + (" or None" if self.optional else "")

    def check(self, value: Any) -> Any:
        if value is None and self.optional:
            return None
        if (schedule := _as_schedule(value)) is not None:
            return self.checked_schedule(schedule)
        if is_variable(value):
            raise ValueError(
                f"`{self.name}` must be {self.expected}, and not a variable, of which "
                "only the value now would be used. Pass `float(variable)`, and assign "
                f"the attribute `{self.name}` when it is to change. "
                f"Received: {self.name}={value!r}"
            )
        number = _as_float(value)
        if number is None:
            raise self.error(value)
        inside = math.isfinite(number)
        if self.low is not None:
            inside &= number > self.low or (number == self.low and not self.open_low)
        if self.high is not None:
            inside &= number < self.high or (number == self.high and not self.open_high)
        if not inside:
            raise self.error(value)
        if number and not TINY <= abs(number) <= HUGE:
            raise ValueError(
                f"`{self.name}` must be 0 or between {TINY:.3g} and {HUGE:.3g} in "
                "size: the update computes in float32, where it would be 0 or "
                f"infinite. Received: {self.name}={value!r}"
            )
        return number

    def checked_schedule(self, schedule: LearningRateSchedule) -> LearningRateSchedule:
        """The schedule; warns if a value of it is out of the range.

        Raises:
            ValueError: the number can't change while training.
        """
        if self.fixed:
            raise ValueError(
                f"`{self.name}` can't be given by a schedule: it is fixed once the "
                "optimizer is built. Pass a number. "
                f"Received: {self.name}={type(schedule).__name__}(...)"
            )
        from tf_effopt.state.tensors import outside_of_graphs

        with outside_of_graphs():
            for step in SAMPLED_STEPS:
                value = float(ops.convert_to_numpy(schedule(step)))
                within = float(ops.convert_to_numpy(self.limited(value)))
                if not math.isclose(value, within, rel_tol=1e-6):
                    warnings.warn(
                        f"`{self.name}` must be {self.expected}, and its schedule is "
                        f"{value:g} at step {step}: such values are limited to the "
                        f"range, there to {within:g}.",
                        stacklevel=6,
                    )
                    break
        return schedule

    def at(self, schedule: LearningRateSchedule, step: Any) -> Any:
        """The value of a schedule at a step, within the range."""
        return self.limited(schedule(step))

    def limited(self, value: Any) -> Any:
        """A scalar tensor within the range."""
        value = ops.convert_to_tensor(value)
        dtype = keras.backend.standardize_dtype(value.dtype)
        if "float" not in dtype:
            value = ops.cast(value, dtype := keras.backend.floatx())
        low, high = self.low, self.high
        if low is not None:
            # 0 would switch the stage off, which the compiled update has.
            is_open = self.open_low or (self.zero_is_off and low == 0)
            value = ops.maximum(value, max(low, TINY) if is_open else low)
        if high is not None:
            last = np.nextafter(np.float32(high), np.float32(-np.inf))
            value = ops.minimum(value, float(last) if self.open_high else high)
        return value

    def structure(self, value: Any) -> Any:
        if isinstance(value, LearningRateSchedule):
            return value
        if not self.fixed:
            return self.is_off(value)
        return None if self.is_off(value) else value

    def is_off(self, value: float | None) -> bool:
        return value is None or (self.zero_is_off and value == 0)

    def as_rule_argument(self, value: Any, complement: Any) -> Any:
        """What a rule receives: a scalar tensor.

        Args:
            value, complement: scalar tensors, the number and 1 minus it.
        """
        return value


def _as_float(value: Any) -> float | None:
    """A real number as a float; None for what isn't one, or isn't known yet."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, NotImplementedError):
        return None  # A tensor of a graph.
    if array.shape != () or array.dtype.kind not in "fiu":
        # Numbers of Python that NumPy doesn't know, such as fractions.
        known = isinstance(value, numbers.Real) and array.dtype.kind == "O"
        if not known:
            return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _as_schedule(value: Any) -> LearningRateSchedule | None:
    """A schedule, also as `get_config` returns it; None for anything else."""
    if isinstance(value, dict) and "class_name" in value:
        value = keras.optimizers.schedules.deserialize(value)
    return value if isinstance(value, LearningRateSchedule) else None


class Real(Number):
    """Any number that is finite."""


class Positive(Number):
    """Above 0."""

    low, open_low = 0, True


class NonNegative(Number):
    """0 or above."""

    low = 0


class Negative(Number):
    """Below 0."""

    high, open_high = 0, True


class Fraction(Number):
    """In [0, 1]."""

    low, high = 0, 1


class DecayRate(Number):
    """The share of an average that one update keeps, in [0, 1).

    A rule receives a `Decay`, in which `1 - beta` and `1 - beta**t` are right
    to rounding.

    Args:
        allow_one: whether 1, an average that never moves, is allowed.
        allow_zero: whether 0, an average that keeps nothing, is allowed.
        optional: whether `None` is allowed; its meaning is up to the class.
    """

    low, high, open_high = 0, 1, True

    def __init__(
        self,
        allow_one: bool = False,
        allow_zero: bool = True,
        optional: bool = False,
        **kwargs: Any,
    ):
        super().__init__(optional, **kwargs)
        self.open_high = not allow_one
        self.open_low = not allow_zero

    def as_rule_argument(self, value: Any, complement: Any) -> Decay:
        return Decay(value, complement)


class Count(Number):
    """A whole number, or None; 0, too, means "off".

    Args:
        low: the smallest allowed besides 0, at least 1.
        fixed: whether it can't change once the optimizer is built.
    """

    def __init__(self, low: int, fixed: bool = False, **kwargs: Any):
        super().__init__(True, zero_is_off=True, fixed=fixed, **kwargs)
        self.low = low

    @property
    def expected(self) -> str:
        if self.low == 1:
            return "an integer of at least 0 or None"
        return f"an integer of at least {self.low}, 0 or None"

    def check(self, value: Any) -> Any:
        if value is None:
            return None
        if (schedule := _as_schedule(value)) is not None:
            return self.checked_schedule(schedule)
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise self.error(value)
        if value != 0 and value < self.low:
            raise self.error(value)
        return int(value)
