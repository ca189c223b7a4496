"""Which variables are meant, in a form that can be saved.

By components of paths, by regular expressions on them, by variables, by layers. A
file knows no variable: there, variables and layers are paths.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import keras

from tf_effopt.base import legacy_keras
from tf_effopt.state.variables import (
    components,
    ends,
    is_variable,
    nearest_components,
    nearest_paths,
    path_of,
)

# What no name of a layer or variable is likely to have; a "." within a word is.
LIKE_A_REGULAR_EXPRESSION = r"[\\^$*+?{}\[\]()|]|(?<!\w)\.|\.(?!\w)"


class Trained:
    """The variables that an optimizer is built on, to be looked up."""

    def __init__(self, variables: list[Any], paths: list[str]):
        self.variables = variables
        self.paths = paths
        self._by_identity = {id(v): i for i, v in enumerate(variables)}
        self._by_path = _places(enumerate(self.paths))
        self._by_end = _places(
            (i, e) for i, p in enumerate(self.paths) for e in ends(p)
        )

    def place_of(self, variable: Any) -> list[int]:
        place = self._by_identity.get(id(variable))
        return [] if place is None else [place]

    def places_of(self, path: str) -> list[int]:
        """Where the path is; else, where it is but for models' names in front.

        `keras.models.load_model` takes the names of a `Sequential`, and of those
        around it, off its variables.
        """
        if path in self._by_path:
            return self._by_path[path]
        if path in self._by_end:
            return self._by_end[path]
        return next((self._by_path[x] for x in ends(path) if x in self._by_path), [])


def _places(paths: Iterable[tuple[int, str]]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = collections.defaultdict(list)
    for i, path in paths:
        places[path].append(i)
    return dict(places)


@dataclasses.dataclass(frozen=True)
class Components:
    """All variables whose path has these components, one after another.

    Attributes:
        text: one or more whole components: "dense" is no "dense_1".
        is_saved: whether a file says it. There, models' names that `load_model`
            took off the paths may stand in front.
    """

    text: str
    is_saved: bool = False

    @property
    def name(self) -> str:
        return self.text

    def find(self, trained: Trained) -> list[int]:
        mine = components(self.text)
        paths = [components(p) for p in trained.paths]
        n = len(mine)
        found = [
            place
            for place, path in enumerate(paths)
            if any(path[i : i + n] == mine for i in range(len(path) - n + 1))
        ]
        while self.is_saved and not found and len(mine) > 1:
            mine = mine[1:]
            found = [i for i, p in enumerate(paths) if p[: len(mine)] == mine]
        return found

    def copy(self, memo: dict) -> Components:
        return self

    def get_config(self) -> str:
        return self.text

    def nearest(self, trained: Trained) -> str:
        near = nearest_components(self.text, trained.paths)
        text = f"the nearest components are {', '.join(map(repr, near))}"
        part = re.escape(self.text.strip("/"))
        within = [p for p in trained.paths if re.search(part, p)]
        if within:
            text += (
                f"; `re.compile({part!r})` has a match in {len(within)} paths, such as "
                f"{within[0]}"
            )
        return text

    def __repr__(self) -> str:
        return repr(self.text)


@dataclasses.dataclass(frozen=True)
class Pattern:
    """All variables whose path has a match of a regular expression."""

    text: str
    flags: int = 0

    @property
    def name(self) -> str:
        return self.text

    @property
    def compiled(self) -> re.Pattern:
        return re.compile(self.text, self.flags)

    def find(self, trained: Trained) -> list[int]:
        return [i for i, p in enumerate(trained.paths) if self.compiled.search(p)]

    def copy(self, memo: dict) -> Pattern:
        return self

    def get_config(self) -> dict[str, Any]:
        return {"pattern": self.text, "flags": int(self.compiled.flags)}

    def __repr__(self) -> str:
        return repr(self.compiled)


@dataclasses.dataclass
class Reference:
    """One variable, or what a file says of it.

    Attributes:
        path: what else is of this path is meant, too, until it is known better.
        index: None, or its place among those trained, which tells variables of
            equal paths apart.
        variable: itself; None until it was found.
    """

    path: str
    index: int | None = None
    variable: Any = None

    @property
    def name(self) -> str:
        return self.path

    def find(self, trained: Trained) -> list[int]:
        if self.variable is not None:
            places = trained.place_of(self.variable)
        else:
            places = trained.places_of(self.path)
            if len(places) > 1 and self.index is not None:
                places = [i for i in places if i == self.index]
        if len(places) == 1:
            (self.index,) = places
            self.variable = trained.variables[self.index]
        return places

    def copy(self, memo: dict) -> Reference:
        variable = memo.get(id(self.variable), self.variable)
        return Reference(self.path, self.index, variable)

    def get_config(self) -> dict[str, Any]:
        return {"path": self.path, "index": self.index}

    def __repr__(self) -> str:
        return f"<variable {self.path!r}>"


@dataclasses.dataclass
class Layer:
    """All variables of a layer, or what a file says of it.

    Attributes:
        layer: itself, with the variables it has when they are looked for; None
            if this comes from a file.
        references: its variables, as far as they are known.
        has_none: whether it is known to have no variables, as an activation.
    """

    name: str
    layer: Any = None
    references: list[Reference] = dataclasses.field(default_factory=list)
    has_none: bool = False

    def find(self, trained: Trained) -> list[int]:
        self._look()
        if self.has_none:
            return []
        if not self.references:  # It was saved before it had any.
            pattern = Pattern(f"(^|/){re.escape(self.name)}/")
            return [] if self.layer is not None else pattern.find(trained)
        return [i for reference in self.references for i in reference.find(trained)]

    def _look(self) -> None:
        if self.layer is not None:
            known = {id(x.variable): x for x in self.references}
            self.references = [
                known.get(id(v)) or Reference(path_of(v), variable=v)
                for v in self.layer.weights
            ]
            self.has_none = self.layer.built and not self.references

    def copy(self, memo: dict) -> Layer:
        copied = any(id(x.variable) in memo for x in self.references)
        return Layer(
            self.name,
            None if copied else self.layer,
            [reference.copy(memo) for reference in self.references],
            self.has_none,
        )

    def get_config(self) -> dict[str, Any]:
        self._look()
        variables = [[x.path, x.index] for x in self.references]
        return {"layer": self.name, "variables": None if self.has_none else variables}

    def __repr__(self) -> str:
        return f"<layer {self.name!r}>"


def has_no_weights(member: Any) -> bool:
    """Whether a selection's member is a layer that is known to have none."""
    return isinstance(member, Layer) and member.has_none


