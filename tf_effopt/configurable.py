"""What owns hyperparameters: each is declared once, in the class, with its default."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Self, dataclass_transform

from tf_effopt import hyperparameters as kinds
from tf_effopt import overrides
from tf_effopt.arguments import (
    check_arguments,
    check_attribute,
    constructor_arguments,
)
from tf_effopt.hyperparameters import REQUIRED, Hyperparameter

FIELD_KINDS = (
    kinds.Choice,
    kinds.Count,
    kinds.DecayRate,
    kinds.Fraction,
    kinds.Integer,
    kinds.Negative,
    kinds.NonNegative,
    kinds.Patterns,
    kinds.Positive,
    kinds.Real,
    kinds.Switch,
)


@dataclass_transform(field_specifiers=FIELD_KINDS)
class Configurable:
    """Base of what has hyperparameters: they are its constructor's arguments.

    A class that declares a hyperparameter with a default gets its `__init__` made, as
    a dataclass does: `beta: float = DecayRate(default=0.9)` is an argument `beta=0.9`.
    Arguments are in the order of the declarations, those of base classes first; one
    that is declared again keeps its place, and gets the new default. A class may have
    an `__init__` of its own instead, which sets each attribute.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        overrides.check_hyperparameters(cls)
        declared = [x for x in vars(cls).values() if isinstance(x, Hyperparameter)]
        for x in declared:
            if x.default is not REQUIRED:
                x.check(x.default)
        if declared and "__init__" not in vars(cls) and _is_complete(cls):
            cls.__init__ = constructor(cls)

    def configure(self, values: dict[str, Any]) -> None:
        """Sets all hyperparameters: what a generated `__init__` does."""
        for name, value in values.items():
            setattr(self, name, value)


class Settings(Configurable):
    """A `Configurable` that is saved with an optimizer, such as a stage."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        check_arguments(cls, kwargs)
        return super().__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        check_attribute(self, name)
        super().__setattr__(name, value)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, with their values now."""
        return {name: getattr(self, name) for name in constructor_arguments(type(self))}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Makes one from what `get_config` returned."""
        return cls(**config)


def fields(cls: type) -> dict[str, Hyperparameter]:
    """The hyperparameters of a class by name, in the order of its constructor."""
    found: dict[str, Hyperparameter] = {}
    for base in reversed(cls.__mro__):
        own = vars(base).items()
        found |= {name: x for name, x in own if isinstance(x, Hyperparameter)}
    return found


def _is_complete(cls: type) -> bool:
    """Whether the constructor can be made of the declarations alone.

    A class whose base has a constructor written by hand goes on with that one.
    """
    inherited = inspect.getattr_static(cls, "__init__")
    is_ours = inherited is object.__init__ or hasattr(inherited, "made_of_fields")
    return is_ours and all(x.default is not REQUIRED for x in fields(cls).values())


def constructor(cls: type) -> Callable[..., None]:
    """The `__init__` of a class, made of its hyperparameters."""
    signature = signature_of(fields(cls))

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        values = dict(bound.arguments)
        del values["self"]
        self.configure(values)

    __init__.__signature__ = signature
    __init__.__qualname__ = f"{cls.__qualname__}.__init__"
    __init__.__module__ = cls.__module__
    __init__.made_of_fields = True
    return __init__


def signature_of(declared: dict[str, Hyperparameter]) -> inspect.Signature:
    """The signature of a constructor that takes these hyperparameters."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    make = functools.partial(inspect.Parameter, kind=kind)
    parameters = [make("self")]
    parameters += [make(name, default=x.default) for name, x in declared.items()]
    return inspect.Signature(parameters)
