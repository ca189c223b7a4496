"""What became of each variable of an optimizer, as a table to print."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np

from tf_effopt.groups import frozen_indices
from tf_effopt.paths import path_of

HEADER = ("variable", "shape", "rule", "learning rate", "weight decay")


def described(optimizer: Any) -> str:
    """One line for each variable that a built optimizer trains."""
    rows = [HEADER, *(_row(optimizer, i) for i in range(len(_variables(optimizer))))]
    columns = [x for x in zip(*rows, strict=True) if any(x[1:])]
    widths = [max(map(len, column)) for column in columns]
    table = "\n".join(
        "  ".join(
            cell.ljust(width) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in zip(*columns, strict=True)
    )
    names = not_finite(optimizer) if optimizer.skipped_steps else []
    return "\n".join([table, *(f"not finite: {name}" for name in names)])


def not_finite(optimizer: Any) -> list[str]:
    """The weights and the optimizer's own variables with an infinity or a NaN.

    It reads all of them: for after a step was skipped.
    """
    variables = [*_variables(optimizer), *optimizer.variables]
    return [path_of(v) for v in variables if not _is_finite(v)]


def _is_finite(variable: Any) -> bool:
    values = keras.ops.convert_to_numpy(variable).astype("float64")
    return bool(np.all(np.isfinite(values)))


def _variables(optimizer: Any) -> list[Any]:
    return optimizer._trainable_variables


def _row(optimizer: Any, index: int) -> tuple[str, ...]:
    engine = optimizer._engine
    weight, v = _variables(optimizer)[index], engine.variables[index]
    start = path_of(weight), str(tuple(weight.shape))

    def value(owner: int, name: str) -> float:
        return getattr(engine.owners[owner], name)

    if index in frozen_indices(optimizer.groups):
        return (*start, "" if v is None else v.part, "frozen", "-")
    if v is None:
        return (*start, "", "is set to its gradient", "-")
    multiplier = math.prod(value(*place) for place in v.learning_rate_multipliers)
    decay = "-" if v.decay is None else f"{value(*v.decay):g}"
    return (*start, v.part, f"x {multiplier:g}", decay)