class Selection:
    """Some of an optimizer's variables."""

    def __init__(self, members: Iterable[Member] = ()):
        self.members = list(members)

    @classmethod
    def of(cls, given: Iterable[Any]) -> Selection:
        """From components, patterns, variables and layers, or their configurations.

        Raises:
            ValueError: something is none of these.
        """
        return cls(map(_member, given))

    @classmethod
    def of_saved(cls, saved: Iterable[Any], has_components: bool = False) -> Selection:
        """From what `get_config` returned.

        Args:
            has_components: whether strings are components of paths; they are regular
                expressions in what version 0.1.0 saved.
        """
        make = _components_of_file if has_components else pattern
        return cls(make(x) if isinstance(x, str) else _member(x) for x in saved)

    def find(self, trained: Trained) -> list[list[int]]:
        """For each member the places of its variables."""
        return [member.find(trained) for member in self.members]

    def copy(self, memo: dict) -> Selection:
        """As it is; for variables that `copy.deepcopy` copied, their copies."""
        return Selection(member.copy(memo) for member in self.members)

    def get_config(self) -> list[Any]:
        return [member.get_config() for member in self.members]

    def __bool__(self) -> bool:
        return bool(self.members)

    def __repr__(self) -> str:
        return repr(self.members[0] if len(self.members) == 1 else self.members)


Member = Components | Pattern | Reference | Layer


def _member(given: Any) -> Member:
    if isinstance(given, str):
        return whole_components(given)
    if isinstance(given, re.Pattern):
        return pattern(given)
    legacy_keras.refuse(given)
    if isinstance(given, keras.layers.Layer):
        return Layer(given.name, given)
    if is_variable(given):
        return Reference(path_of(given), variable=given)
    if isinstance(given, dict) and "path" in given:
        return Reference(**given)
    if isinstance(given, dict) and "pattern" in given:
        return Pattern(given["pattern"], given["flags"])
    if isinstance(given, dict) and "layer" in given:
        saved = given["variables"]
        references = [Reference(*x) for x in saved or []]
        return Layer(given["layer"], None, references, has_none=saved is None)
    raise ValueError(
        f"{given!r} is no component of a path, regular expression, variable or layer"
    )


def _components_of_file(text: str) -> Components:
    return Components(text, is_saved=True)


def whole_components(text: str) -> Components:
    """Components of paths, checked."""
    if re.search(LIKE_A_REGULAR_EXPRESSION, text):
        raise ValueError(
            f"{text!r} looks like a regular expression. A string is one or more whole "
            "components of a path, such as 'dense' or 'block/dense'. Import `re` and "
            f"pass `re.compile({text!r})` for a regular expression"
        )
    if not all(components(text)):
        raise ValueError(f"{text!r} has a component without a name")
    return Components(text)


def pattern(given: str | re.Pattern) -> Pattern:
    """A regular expression, checked."""
    try:
        compiled = re.compile(given)
    except (TypeError, re.error) as error:
        raise ValueError(f"{given!r}: {error}") from None
    if not isinstance(compiled.pattern, str):
        raise ValueError(  # noqa: TRY004
            f"{given!r} is for bytes, and paths are strings"
        )
    return Pattern(compiled.pattern, compiled.flags)


def decay_exclusions(var_list: Any, var_names: Any) -> Selection:
    """What `exclude_from_weight_decay` was given, checked."""
    if isinstance(var_names, str) or is_variable(var_list) or isinstance(var_list, str):
        raise ValueError(
            "`var_list` and `var_names` must be lists. Received: "
            f"var_list={var_list!r}, var_names={var_names!r}"
        )
    try:
        patterns = [pattern(text) for text in sorted(set(var_names or ()), key=str)]
    except ValueError as error:
        raise ValueError(
            f"`var_names` must be a list of regular expressions. Received: {error}"
        ) from None
    variables = [
        Reference(v) if isinstance(v, str) else _member(v)
        for v in (() if var_list is None else var_list)
    ]
    return Selection([*patterns, *variables])


def nothing_found(members: list[Any], trained: Trained) -> str:
    """What to say of members of which none is trained."""
    lines = []
    for member in members:
        if isinstance(member, Components):
            near = member.nearest(trained)
        else:
            paths = ", ".join(nearest_paths(member.name, trained.paths))
            near = f"the nearest paths are {paths or 'none'}"
        lines.append(f"    {member!r}: {near}")
    return "\n".join(lines)
