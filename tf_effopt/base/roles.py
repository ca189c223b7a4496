"""What a weight is to its layer: which weights are matrices inside a network.

A variable doesn't know its layer. `roles` reads a model; `role_by_path` makes do
with Keras's names for its variables.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from tf_effopt.base import legacy_keras
from tf_effopt.base.role import (
    EMBEDDING,
    HEAD,
    HIDDEN,
    KINDS,
    OTHER,
    Role,
    last_axis_out,
)
from tf_effopt.base.roles_by_path import role_by_path
from tf_effopt.base.roles_of_layers import output_layers, roles_of
from tf_effopt.rules import Matrices
from tf_effopt.runtime.keras_hooks import sublayers
from tf_effopt.state.variables import ends, nearest_paths, path_of


class Roles:
    """The role of each weight of a model, by path. Print it to see the table.

    Made by `tf_effopt.roles(model)`; saved with the optimizer that has it.
    """

    def __init__(self, entries: list[Any]):
        self._entries = [_from_config(entry) for entry in entries]

    def role(self, path: str, shape: tuple[int, ...]) -> Role:
        """The role of a variable; see `of`."""
        (role,) = self.of([(path, shape)])
        return role

    def of(self, variables: Sequence[tuple[str, tuple[int, ...]]]) -> list[Role]:
        """The roles of variables, by their paths and shapes.

        `load_model` takes the names of a `Sequential` off its variables, and layers
        of two models may then have one path: these are told apart by their order.

        Raises:
            ValueError: the model had no such variable.
        """
        places = [self._places(path, tuple(shape)) for path, shape in variables]
        alike = collections.Counter(places)
        seen: collections.Counter = collections.Counter()
        found = []
        for candidates in places:
            known = [self._entries[i][2] for i in candidates]
            if alike[candidates] == len(candidates):
                found.append(known[seen[candidates]])
            else:  # Some aren't trained: none is taken for what it may not be.
                found.append(min(known, key=lambda role: role.kind == HIDDEN))
            seen[candidates] += 1
        return found

    def _places(self, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The entries that a variable may be."""
        of_shape = [(i, p) for i, (p, s, _) in enumerate(self._entries) if s == shape]
        found = [i for i, p in of_shape if p == path]
        found = found or [i for i, p in of_shape if p in ends(path) or path in ends(p)]
        if not found:
            near = nearest_paths(path, [p for p, _, _ in self._entries])
            raise ValueError(
                f"`roles` has no variable {path!r} of shape {shape}; the nearest paths "
                f"are {', '.join(near)}. It was read from another model, or before a "
                "layer was added or renamed: call `tf_effopt.roles(model)` again; an "
                "optimizer's `carry_over(variables, roles=...)` takes it."
            )
        return tuple(found)

    def paths(self, kind: str) -> list[str]:
        """The paths of the variables of one kind."""
        return [path for path, _, role in self._entries if role.kind == kind]

    def get_config(self) -> dict[str, Any]:
        return {
            "entries": [
                [path, list(shape), dataclasses.asdict(role)]
                for path, shape, role in self._entries
            ]
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Roles:
        return cls(**config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Roles) and self._entries == other._entries

    def __hash__(self) -> int:
        return hash(tuple(self._entries))

    def __repr__(self) -> str:
        return f"<roles of {len(self._entries)} variables>"

    def __str__(self) -> str:
        width = max((len(path) for path, _, _ in self._entries), default=0)
        return "\n".join(
            f"{path:{width}}  {role.kind:9}  {tuple(shape)}"
            for path, shape, role in self._entries
        )


keras.saving.register_keras_serializable("tf_effopt")(Roles)


def _from_config(entry: Any) -> tuple[str, tuple[int, ...], Role]:
    path, shape, role = entry
    if not isinstance(role, Role):
        matrices = role["matrices"]
        if matrices is not None:
            matrices = Matrices(
                tuple(matrices["inputs"]),
                tuple(matrices["outputs"]),
                matrices["split"] and tuple(matrices["split"]),
            )
        role = Role(role["kind"], matrices, role["heads"])
    return path, tuple(shape), role


def roles(model: keras.Model, override: Mapping[str, str] | None = None) -> Roles:
    """Reads off a model which of its weights are matrices inside the network.

    Kernels of dense layers, convolutions, attention's projections and recurrent
    cells are; embeddings, even if an output layer shares them, and the
    kernels of output layers aren't, nor are biases and scales. A layer of your
    own is read by the names and shapes of its variables. The last layer of a model
    without an output layer, such as a backbone by itself, is taken for one: see
    `override`.

    Args:
        model: a Keras model that is built.
        override: regular expression on paths -> `"hidden"`, `"embedding"`, `"head"`
            or `"other"`, for what can't be read: the head of a subclassed
            model, the weights of a custom layer.

    Returns:
        The `Roles`, to be printed, and passed to an optimizer: `Muon(roles=...)`.

    Raises:
        ValueError: the model isn't built; a pattern matches nothing.

    Example:

    >>> import keras, tf_effopt
    >>> model = keras.Sequential(
    ...     [keras.Input((8,)), keras.layers.Dense(4, name="inner"),
    ...      keras.layers.Dense(2, name="logits")], name="small")
    >>> print(tf_effopt.roles(model))
    small/inner/kernel   hidden     (8, 4)
    small/inner/bias     other      (4,)
    small/logits/kernel  head       (4, 2)
    small/logits/bias    other      (2,)
    """
    legacy_keras.refuse(model)
    if not getattr(model, "built", False) or not model.weights:
        raise ValueError(
            "`tf_effopt.roles` needs a Keras model whose weights exist. Received: "
            f"{model!r}. If it isn't built, call it on a batch first."
        )
    try:
        override = dict(override or {})
    except (TypeError, ValueError):
        raise ValueError(
            "`override` must be a dict of patterns and roles, such as "
            f"{{'logits': 'head'}}. Received: override={override!r}"
        ) from None
    found: dict[int, Role] = {}
    for layer in sublayers(model):
        for variable, role in roles_of(layer):
            # A weight that several layers share is what its strictest use is.
            found[id(variable)] = _stricter(found.get(id(variable)), role)
    heads = list(output_layers(model))
    for _, variable in heads:
        if variable is None:
            continue
        if id(variable) not in found:  # a weight of a layer that isn't Keras's
            path, shape = path_of(variable), tuple(variable.shape)
            found[id(variable)] = role_by_path(path, shape)
        head = dataclasses.replace(found[id(variable)], kind=HEAD)
        found[id(variable)] = _stricter(found[id(variable)], head)
    entries = []
    for variable in model.weights:  # also frozen ones: they may be trained later
        path, shape = path_of(variable), tuple(variable.shape)
        entries.append(
            (path, shape, found.get(id(variable)) or role_by_path(path, shape))
        )
    entries, has_head = _overridden(entries, override)
    unseen = [name for name, variable in heads if variable is None]
    if (unseen or not heads) and not has_head:
        behind = f" behind {', '.join(unseen)}" if heads else ""
        warnings.warn(
            f"No output layer is seen{behind} in {model.name!r}. If it has one, name "
            'its kernel: `tf_effopt.roles(model, {"path/of/the/kernel": "head"})`.',
            stacklevel=2,
        )
    return Roles(entries)


def _stricter(one: Role | None, other: Role) -> Role:
    order = (EMBEDDING, HEAD, OTHER, HIDDEN)
    if one is None or order.index(other.kind) < order.index(one.kind):
        return other
    return one


def _overridden(entries: list, override: Mapping[str, str]) -> tuple[list, bool]:
    """The entries with the roles that the user names; whether one is a head."""
    for pattern, kind in override.items():
        try:
            re.compile(pattern)
        except (TypeError, re.error) as error:
            raise ValueError(
                f"A pattern must be a regular expression on paths. Received: "
                f"{pattern!r}: {error}"
            ) from None
        if kind not in KINDS:
            raise ValueError(
                f"A role must be one of {', '.join(map(repr, KINDS))}. Received: "
                f"{pattern!r}: {kind!r}"
            )
        places = [
            i for i, (path, _, _) in enumerate(entries) if re.search(pattern, path)
        ]
        if not places:
            near = nearest_paths(pattern, [path for path, _, _ in entries])
            raise ValueError(
                f"The pattern {pattern!r} matches no weight; the nearest "
                f"paths are {', '.join(near)}."
            )
        for i in places:
            path, shape, role = entries[i]
            if kind == HIDDEN and len(shape) < 2:
                raise ValueError(
                    f"{path!r} of shape {shape} is no matrix: it can't be 'hidden'. "
                    f"Received: {pattern!r}: 'hidden'. Make the pattern narrower, "
                    f"such as {pattern + '.*kernel'!r}."
                )
            matrices = role.matrices or last_axis_out(shape)
            entries[i] = path, shape, Role(kind, matrices, role.heads)
    return entries, HEAD in override.values()
