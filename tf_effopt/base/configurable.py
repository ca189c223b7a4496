"""What owns hyperparameters: each is declared once, in the class, with its default."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any, ClassVar, Self, dataclass_transform

from keras import ops
from keras.optimizers import schedules

from tf_effopt import hyperparameters as kinds
from tf_effopt.base import overrides
from tf_effopt.base.arguments import (
    check_arguments,
    check_attribute,
    constructor_arguments,
)
from tf_effopt.base.roles import Roles
from tf_effopt.engine.spelling import did_you_mean
from tf_effopt.hyperparameters import REQUIRED, Hyperparameter


@dataclass_transform(
    field_specifiers=(
        kinds.Choice,
        kinds.Count,
        kinds.DecayRate,
        kinds.Fraction,
        kinds.Integer,
        kinds.LearningRate,
        kinds.Negative,
        kinds.NonNegative,
        kinds.Objects,
        kinds.Patterns,
        kinds.Positive,
        kinds.Real,
        kinds.Switch,
    )
)
class Configurable:
    """Base of what has hyperparameters: they are its constructor's arguments.

    A class that declares a hyperparameter with a default gets its `__init__` made, as
    a dataclass does: `beta: float = DecayRate(default=0.9)` is an argument `beta=0.9`.
    Arguments are in the order of the declarations, those of base classes first; one
    that is declared again keeps its place, and gets the new default. One that was
    keyword-only in a base class and isn't any more comes after the one that is declared
    before it. A class may define a custom `__init__` instead, which sets each attribute.
    """

    about_arguments: ClassVar[str | None] = (
        None  # the docstring of a generated `__init__`
    )

    @classmethod
    def shared_arguments(cls) -> list[inspect.Parameter]:
        """Further arguments of each generated constructor, keyword-only."""
        return []

    @classmethod
    def check_given(cls, given: Iterable[str], known: Collection[str]) -> None:
        """Raises an error that helps if a keyword argument isn't known."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        overrides.check_hyperparameters(cls)
        for x in vars(cls).values():
            if isinstance(x, Hyperparameter) and x.default is not REQUIRED:
                x.check(x.default)
        if "__init__" not in vars(cls) and _is_complete(cls):
            cls.__init__ = constructor(cls)

    def configure(self, values: dict[str, Any]) -> None:
        """Sets all hyperparameters: what a generated `__init__` does."""
        for name, value in values.items():
            setattr(self, name, value)


def fields(cls: type) -> dict[str, Hyperparameter]:
    """The hyperparameters of a class by name, in the order of its constructor."""
    found: dict[str, Hyperparameter] = {}
    for base in reversed(cls.__mro__):
        before = None
        for name, x in vars(base).items():
            if not isinstance(x, Hyperparameter):
                continue
            moves = name in found and found[name].kw_only and not x.kw_only
            found[name] = x
            if moves and before is not None:
                found = _moved(found, name, behind=before)
            before = name
    return found


def _moved(found: dict[str, Any], name: str, behind: str) -> dict[str, Any]:
    names = [x for x in found if x != name]
    names.insert(names.index(behind) + 1, name)
    return {x: found[x] for x in names}


def _is_complete(cls: type) -> bool:
    """Whether the constructor can be made of the declarations alone.

    A class whose base has a constructor written by hand goes on with that one.
    """
    inherited = inspect.getattr_static(cls, "__init__")
    is_ours = inherited is object.__init__ or hasattr(inherited, "made_of_fields")
    shared = {x.name for x in cls.shared_arguments()}
    own = {name: x for name, x in fields(cls).items() if name not in shared}
    return is_ours and all(x.default is not REQUIRED for x in own.values())


def constructor(cls: type) -> Callable[..., None]:
    """The `__init__` of a class, made of its hyperparameters."""
    signature = signature_of(cls)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        known = signature.parameters
        type(self).check_given(kwargs, known)
        further = {name: x for name, x in kwargs.items() if name not in known}
        given = {name: x for name, x in kwargs.items() if name in known}
        try:
            bound = signature.bind(self, *args, **given)
        except TypeError as error:
            by_place = [x.name for x in known.values() if x.kind is not x.KEYWORD_ONLY]
            raise TypeError(
                f"{cls.__name__}(): {error}. By position it takes: "
                f"{', '.join(by_place[1:]) or 'nothing'}; all else by name."
            ) from None
        bound.apply_defaults()
        values = dict(bound.arguments) | further
        del values["self"]
        self.configure(values)

    __init__.__doc__ = cls.about_arguments
    __init__.__signature__ = signature
    __init__.__qualname__ = f"{cls.__qualname__}.__init__"
    __init__.__module__ = cls.__module__
    __init__.made_of_fields = True
    return __init__


def signature_of(cls: type) -> inspect.Signature:
    """The signature of a generated constructor.

    Its own hyperparameters may be passed by position; those that all classes of the kind
    share only by name, unless the class declares them again.
    """
    shared = {x.name: x for x in cls.shared_arguments()}
    own = {
        name: x
        for name, x in fields(cls).items()
        if x.default is not REQUIRED and not (x.kw_only and name in shared)
    }
    make = inspect.Parameter
    by_place = [x for x in own.items() if not x[1].kw_only]
    by_name = [x for x in own.items() if x[1].kw_only]
    parameters = [make("self", make.POSITIONAL_OR_KEYWORD)]
    parameters += [
        make(name, make.POSITIONAL_OR_KEYWORD, default=x.default)
        for name, x in by_place
    ]
    parameters += [
        make(name, make.KEYWORD_ONLY, default=x.default) for name, x in by_name
    ]
    parameters += [x for name, x in shared.items() if name not in own]
    return inspect.Signature(parameters)


def serialized(value: Any) -> Any:
    """A value as it is in a configuration: a schedule, or roles, as a dict."""
    if isinstance(value, schedules.LearningRateSchedule):
        return schedules.serialize(value)
    return value.get_config() if isinstance(value, Roles) else value


def current_value(owner: Any, name: str, optimizer: Any) -> Any:
    """What `current` returns.

    Args:
        owner: of the hyperparameter.
        name: of the hyperparameter.
        optimizer: that it belongs to; None for one that isn't built, at step 0.
    """
    declared = fields(type(owner))
    if name not in declared:
        raise ValueError(
            f"`{type(owner).__name__}` has no hyperparameter `{name}`."
            f"{did_you_mean(name, declared, '`')} It has: {', '.join(declared)}."
        )
    value, kind = getattr(owner, name), declared[name]
    if isinstance(value, schedules.LearningRateSchedule):
        step = 0 if optimizer is None else optimizer.iterations
        value = kind.at(value, step)
    if hasattr(value, "shape"):
        value = float(ops.convert_to_numpy(value))
    return value


class Settings(Configurable):
    """A `Configurable` that is saved with an optimizer, such as a stage."""

    built = False
    _engine: ClassVar[Any] = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        check_arguments(cls, kwargs)
        return super().__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        check_attribute(self, name)
        super().__setattr__(name, value)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, with their values now."""
        names = constructor_arguments(type(self))
        return {name: serialized(getattr(self, name)) for name in names}

    def current(self, name: str) -> Any:
        """The value of a hyperparameter now, also of one that is given by a schedule."""
        optimizer = self._engine.optimizer if self.built else None
        return current_value(self, name, optimizer)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Makes one from what `get_config` returned."""
        return cls(**config)
