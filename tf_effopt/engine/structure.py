"""What makes two updates the same program: a key of everything that is fixed."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import weakref
from collections.abc import Hashable
from typing import Any

import numpy as np

from tf_effopt.hyperparameters import Hyperparameter

PACKAGES = ("tf_effopt", "keras")


def structure(x: Any) -> Hashable:
    """A key: two things with equal ones do the same in a compiled update.

    Plain values and dataclasses go by what they hold, Keras's own constraints by
    their configuration, everything else by identity. The key keeps nothing alive.
    """
    if isinstance(x, float):
        return float, x.hex()  # 0.0 and -0.0 are equal, and do different things.
    if x is None or isinstance(x, bool | int | str | bytes):
        return type(x), x
    if isinstance(x, dict):
        return dict, tuple((structure(k), structure(v)) for k, v in x.items())
    if isinstance(x, list | tuple):
        return type(x), tuple(map(structure, x))
    if isinstance(x, frozenset):
        return frozenset, frozenset(map(structure, x))
    if isinstance(x, np.ndarray):
        return np.ndarray, x.dtype.str, x.shape, x.tobytes()
    if isinstance(x, functools.partial):
        return functools.partial, structure((x.func, x.args, x.keywords))
    if inspect.ismethod(x):
        return _Identity(x.__self__), x.__func__.__qualname__
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return type(x), tuple(structure(value) for value in _fields(x))
    if _is_of_keras(x):
        return type(x), structure(x.get_config())
    return _Identity(x)


def is_own(x: Any) -> bool:
    """Whether `x` is made of plain values and what belongs to this package or Keras.

    What isn't may hold a user's model, and mustn't be kept alive.
    """
    if x is None or isinstance(x, bool | int | float | str | bytes | np.ndarray):
        return True
    if isinstance(x, dict):
        return all(is_own(k) and is_own(v) for k, v in x.items())
    if isinstance(x, list | tuple | frozenset):
        return all(map(is_own, x))
    if isinstance(x, functools.partial):
        return is_own((x.func, x.args, x.keywords))
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return all(map(is_own, _fields(x)))
    if inspect.isfunction(x):
        return _is_of(x.__module__, PACKAGES) and x.__closure__ is None
    return isinstance(x, Hyperparameter) or _is_of_keras(x)


def _fields(x: Any) -> list[Any]:
    return [getattr(x, field.name) for field in dataclasses.fields(x)]


def _is_of(module: str, packages: tuple[str, ...]) -> bool:
    return module.partition(".")[0] in packages


def _is_of_keras(x: Any) -> bool:
    """Whether `x` is an object of one of Keras's own classes, such as a constraint."""
    is_of_keras = _is_of(type(x).__module__, ("keras",))
    return is_of_keras and hasattr(x, "get_config") and not hasattr(x, "__wrapped__")


class _Identity:
    """An object as a key: equal to that of the same object, while it is alive."""

    def __init__(self, thing: Any):
        self._hash = id(thing)
        try:
            self._get = weakref.ref(thing)
        except TypeError:  # Of a kind that has no weak references.
            self._get = lambda: thing

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Identity):
            return False
        thing = self._get()
        return thing is not None and thing is other._get()

    def __hash__(self) -> int:
        return self._hash
