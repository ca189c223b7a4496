"""Settings that are no numbers, fixed once the optimizer is built."""

from __future__ import annotations

import numbers
import re
from typing import Any

import numpy as np

from tf_effopt.hyperparameters.base import Hyperparameter


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
