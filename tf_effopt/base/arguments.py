"""The arguments of a constructor: their names, and an error that helps."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from tf_effopt.engine.spelling import advice, did_you_mean


def constructor_arguments(cls: type) -> list[str]:
    """The names of a constructor's own arguments."""
    variable_kinds = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return [
        name
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if name != "self" and parameter.kind not in variable_kinds
    ]


def all_arguments(cls: type) -> list[str]:
    """Those of a class and, after them, of the classes that it derives from."""
    names: dict[str, None] = {}
    for base in cls.__mro__:
        if "__init__" in vars(base) and base is not object:
            names |= dict.fromkeys(constructor_arguments(base))
    return list(names)


def unknown_argument(cls: type, name: str, *further: type) -> str:
    """What to say of an argument that neither `cls` nor `further` classes take."""
    known = [x for one in (cls, *further) for x in constructor_arguments(one)]
    known = list(dict.fromkeys(known))
    return (
        f"`{cls.__name__}` has no argument `{name}`.{did_you_mean(name, known, '`')} "
        f"It takes: {', '.join(known)}."
    )


def check_arguments(cls: type, given: Iterable[str]) -> None:
    """Refuses keyword arguments that a constructor doesn't take.

    Raises:
        TypeError: as Python's own, with the name that may be meant.
    """
    parameters = inspect.signature(cls.__init__).parameters.values()
    if any(x.kind is inspect.Parameter.VAR_KEYWORD for x in parameters):
        return
    for name in given:
        if name not in constructor_arguments(cls):
            raise TypeError(unknown_argument(cls, name))


def check_attribute(
    thing: Any, name: str, known: Mapping[str, str] | None = None
) -> None:
    """Refuses to set a public attribute whose name is that of no setting, but like it.

    A subclass may have attributes of such names: as an argument of its constructor, or
    in the class's body, if only by an annotation.

    Args:
        thing: whose attribute is to be set.
        name: of the attribute.
        known: names of settings, each with the attribute to set; None: the arguments
            of the constructor.

    Raises:
        AttributeError: it is another library's name of a setting, or within two
            letters of one.
    """
    cls = type(thing)
    if name.startswith("_") or name in thing.__dict__ or _is_declared(cls, name):
        return
    mine = all_arguments(cls)
    if name in mine:
        return
    meant = advice(name, {x: x for x in mine} if known is None else known)
    if meant is not None:
        raise AttributeError(
            f"`{cls.__name__}` has no setting `{name}`, so that setting it would do "
            f"nothing. {meant} (A subclass that wants an attribute of this name "
            f"declares it in its body: `{name}: float`.)"
        )


def _is_declared(cls: type, name: str) -> bool:
    return hasattr(cls, name) or any(
        name in vars(base).get("__annotations__", ()) for base in cls.__mro__
    )
