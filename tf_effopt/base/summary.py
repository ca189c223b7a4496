"""The variables of an optimizer, as a table to print."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from tf_effopt.base import legacy_keras
from tf_effopt.base.checks import checked_variables
from tf_effopt.base.groups import decay_of, frozen_indices, multipliers_of
from tf_effopt.base.selection import Trained
from tf_effopt.state.variables import path_of, resolve_renamed, shape_of

HEADER = ("variable", "shape", "rule", "learning rate", "weight decay")


def described(optimizer: Any, of: Any = None) -> str:
    """One line for each variable that an optimizer trains, or would train.

    Args:
        optimizer: built or not.
        of: a model or variables; None: those that it was built on, or else those of the
            model that was compiled with it.
    """
    if of is None and optimizer.built:
        engine = optimizer._engine
        table = _table(_row(optimizer, i) for i in range(len(engine.variables)))
        names = not_finite(optimizer) if optimizer.skipped_steps else []
        return "\n".join([table, *(f"not finite: {name}" for name in names)])
    if of is None:
        models = compiled_with(optimizer)
        of = models[0] if len(models) == 1 else None
        if of is None or not of.trainable_variables:
            return f"{optimizer!r}\n{_why_no_table(models)}"
    legacy_keras.refuse(of)
    if isinstance(of, keras.layers.Layer):
        of = of.trainable_variables
    variables = checked_variables(of)
    return _table(_rows_before_build(optimizer, variables))


def compiled_with(optimizer: Any) -> list[keras.Model]:
    """The models that were compiled with an optimizer.

    Keras tells an optimizer nothing of its model before the first step.
    """
    models = []
    for thing in gc.get_objects():
        # By its type: some objects answer `isinstance` by importing something.
        if not issubclass(type(thing), keras.Model):
            continue
        found = thing.__dict__.get("optimizer")
        while found is not None and found is not optimizer:
            found = found.__dict__.get("inner_optimizer")
        if found is optimizer:
            models.append(thing)
    return models


def _why_no_table(models: list[keras.Model]) -> str:
    if len(models) > 1:
        names = ", ".join(repr(model.name) for model in models)
        return (
            f"The models {names} were compiled with it: `optimizer.describe(model)` "
            "shows the variables of one."
        )
    if models:
        return (
            f"{models[0].name!r} has no variables yet: call it on a batch, or give it "
            "an `Input`."
        )
    return (
        "It isn't built yet, so that its variables aren't known: "
        "`optimizer.describe(model)` shows those of a model."
    )


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    rows = [HEADER, *rows]
    columns = [x for x in zip(*rows, strict=True) if any(x[1:])]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join(
            cell.ljust(width) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in zip(*columns, strict=True)
    )


def not_finite(optimizer: Any) -> list[str]:
    """The weights and the optimizer's own variables with an infinity or a NaN.

    It reads all of them: for after a step was skipped.
    """
    variables = [*optimizer._trainable_variables, *optimizer.variables]
    return [path_of(v) for v in variables if not _is_finite(v)]


def _is_finite(variable: Any) -> bool:
    values = keras.ops.convert_to_numpy(variable).astype("float64")
    return bool(np.all(np.isfinite(values)))


def _row(optimizer: Any, index: int) -> tuple[str, ...]:
    engine = optimizer._engine
    v = engine.variables[index]
    frozen = index in frozen_indices(optimizer.groups)
    return _cells(
        optimizer._trainable_variables[index],
        frozen,
        None if v is None else v.part,
        () if v is None else v.learning_rate_multipliers,
        None if v is None else v.decay,
        engine.owners,
    )


def _rows_before_build(optimizer: Any, variables: list[Any]) -> list[tuple[str, ...]]:
    """The rows that `build` would make; no state is made for them."""
    known = resolve_renamed(variables, optimizer._built_on)
    trained = Trained(variables, [path for path, _ in known])
    copies = [group.copy({}) for group in optimizer.groups]
    for group in copies:
        group.find(trained)
    owners = [optimizer, *copies]
    numbered = list(enumerate(copies, 1))
    frozen = frozen_indices(tuple(copies))
    excluded = {i for of in optimizer._decay_exclusions.find(trained) for i in of}
    rows = []
    for i, (part, variable) in enumerate(
        zip(optimizer.parts(known), variables, strict=True)
    ):
        is_value = optimizer._overwrite_variable_with_gradient(variable)
        kind = getattr(type(optimizer), part.weight_decay)
        own = None
        if not kind.is_off(getattr(optimizer, part.weight_decay)):
            own = 0, part.weight_decay
        decay = None if i in excluded else decay_of(i, numbered) or own
        multipliers = multipliers_of(i, numbered)
        name = None if is_value else part.name
        rows.append(_cells(variable, i in frozen, name, multipliers, decay, owners))
    return rows


def _cells(
    variable: Any,
    is_frozen: bool,
    rule: str | None,
    multipliers: Iterable[tuple[int, str]],
    decay: tuple[int, str] | None,
    owners: list[Any],
) -> tuple[str, ...]:
    start = path_of(variable), str(shape_of(variable))
    if is_frozen:
        return (*start, rule or "", "frozen", "-")
    if rule is None:
        return (*start, "", "is set to its gradient", "-")

    def value(owner: int, name: str) -> float:
        return owners[owner].current(name)

    multiplier = math.prod(value(*place) for place in multipliers)
    return (
        *start,
        rule,
        f"x {multiplier:g}",
        "-" if decay is None else f"{value(*decay):g}",
    )
