"""The arguments of a constructor: their names, and an error that helps."""

from __future__ import annotations

import difflib
import inspect


def constructor_arguments(cls: type) -> list[str]:
    """The names of a constructor's own arguments."""
    variable_kinds = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return [
        name
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if name != "self" and parameter.kind not in variable_kinds
    ]


def unknown_argument(cls: type, name: str, *further: type) -> str:
    """What to say of an argument that neither `cls` nor `further` classes take."""
    known = [x for one in (cls, *further) for x in constructor_arguments(one)]
    known = list(dict.fromkeys(known))
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    return (
        f"`{cls.__name__}` has no argument `{name}`.{hint} "
        f"It takes: {', '.join(known)}."
    )
