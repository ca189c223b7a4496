"""Which methods of Keras's optimizers a subclass may override.

An update here isn't made of Keras's hooks: it is one compiled program of a rule and
the stages around it. A hook that nothing calls would be ignored silently, so that a
class or an instance that has its own is refused, with the way to do it here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import keras

from tf_effopt.hyperparameters import Hyperparameter, LearningRate

_RULE = (
    "write the update as a rule: `rule = staticmethod(my_rule)`, see "
    "`tf_effopt.Optimizer`; to scale or change the step of an existing one, pass a "
    "`tf_effopt.transforms.Transform` with `after`"
)
_GRADIENT = (
    "change gradients by a `tf_effopt.transforms.Transform` with `before`, or override "
    "`apply`"
)
_DECAY = (
    "choose the variables by `exclude_from_weight_decay` or by a `tf_effopt.Group`; a "
    "rule that takes `weight_decay` decays by itself"
)
_WRITE = (
    "the compiled update writes the weights: change the step by a "
    "`tf_effopt.transforms.Transform` with `after`, limit a weight by the "
    "`constraint` of its layer"
)
_SLOTS = "declare the state in the class: `slots = tf_effopt.rules.Slots(m='momentum')`"
_AVERAGE = (
    "the average is part of the compiled update (`use_ema`, `ema_momentum`, "
    "`ema_overwrite_frequency`); at the end of training `finalize_variable_values` "
    "is called"
)
_ALL_REDUCE = (
    "the gradients are summed over replicas before the compiled update; change them "
    "by a `tf_effopt.transforms.Transform` with `before`"
)
_APPLY = "override `apply`, which calls `super().apply(grads, trainable_variables)`"
_COUNT = "the number of the update reaches a rule as its argument `t`"

# Methods of `keras.optimizers.Optimizer`, on any backend, that no update calls, and
# what to do instead.
IGNORED = {
    "update_step": _RULE,
    "_backend_apply_gradients": _RULE,
    "_backend_update_step": _RULE,
    "_distributed_tf_update_step": _RULE,
    "_backend_reset_gradient_accumulators": _APPLY,
    "_backend_increment_gradient_accumulators": _APPLY,
    "_backend_maybe_overwrite_model_variables": _AVERAGE,
    "_update_model_variables_moving_average": _AVERAGE,
    "_overwrite_model_variables_with_average_value": _AVERAGE,
    "_all_reduce_sum_gradients": _ALL_REDUCE,
    "_filter_empty_gradients": _GRADIENT,
    "_clip_gradients": _GRADIENT,
    "_clip_by_norm": _GRADIENT,
    "_apply_weight_decay": _DECAY,
    "_use_weight_decay": _DECAY,
    "_is_excluded_from_weight_decay": _DECAY,
    "assign": _WRITE,
    "assign_add": _WRITE,
    "assign_sub": _WRITE,
    "add_optimizer_variables": _SLOTS,
    "_check_variables_are_known": _APPLY,
    "iterations": _COUNT,
}
# Those that are called, by an update here or by Keras's trainer, callbacks and saving.
CALLED = frozenset(
    {
        "__init__",
        "__new__",
        "__reduce__",
        "__setattr__",
        "_check_super_called",
        "_get_current_learning_rate",
        "_get_variable_index",
        "_obj_type",
        "_overwrite_variable_with_gradient",
        "_overwrite_variables_directly_with_gradients",
        "_track_variable",
        "_unpickle_model",
        "_untrack_variable",
        "_var_key",
        "add_variable",
        "add_variable_from_reference",
        "apply",
        "apply_gradients",
        "build",
        "exclude_from_weight_decay",
        "finalize_variable_values",
        "from_config",
        "get_config",
        "learning_rate",
        "load_own_variables",
        "save_own_variables",
        "scale_loss",
        "set_weights",
        "stateless_apply",
        "variables",
    }
)
# Methods of `keras.optimizers.LossScaleOptimizer` that ours doesn't call.
IGNORED_BY_LOSS_SCALE = {
    name: _APPLY
    for name in (
        "_common_apply",
        "_stateful_handle_finite_grads",
        "_stateful_handle_non_finite_grads",
        "_stateless_handle_finite_grads",
        "_stateless_handle_non_finite_grads",
        "_tf_apply",
        "_unscale_grads",
        "check_finite",
    )
}
# What a class declares, and `build` reads once.
DECLARED = (
    "rule",
    "slots",
    "model_rule",
    "upkeep",
    "evaluation",
    "elementwise",
    "part",
    "parts",
    "owners",
    "before",
    "after",
    "decides",
    "where",
    "function",
)
# Of the optimizer inside a wrapper, which calls `apply` and nothing else of an update.
PASSED_BY_WRAPPERS = ("apply_gradients", "scale_loss")


def keras_bases() -> frozenset[type]:
    """The bases of Keras's optimizers, whose methods are the defaults."""
    return frozenset(keras.optimizers.Optimizer.__mro__)


