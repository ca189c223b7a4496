"""How an optimizer is shown: by its class and the arguments that were set.

Nothing here may raise, or add to a graph: it is what a debugger and an error call.
"""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

import keras
import numpy as np

from tf_effopt.base.arguments import constructor_arguments

MISSING = object()


def shown(thing: Any, cls: type | None = None, always: tuple[str, ...] = ()) -> str:
    """The class of a thing, and those of its arguments that aren't the defaults.

    Args:
        thing: an optimizer, transform or wrapper.
        cls: a further class whose arguments it takes.
        always: arguments that are shown whatever they are.
    """
    defaults = _defaults(cls) | _defaults(type(thing))
    pairs = []
    names = [*constructor_arguments(type(thing)), *defaults]
    for name in dict.fromkeys(names):
        value = _value(thing, name)
        is_default = _is_same(value, defaults.get(name, MISSING))
        if value is not MISSING and (name in always or not is_default):
            pairs.append(f"{name}={text(value)}")
    return f"{type(thing).__name__}({', '.join(pairs)})"


def is_automatic(name: str, cls: type) -> bool:
    """Whether Keras has made an object's name from its class."""
    words = re.sub(
        r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__
    )
    plain = words.replace("_", "").lower()
    return re.sub(r"_\d+$", "", name).replace("_", "") == plain


def text(value: Any) -> str:
    """A value of an argument: a variable by its number, a schedule by its arguments."""
    try:
        if isinstance(value, keras.Variable):
            return _number(value)
        if isinstance(value, keras.optimizers.schedules.LearningRateSchedule):
            config = {k: x for k, x in value.get_config().items() if k != "name"}
            inside = ", ".join(f"{k}={x!r}" for k, x in config.items())
            return f"{type(value).__name__}({inside})"
        if isinstance(value, tuple) and not all(isinstance(x, str) for x in value):
            return f"[{', '.join(map(text, value))}]"
        if inspect.isroutine(value):
            return getattr(value, "__qualname__", type(value).__name__)
        return repr(value)
    except Exception:  # noqa: BLE001  # What can't be shown must not hide an error.
        return f"<{type(value).__name__}>"


def _number(variable: keras.Variable) -> str:
    from tf_effopt.state.tensors import outside_of_graphs

    with outside_of_graphs():  # Its value now, also while a graph is traced.
        return f"{float(keras.ops.convert_to_numpy(variable)):g}"


def _value(thing: Any, name: str) -> Any:
    try:
        if name == "learning_rate":  # Not the property, which calls a schedule.
            return thing._learning_rate
        value = getattr(thing, name)
    except Exception:  # noqa: BLE001  # It isn't made yet.
        return MISSING
    if name == "name" and isinstance(value, str) and is_automatic(value, type(thing)):
        return None
    return value


def _defaults(cls: type | None) -> dict[str, Any]:
    if cls is None:
        return {}
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {
        x.name: None if x.name == "name" else x.default
        for x in parameters
        if x.name in constructor_arguments(cls)
    }


def _is_same(value: Any, default: Any) -> bool:
    if value is default:
        return True
    # Of None or an empty tuple a constructor makes an empty list.
    if default in (None, ()) and isinstance(value, list | tuple) and not value:
        return True
    try:
        return type(value) in (type(default), int, float) and bool(
            np.all(value == default)
        )
    except Exception:  # noqa: BLE001
        return False


def with_a_word_for_tf_keras(optimizer: Any) -> str:
    """The text of an optimizer; inside of an error of tf_keras, with what is wrong.

    `compile` of a tf_keras model says no more than that it can't interpret it.
    """
    caller = sys._getframe(2).f_globals.get("__name__", "")
    if caller.partition(".")[0] != "tf_keras":
        return repr(optimizer)
    return (
        f"{optimizer!r}. It is an optimizer for Keras 3, and this model one of tf_keras, "
        "the legacy Keras 2: make the model with Keras 3 (`import keras`; with "
        "`tf.keras`, without the environment variable TF_USE_LEGACY_KERAS)"
    )
