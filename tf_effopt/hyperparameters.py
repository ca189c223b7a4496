"""Hyperparameters: checked when they are set, changeable while training.

A class declares its hyperparameters, with their defaults:

    class Clip(Stage):
        factor: float = Positive(default=0.01)
        exclude: list = Patterns(default=())

They become the arguments of its constructor. Each assignment, then and later, is
checked here, and reaches the compiled update without compiling it again. A kind's
`default=` may be left out in a class that defines a custom `__init__`.
"""

from __future__ import annotations

import functools
import math
import numbers
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import keras
import numpy as np
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule

from tf_effopt.paths import is_variable

# At which a schedule is looked at when it is set.
SAMPLED_STEPS = (0, *(10**k for k in range(7)))
TINY = float(np.finfo("float32").tiny)
HUGE = float(np.finfo("float32").max)


class Schedule(Protocol):
    """Keras's `LearningRateSchedule`, for type checkers: Keras itself isn't typed."""

    def __call__(self, step: Any) -> Any: ...

    def get_config(self) -> dict[str, Any]: ...


# What a number that may change while training is given as.
FloatOrSchedule = float | Schedule
RateOrSchedule = FloatOrSchedule | Callable[[], Any]


class _Required:
    """That a hyperparameter was declared without a default."""

    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED = _Required()


class Hyperparameter:
    """A named setting of an optimizer; the base of the kinds below.

    Args:
        default: what a generated constructor sets it to if nothing is passed.
        kw_only: whether that takes it by name only.
    """

    expected = "anything"
    default: Any = REQUIRED
    kw_only = False

    if TYPE_CHECKING:  # The attribute is what is set, and not its kind.

        def __new__(cls, *args: Any, **kwargs: Any) -> Any: ...

    def __init__(self, *, default: Any = REQUIRED, kw_only: bool = False):
        self.default = default
        self.kw_only = kw_only

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, optimizer: Any, owner: type | None = None) -> Any:
        if optimizer is None:
            return self
        try:
            return optimizer.__dict__["_hyperparameters"][self.name]
        except KeyError:
            # `AutoTrackable` reads an attribute before its first assignment.
            raise AttributeError(
                f"'{type(optimizer).__name__}' object has no attribute '{self.name}'"
            ) from None

    def __set__(self, optimizer: Any, value: Any) -> None:
        value = self.check(value)
        values = optimizer.__dict__.setdefault("_hyperparameters", {})
        if optimizer.__dict__.get("built") and self.name in values:
            if self.structure(value) != self.structure(values[self.name]):
                raise ValueError(
                    f"`{self.name}` can't change from "
                    f"{values[self.name]!r} to {value!r} after the optimizer "
                    "was built: it decides which state and which operations "
                    f"the compiled update has. {self.advice(optimizer)}"
                )
            optimizer._engine.set_hyperparameter(optimizer, self.name, value)
        values[self.name] = value

    def advice(self, optimizer: Any) -> str:
        """What to do where a change comes too late."""
        if hasattr(optimizer, "advice_on_change"):
            return optimizer.advice_on_change()
        return (
            f"`optimizer.carry_over(variables, {self.name}=...)` makes an optimizer "
            "with another one, and keeps the state of what it trains as before."
        )

    def check(self, value: Any) -> Any:
        """Returns `value` as it is to be kept, or raises `ValueError`."""
        raise NotImplementedError

    def structure(self, value: Any) -> Any:
        """What of `value` is fixed once the optimizer is built."""
        raise NotImplementedError

    def error(self, value: Any) -> ValueError:
        return ValueError(
            f"`{self.name}` must be {self.expected}. Received: {self.name}={value!r}"
        )


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
        from tf_effopt.engine import outside_of_graphs  # which imports this

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


