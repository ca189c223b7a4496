"""The arguments of a constructor: their names, and an error that helps."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable


def constructor_arguments(cls: type) -> list[str]:
    """The names of a constructor's own arguments."""
    variable_kinds = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return [
        name
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if name != "self" and parameter.kind not in variable_kinds
    ]


def did_you_mean(name: str, known: Iterable[str], quote: str = "") -> str:
    """A hint at the likest name, with a space in front; empty if none is like it."""
    known = list(known)
    # By its initials, too: `lr` is the learning rate.
    lower = {"".join(part[:1] for part in k.lower().split("_")): k for k in known}
    lower |= {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), lower, n=1)
    return f" Did you mean {quote}{lower[near[0]]}{quote}?" if near else ""


def unknown_argument(cls: type, name: str, *further: type) -> str:
    """What to say of an argument that neither `cls` nor `further` classes take."""
    known = [x for one in (cls, *further) for x in constructor_arguments(one)]
    known = list(dict.fromkeys(known))
    return (
        f"`{cls.__name__}` has no argument `{name}`.{did_you_mean(name, known, '`')} "
        f"It takes: {', '.join(known)}."
    )
