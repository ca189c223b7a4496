"""At `build`: whether something provides what functions ask for by name.

Which numbers a `model_rule` returns is seen only when it runs. So where a function asks
for one, a step with zeros is tried on one variable of each kind, without compiling.
"""

from __future__ import annotations

from typing import Any

from keras import ops, tree

from tf_effopt.engine import stages
from tf_effopt.engine.inputs import Inputs
from tf_effopt.engine.plan import (
    Bound,
    Plan,
    Scalars,
    TrainedVariable,
    UnknownArgument,
    smallest_of_each,
)
from tf_effopt.engine.sent import sent
from tf_effopt.state.variables import dtype_name, shape_of


def check_names(
    plan: Plan,
    variables: list[TrainedVariable | None],
    state: list[dict | None],
    model_state: dict[int, dict[str, Any]],
) -> None:
    """Raises an error if a function asks for what nothing provides.

    Raises:
        UnknownArgument: it does.
    """
    trained = [v for v in variables if v is not None]
    functions = [*(v.rule for v in trained), *plan.functions()]
    if not any(map(_may_be_misspelt, functions)):
        return
    smallest = smallest_of_each(trained, lambda v: (id(v.rule), v.stages))
    chosen = [trained[i] for i in smallest.values()]
    dtypes = {v.compute_dtype for v in trained}
    dtype = "float64" if "float64" in dtypes else "float32"
    scalars = Scalars(
        ops.zeros((), "int32"),
        ops.zeros((), dtype),
        ops.zeros((len(plan.numbers), 2), dtype),
        tree.map_structure(lambda _: ops.zeros((), dtype), model_state),
    )
    zeros = [
        tree.map_structure(
            lambda x: ops.zeros(shape_of(x), dtype_name(x)), state[v.index]
        )
        for v in chosen
    ]
    gradients = [ops.zeros(v.shape, v.compute_dtype) for v in chosen]
    inputs = Inputs(plan, chosen, zeros, gradients, scalars)
    try:
        sent(inputs)
        stages.run_without_branch(inputs)
    except UnknownArgument:
        raise
    except Exception:  # noqa: BLE001  # The first step raises it, with its values.
        return


def _may_be_misspelt(bound: Bound) -> bool:
    """Whether it asks for what isn't known at build; this package's are tested."""
    is_ours = (bound.function.__module__ or "").startswith("tf_effopt.")
    return bool(bound.of_model) and not is_ours
