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
        fields = dataclasses.fields(x)
        return type(x), tuple(structure(getattr(x, f.name)) for f in fields)
    if _package(type(x)) == "keras" and hasattr(x, "get_config"):
        return type(x), structure(x.get_config())
    return _Identity(x)


def is_own(key: Hashable) -> bool:
    """Whether a `structure` has nothing of a user's in it, such as a function.

    What a user has made may hold a model, and mustn't be kept alive.
    """
    if isinstance(key, tuple | frozenset):
        return all(map(is_own, key))
    return not isinstance(key, _Identity) or key.is_own


def _package(x: Any) -> str:
    return (x.__module__ or "").partition(".")[0]  # What `exec` made may have none.


class _Identity:
    """An object as a key: equal to that of the same object, while it is alive."""

    def __init__(self, thing: Any):
        self.is_own = isinstance(thing, Hyperparameter)
        if inspect.isfunction(thing):
            is_ours = _package(thing) in ("tf_effopt", "keras")
            self.is_own = is_ours and thing.__closure__ is None
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
