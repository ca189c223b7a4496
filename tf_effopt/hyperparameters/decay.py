"""Decay rates as rules see them."""

from __future__ import annotations

import functools
from typing import Any

from keras import ops


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
