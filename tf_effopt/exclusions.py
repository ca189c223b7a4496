"""Which variables weight decay leaves alone, in a form that can be saved."""

from __future__ import annotations

import re
from typing import Any

from tf_effopt.paths import is_variable, matches, path_of, same_path


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
        if (
            isinstance(var_names, str)
            or is_variable(var_list)
            or isinstance(var_list, str)
        ):
            raise ValueError(
                "`var_list` and `var_names` must be lists. Received: "
                f"var_list={var_list!r}, var_names={var_names!r}"
            )
        for pattern in var_names:
            try:
                re.compile(pattern)
            except (TypeError, re.error) as error:
                raise ValueError(
                    "`var_names` must be a list of regular expressions. Received: "
                    f"{pattern!r}: {error}"
                ) from None
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

    def has(self, variable: Any, index: int, paths: set[str]) -> bool:
        """Whether the variable, `index`-th of those trained, doesn't decay.

        Args:
            paths: of all that are trained. One of them is meant exactly.
        """
        path = path_of(variable)

        def is_meant(excluded: str) -> bool:
            if excluded in paths:
                return path == excluded
            return same_path(path, excluded)

        return (
            any(variable is v for v in self.identities)
            or any(is_meant(p) and i in (None, index) for p, i in self.variables)
            or matches(self.patterns, path)
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