class Integer(Hyperparameter):
    """A whole number, fixed once the optimizer is built.

    Args:
        low: the smallest allowed.
    """

    def __init__(self, low: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.low = low

    @property
    def expected(self) -> str:
        return f"an integer of at least {self.low}"

    def check(self, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise self.error(value)
        if value < self.low:
            raise self.error(value)
        return int(value)

    def structure(self, value: int) -> int:
        return value


class Switch(Hyperparameter):
    """True or False, fixed once the optimizer is built."""

    expected = "True or False"

    def check(self, value: Any) -> bool:
        if not isinstance(value, bool | np.bool_):
            raise self.error(value)
        return bool(value)

    def structure(self, value: bool) -> bool:
        return value


class Choice(Hyperparameter):
    """One of several strings, fixed once the optimizer is built."""

    def __init__(self, *choices: str, **kwargs: Any):
        super().__init__(**kwargs)
        self.choices = choices

    @property
    def expected(self) -> str:
        return "one of " + ", ".join(repr(choice) for choice in self.choices)

    def check(self, value: Any) -> str:
        if not isinstance(value, str) or value not in self.choices:
            raise self.error(value)
        return value

    def structure(self, value: str) -> str:
        return value


class Patterns(Hyperparameter):
    """A list of regular expressions, fixed once the optimizer is built.

    Args:
        optional: whether `None` is allowed, for none.
    """

    def __init__(self, optional: bool = False, **kwargs: Any):
        super().__init__(**kwargs)
        self.optional = optional

    @property
    def expected(self) -> str:
        return "a list of regular expressions" + (" or None" if self.optional else "")

    def check(self, value: Any) -> list[str]:
        if value is None and self.optional:
            return []
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise self.error(value)
        for pattern in value:
            try:
                re.compile(pattern)
            except (TypeError, re.error):
                raise self.error(value) from None
        return list(value)

    def structure(self, value: list[str]) -> list[str]:
        return value


class Objects(Hyperparameter):
    """Stages or groups, as a tuple; only a constructor sets them."""

    def __get__(self, optimizer: Any, owner: type | None = None) -> Any:
        return self if optimizer is None else optimizer.__dict__[f"_{self.name}"]

    def __set__(self, optimizer: Any, value: Any) -> None:
        raise AttributeError(
            f"`{self.name}` can't be set after the optimizer was made: pass it to the "
            f"constructor, or go on with `optimizer.carry_over(variables, {self.name}="
            "[...])`, which keeps the state."
        )

    def check(self, value: Any) -> Any:
        """The value; constructors check it."""
        return value


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


class EachCount:
    """Several counts of updates: powers of a `Decay` are made of all at once.

    Attributes:
        vector: the counts.
        scalars: the same, one by one.
    """

    def __init__(self, vector: Any):
        self.vector = vector
        self._places: dict[int, int] = {}

    @functools.cached_property
    def scalars(self) -> list[Any]:
        scalars = ops.unstack(self.vector)
        self._places = {id(t): i for i, t in enumerate(scalars)}
        return scalars

    def place(self, t: Any) -> int | None:
        """Which of the counts `t` is, None for another tensor."""
        return self._places.get(id(t))


class Decay:
    """A decay rate inside a rule: a number beta with an exact `1 - beta`.

    In float32, 0.999 is off by so much that `1 - 0.999` is wrong by 1.3e-5
    of itself. This keeps both numbers, each rounded once from float64.

    Example:

    >>> import keras
    >>> beta = Decay(keras.ops.convert_to_tensor(0.999),
    ...              keras.ops.convert_to_tensor(0.001))
    >>> round(float(1 - beta**2), 9)
    0.001999
    """

    def __init__(self, value: Any, complement: Any, each: EachCount | None = None):
        self.value = value
        self.complement = complement
        self._power: tuple[Any, Decay] | None = None
        self._each = each
        self._powers: list[Decay] | None = None

    def unused(self) -> Decay:
        """The same number, without the powers that were made of it."""
        return Decay(self.value, self.complement, self._each)

    def __mul__(self, other: Any) -> Any:
        return self.value * other

    __rmul__ = __mul__

    def __rsub__(self, one: Any) -> Any:
        if one != 1:
            raise TypeError(f"Only `1 - beta` is defined. Received: {one!r} - beta")
        return self.complement

    def __pow__(self, t: Any) -> Decay:
        place = None if self._each is None else self._each.place(t)
        if place is not None:
            if self._powers is None:
                power = Decay(self.value, self.complement) ** self._each.vector
                pairs = zip(ops.unstack(power.value), ops.unstack(power.complement))
                self._powers = [Decay(*pair) for pair in pairs]
            return self._powers[place]
        if self._power is None or self._power[0] is not t:
            exponent = t * ops.log1p(-self.complement)
            self._power = t, Decay(ops.exp(exponent), -ops.expm1(exponent))
        return self._power[1]
