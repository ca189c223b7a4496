"""Reads the golden traces of `golden/`, for tests to hold a rule against."""

from __future__ import annotations

import json
import pathlib
from dataclasses import dataclass
from typing import Any

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "golden"
TRACE_NAMES = sorted(path.stem for path in FOLDER.glob("*.npz"))


@dataclass(frozen=True)
class Trace:
    """One trace of `n` tensors over some steps.

    Attributes:
        name: of the file.
        class_name: of our optimizer.
        settings: its arguments, the first learning rate among them.
        provenance: `package`, `version`, `reference` (what was called),
            `arguments` (its), `dtype` and `notes`.
        learning_rates: `(steps,)`.
        weights: the initial ones, `n` float64 arrays.
        gradients: for each step a list of `n` float64 arrays, values that fit
            in float32.
        after: for each step the `n` weights after it, float64.
        evaluated: for each step the `n` weights to evaluate at; empty where
            they are those of `after`.
        slots: for each tensor its state at the end: name -> array, by Keras's
            names where Keras has the rule. A name `basis_...` is of a matrix
            whose columns are right up to their signs.
        totals: for each model-wide number its value after each step.
    """

    name: str
    class_name: str
    settings: dict[str, Any]
    provenance: dict[str, Any]
    learning_rates: np.ndarray
    weights: list[np.ndarray]
    gradients: list[list[np.ndarray]]
    after: list[list[np.ndarray]]
    evaluated: list[list[np.ndarray]]
    slots: list[dict[str, np.ndarray]]
    totals: dict[str, np.ndarray]


def load_trace(name: str) -> Trace:
    """The trace of that name, one of `TRACE_NAMES`."""
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = dict(file)
    config = json.loads(arrays["config"].item())
    n = sum(key.startswith("weight/") for key in arrays)

    def by_step(kind: str) -> list[list[np.ndarray]]:
        columns = [arrays[f"{kind}/{i}"].astype("float64") for i in range(n)]
        return [list(row) for row in zip(*columns, strict=True)]

    def below(prefix: str) -> dict[str, np.ndarray]:
        return {
            key.removeprefix(prefix): value
            for key, value in arrays.items()
            if key.startswith(prefix)
        }

    return Trace(
        name=name,
        class_name=config["class_name"],
        settings=config["arguments"],
        provenance=json.loads(arrays["provenance"].item()),
        learning_rates=arrays["learning_rates"],
        weights=[arrays[f"weight/{i}"].astype("float64") for i in range(n)],
        gradients=by_step("gradient"),
        after=by_step("after"),
        evaluated=by_step("evaluated") if "evaluated/0" in arrays else [],
        slots=[below(f"slot/{i}/") for i in range(n)],
        totals=below("total/"),
    )
