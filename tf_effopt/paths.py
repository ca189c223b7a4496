"""The paths of variables, and patterns on them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

import keras


def is_variable(thing: Any) -> bool:
    """Whether this is a variable of Keras or of its backend."""
    return isinstance(thing, keras.Variable) or (
        hasattr(thing, "assign") and hasattr(thing, "dtype")
    )


def path_of(variable: Any) -> str:
    """A variable's path, on all backends; TensorFlow's own has a name only."""
    return getattr(variable, "path", None) or variable.name


def matches(patterns: Iterable[str], path: str) -> bool:
    """Whether one of these regular expressions has a match anywhere in a path."""
    return any(re.search(pattern, path) for pattern in patterns)


def same_path(one: str, other: str) -> bool:
    """Whether two paths are equal, but for the name of the model in front.

    `keras.models.load_model` takes a `Sequential`'s name off its variables.
    """
    one, other = sorted((one, other), key=len)
    _, _, within_model = other.partition("/")
    return one == other or ("/" in one and one == within_model)


def closest(path: str, paths: Iterable[str]) -> str:
    """`; near are ...`, for an error about a path that isn't there."""
    near = difflib.get_close_matches(path, list(paths), n=3, cutoff=0.3)
    return f"; near are {', '.join(map(repr, near))}" if near else ""
