"""Variables of every backend: paths, shapes, dtypes; and patterns on paths."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable
from typing import Any

import keras


def is_variable(thing: Any) -> bool:
    """Whether this is a variable of Keras or of its backend."""
    is_of_tensorflow = hasattr(thing, "assign") and hasattr(thing, "dtype")
    is_of_torch = (
        hasattr(thing, "requires_grad") and type(thing).__name__ == "Parameter"
    )
    return isinstance(thing, keras.Variable) or is_of_tensorflow or is_of_torch


def path_of(variable: Any) -> str:
    """A variable's path, on all backends; TensorFlow's own has a name only."""
    return getattr(variable, "path", None) or variable.name


def shape_of(variable: Any) -> tuple[int, ...]:
    """A variable's shape; that of its value now, where its shape may change.

    Raises:
        ValueError: its shape may change, and it has no value.
    """
    shape = variable.shape
    if getattr(shape, "rank", 0) is not None and None not in tuple(shape):
        return tuple(shape)
    return _shape_now(variable)


def _shape_now(variable: Any) -> tuple[int, ...]:
    """The shape of the value of a variable of TensorFlow."""
    import tensorflow as tf

    local = variable.value if isinstance(variable, keras.Variable) else variable
    if isinstance(local, tf.distribute.DistributedValues):
        local = local.distribute_strategy.experimental_local_results(local)[0]
    with tf.init_scope():
        if not tf.raw_ops.VarIsInitializedOp(resource=local.handle):
            raise ValueError(
                f"{path_of(variable)} has the shape {variable.shape}, which isn't fully "
                "known, and no value yet. Give it a value before the optimizer is "
                "built, or make it with its full `shape`."
            )
        # `VariableShape` of TensorFlow 2.20 answers -1 for an unknown dimension.
        return tuple(local.read_value().shape)


def dtype_name(variable: Any) -> str:
    """The dtype of a Keras variable or a backend's own, as a string."""
    return getattr(variable.dtype, "name", str(variable.dtype))


def paths_and_shapes(variables: Iterable[Any]) -> list[tuple[str, tuple[int, ...]]]:
    """The path and the shape of each variable."""
    return [(path_of(v), shape_of(v)) for v in variables]


def resolve_renamed(
    variables: Iterable[Any], saved: list[tuple[str, tuple[int, ...]]]
) -> list[tuple[str, tuple[int, ...]]]:
    """The path and the shape by which an optimizer knows each variable.

    `load_model` makes the automatic names of layers within layers anew, and takes
    that of a `Sequential` off. Variables of other paths than those `saved`, but of
    the same shapes and, numbers apart, of layers of the same names in the same order,
    are taken for them. There may be fewer than were saved, if no two were alike: some
    layers were frozen since.
    """
    now = paths_and_shapes(variables)
    if len(now) < len(saved):
        within = [(path.partition("/")[2], shape) for path, shape in saved]
        for names in (saved, within):
            if len(set(names)) == len(names) and set(now) <= set(names):
                return [saved[names.index(x)] for x in now]
    is_alike = [_kind(*x) for x in now] == [_kind(*x) for x in saved]
    is_renamed = sorted(path for path, _ in now) != sorted(path for path, _ in saved)
    return list(saved) if is_alike and is_renamed else now


def placeholder(
    path: str, shape: tuple[int, ...], dtype: str | None = None
) -> keras.Variable:
    """A new variable of this path."""
    *scopes, name = path.split("/")
    with contextlib.ExitStack() as stack:
        for scope in scopes:
            stack.enter_context(keras.name_scope(scope))
        return keras.Variable("zeros", shape=shape, dtype=dtype, name=name)


def _kind(path: str, shape: tuple[int, ...]) -> tuple[list[str], tuple[int, ...]]:
    """What automatic names leave of a path's layer and variable, and the shape."""
    return [re.sub(r"_\d+$", "", part) for part in path.split("/")[-2:]], shape


def matches(patterns: Iterable[str], path: str) -> bool:
    """Whether one of these regular expressions has a match anywhere in a path."""
    return any(re.search(pattern, path) for pattern in patterns)


def ends(path: str) -> list[str]:
    """A path without its first components, as long as two are left."""
    parts = path.split("/")
    return ["/".join(parts[i:]) for i in range(1, len(parts) - 1)]


def components(path: str) -> list[str]:
    """What stands between the slashes, without TensorFlow's ":0" at the end."""
    return re.sub(r":\d+$", "", path.strip("/")).split("/")


def nearest_components(text: str, paths: Iterable[str], n: int = 5) -> list[str]:
    """The components of paths, as many in a row as a text has, that are likest to it."""
    size = len(components(text))
    rows = dict.fromkeys(
        "/".join(parts[i : i + size])
        for parts in map(components, paths)
        for i in range(len(parts) - size + 1)
    )

    def likeness(row: str) -> float:
        return difflib.SequenceMatcher(None, text.lower(), row.lower()).ratio()

    return sorted(rows, key=likeness, reverse=True)[:n]


def nearest_paths(text: str, paths: Iterable[str], n: int = 5) -> list[str]:
    """The paths that are likest to a text, as a whole or in one component."""

    def likeness(path: str) -> float:
        words = text.lower()
        return max(
            difflib.SequenceMatcher(None, words, part.lower()).ratio()
            for part in (path, *path.split("/"))
        )

    return sorted(dict.fromkeys(paths), key=likeness, reverse=True)[:n]
