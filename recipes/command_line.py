"""A recipe's options: a dataclass from the command line, optimizers by name."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

import keras

import tf_effopt
from tf_effopt.base.arguments import did_you_mean


class UsageError(Exception):
    """What was asked for can't be done; the message says what can."""


# ------------------------------------------------------------------- options


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field of a configuration, with what `add_argument` takes besides."""
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def parse(config: type, arguments: Sequence[str], prog: str, description: str) -> Any:
    """Returns a `config`, a dataclass of `option`s, out of a command line.

    Raises:
        UsageError: an option isn't known, or its value is of the wrong type.
    """
    parser = _Parser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        settings = {"dest": field.name, "default": field.default, **field.metadata}
        if hints[field.name] is bool:
            settings["action"] = "store_true"
        elif hints[field.name] == tuple[str, ...]:
            settings["action"], settings["default"] = "append", []
        else:
            settings["type"] = _plain_type(hints[field.name])
            settings["help"] += f" (default: {field.default})"
        parser.add_argument(flag(field.name), **settings)
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = [flag(field.name) for field in dataclasses.fields(config)]
        raise UsageError(
            f"There is no option {unknown[0]!r}.{did_you_mean(unknown[0], known)} "
            f"Expected: {', '.join(known)}."
        )
    values = {k: tuple(v) if type(v) is list else v for k, v in vars(parsed).items()}
    return config(**values)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UsageError(message)


def _plain_type(hint: Any) -> Callable[[str], Any]:
    """`int` out of `int | None`."""
    if isinstance(hint, types.UnionType):
        return next(t for t in typing.get_args(hint) if t is not type(None))
    return hint


def flag(field: str) -> str:
    return "--" + field.replace("_", "-")


# ---------------------------------------------------------------- optimizers


def optimizers() -> dict[str, type[keras.optimizers.Optimizer]]:
    """The public optimizers of tf_effopt that train a model by themselves."""
    return {name: getattr(tf_effopt, name) for name in tf_effopt.optimizers.__all__}


def optimizer_class(name: str) -> type[keras.optimizers.Optimizer]:
    """Raises `UsageError` if tf_effopt has no such optimizer."""
    known = optimizers()
    if name not in known:
        raise UsageError(
            f"There is no optimizer {name!r} in tf_effopt."
            f"{did_you_mean(name, list(known))} Expected one of: {', '.join(known)}."
        )
    return known[name]


def make_optimizer(
    name: str,
    learning_rate: Any,
    settings: Sequence[str] = (),
    model: keras.Model | None = None,
) -> keras.optimizers.Optimizer:
    """Returns a new optimizer.

    Args:
        name: of a class of tf_effopt.
        learning_rate: number or schedule.
        settings: further arguments, each as `"KEY=VALUE"`.
        model: that it is to train, for optimizers that need the roles of weights.

    Raises:
        UsageError: name, key or value isn't right.
    """
    cls = optimizer_class(name)
    arguments = dict(_argument(cls, setting) for setting in settings)
    if model is not None and "roles" in _known_arguments(cls):
        arguments.setdefault("roles", tf_effopt.roles(model))
    try:
        return cls(learning_rate, **arguments)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{name}: {error}") from error


def _argument(cls: type, setting: str) -> tuple[str, Any]:
    key, equals, text = (part.strip() for part in setting.partition("="))
    key = key.replace("-", "_")
    if not equals:
        raise UsageError(f"--set takes KEY=VALUE. Received: --set {setting}")
    if key == "learning_rate":
        raise UsageError("The learning rate is set by --learning-rate, not by --set.")
    known = _known_arguments(cls)
    if key not in known:
        raise UsageError(
            f"{cls.__name__} has no argument {key!r}.{did_you_mean(key, known)} "
            f"Expected one of: {', '.join(known)}."
        )
    return key, _literal(text)


def _known_arguments(cls: type) -> list[str]:
    """The class's own arguments, then those that all optimizers share."""
    known: dict[str, None] = {}
    for owner in (cls, tf_effopt.Optimizer):
        known |= dict.fromkeys(inspect.signature(owner.__init__).parameters)
    other = ("self", "args", "kwargs", "name", "learning_rate")
    return [name for name in known if name not in other]


def _literal(text: str) -> Any:
    """A number, True, False, None or a tuple, if `text` is one; else `text`."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