def check_class(cls: type, own: tuple[type, ...], ignored: dict[str, str]) -> None:
    """Refuses methods that would be ignored, and settings that can't be.

    Args:
        cls: a subclass of an optimizer of this package.
        own: the classes of this package that may have such methods.
        ignored: their names, each with what to do instead.

    Raises:
        TypeError: the class, or a mixin, has such a method or setting.
    """
    check_hyperparameters(cls)
    pristine = keras_bases() | set(own)
    for name, instead in (ignored | _of_namesakes(cls)).items():
        owner = _owner(cls, name)
        if owner is not None and owner not in pristine:
            raise TypeError(_refusal(f"{owner.__name__}.{name}", name, instead))
    rate = inspect.getattr_static(cls, "learning_rate")
    if not hasattr(rate, "__get__"):
        raise TypeError(
            f"`learning_rate` of {cls.__name__} is a property, which the update reads. "
            f"Received: learning_rate = {rate!r} in the class, by which it couldn't "
            "change any more. Pass `super().__init__(learning_rate=...)`."
        )


def check_hyperparameters(cls: type) -> None:
    """Refuses a class that has something else in the place of a hyperparameter.

    Raises:
        TypeError: the update wouldn't see it.
    """
    for name, kind in _replaced_hyperparameters(cls):
        raise TypeError(
            f"`{name}` of {cls.__name__} is a hyperparameter, checked when it is set "
            f"and passed to the compiled update. Received: {name} = {kind!r} in the "
            "class, which would be ignored. For another default, pass "
            f"`super().__init__(..., {name}=...)`; for another range, replace it by "
            "another `tf_effopt.hyperparameters.Hyperparameter`; for a number that "
            f"changes while training, assign `optimizer.{name} = ...` in a callback."
        )


def check_instance(optimizer: Any, ignored: dict[str, str]) -> None:
    """Refuses what was put into an instance past its `__setattr__`."""
    for name in optimizer.__dict__.keys() & ignored.keys():
        raise TypeError(_refusal(f"optimizer.{name}", name, ignored[name]))


def check_assignment(owner: Any, name: str, ignored: dict[str, str]) -> None:
    """Refuses an attribute of an instance that nothing would read.

    Raises:
        AttributeError: it is such a method, or a declaration that was read already.
    """
    if name in ignored:
        raise AttributeError(_refusal(f"optimizer.{name}", name, ignored[name]))
    if name in DECLARED and hasattr(type(owner), name) and owner.__dict__.get("built"):
        raise AttributeError(
            f"`{name}` can't change after the optimizer was built: the compiled update "
            f"holds it. Set it in a subclass of {type(owner).__name__}, or before "
            "`build`."
        )


def overrides(optimizer: Any, name: str, default: type) -> bool:
    """Whether a method isn't that of this class of ours."""
    if name in optimizer.__dict__:
        return True
    return getattr(type(optimizer), name) is not getattr(default, name)


def check_inner(optimizer: Any, default: type) -> None:
    """Refuses hooks of an optimizer that a wrapper around it wouldn't call."""
    for name in PASSED_BY_WRAPPERS:
        if overrides(optimizer, name, default):
            raise ValueError(
                f"{type(optimizer).__name__} has its own `{name}`, which a wrapper "
                "around it doesn't call: override `apply` in it, which is called, or "
                f"`{name}` in a subclass of the wrapper. Received: "
                f"inner_optimizer={optimizer!r}"
            )


def _refusal(what: str, name: str, instead: str) -> str:
    return (
        f"`{what}` would be ignored: no update here calls Keras's `{name}`. Instead, "
        f"{instead}."
    )


def _owner(cls: type, name: str) -> type | None:
    """The class that a name comes from."""
    return next((base for base in cls.__mro__ if name in vars(base)), None)


def _of_namesakes(cls: type) -> dict[str, str]:
    """Methods of Keras's class of the same name that ours doesn't have.

    Whoever puts our `Muon` in the place of Keras's may have overridden one.
    """
    found = {}
    for base in cls.__mro__:
        namesake = getattr(keras.optimizers, base.__name__, None)
        if base.__module__.partition(".")[0] != "tf_effopt" or namesake is None:
            continue
        for name, value in vars(namesake).items():
            is_hook = callable(value) and not name.startswith("__")
            if is_hook and name not in CALLED and not hasattr(base, name):
                found[name] = _RULE
    return found


def _replaced_hyperparameters(cls: type) -> Iterator[tuple[str, Any]]:
    seen: set[str] = set()
    for i, base in enumerate(cls.__mro__):
        for name, value in vars(base).items():
            if name in seen:
                continue
            seen.add(name)
            if isinstance(value, Hyperparameter):
                continue
            later = [vars(x).get(name) for x in cls.__mro__[i + 1 :]]
            if any(isinstance(x, LearningRate) for x in later):
                continue  # A property is read; `check_class` refuses what isn't.
            if any(isinstance(x, Hyperparameter) for x in later):
                yield name, value
