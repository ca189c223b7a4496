"""What every kind of hyperparameter has; types of what is passed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol


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
