"""Which variables weight decay leaves alone, in a form that can be saved."""

from __future__ import annotations

import re
from typing import Any

from tf_effopt.engine.base import path_of


class Exclusions:
    """What `exclude_from_weight_decay` was given.

    Args:
        patterns: regular expressions on paths.
        variables: `[path, index]` of each variable; the index, known once the
            optimizer was built, tells variables of equal paths apart.
    """

    def __init__(self, patterns: list[str] = (), variables: list = ()):
        self.patterns = list(patterns)
        self.variables = [tuple(entry) for entry in variables]
        self.identities: list[Any] = []

    @classmethod
    def of(cls, var_list: Any, var_names: Any) -> Exclusions:
        exclusions = cls(patterns=sorted(set(var_names)))
        for variable in var_list:
            if isinstance(variable, str):
                exclusions.variables.append((variable, None))
            else:
                exclusions.identities.append(variable)
        return exclusions

    def copy(self) -> Exclusions:
        other = Exclusions(self.patterns, self.variables)
        other.identities = list(self.identities)
        return other

    def has(self, variable: Any, index: int) -> bool:
        """Whether the variable, `index`-th of those trained, doesn't decay."""
        path = path_of(variable)
        return (
            any(variable is v for v in self.identities)
            or any(
                _same_path(path, p) and i in (None, index) for p, i in self.variables
            )
            or any(re.search(pattern, path) for pattern in self.patterns)
        )

    def get_config(self, trained: list[Any]) -> dict | None:
        """What the constructor takes, or None if nothing is excluded."""
        entries = list(self.variables)
        for variable in self.identities:
            places = [i for i, v in enumerate(trained) if v is variable]
            entries.append((path_of(variable), places[0] if places else None))
        if not entries and not self.patterns:
            return None
        return {"patterns": self.patterns, "variables": [list(e) for e in entries]}


def _same_path(one: str, other: str) -> bool:
    """Whether two paths are equal, but for the name of the model in front.

    `keras.models.load_model` takes a `Sequential`'s name off its variables.
    """
    one, other = sorted((one, other), key=len)
    _, _, within_model = other.partition("/")
    return one == other or ("/" in one and one == within_model)
