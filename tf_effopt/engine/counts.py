"""How many updates each variable has had.

One count of the whole model is kept in the state, `iterations`. What a variable missed
of it, since it joined later or had no gradient, is kept beside it: a vector of
integers, `missed`, with one element for each variable, almost always all 0. So bias
correction counts the updates of the variable that it corrects, as in PyTorch.

The numbers that follow from a count, such as a bias correction, are made once, for the
vector of all counts: a rule names them in a `ModelRule` with `each_count=True`. On
TensorFlow that happens before the compiled program, which gets them one by one; see
`Program`. A rule may ask for `t` itself, too; then compiling takes longer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

from tf_effopt.hyperparameters import Decay, EachCount

# The record of what variables missed, in files and checkpoints; only if they differ.
MISSED = "missed_updates"


def uses_counts(plan: Any, variables: list[Any]) -> bool:
    """Whether anything in a plan depends on a variable's count."""
    if any(v is not None and v.starts_at_weight for v in variables):
        return True
    if plan.upkeep is not None and "counts" in plan.upkeep.names:
        return True
    asks = any(v is not None and "t" in v.rule.names for v in variables)
    return follows_variables(plan) and (
        asks or (plan.model is not None and plan.model.each_count)
    )


def follows_variables(plan: Any) -> bool:
    """Whether `t` in a rule is the variable's count, not that of the model."""
    return plan.model is None or plan.model.each_count


def missed_updates(
    updates: int, before: int, missed: np.ndarray, places: list[int | None]
) -> np.ndarray:
    """What variables have missed after `updates`, given where they were before.

    Args:
        updates: of the whole model, by the count that goes on.
        before: the same by the optimizer that they were in.
        missed: what the variables of that optimizer had missed.
        places: for each variable its place in it, or None for one that starts anew.
    """
    return np.array(
        [updates if i is None else updates - (before - missed[i]) for i in places],
        "int64",
    )


class Counts:
    """The counts of all variables in one step, or one branch of it.

    Args:
        t: integer, the number of this update of the model, from 1.
        missed: integers, what each variable missed.
    """

    def __init__(self, t: Any, missed: Any):
        self.vector = t - ops.cast(ops.convert_to_tensor(missed), t.dtype)
        self._each: dict[str, EachCount] = {}

    def each(self, dtype: str) -> EachCount:
        """The counts in a dtype, as a vector and one by one."""
        if dtype not in self._each:
            self._each[dtype] = EachCount(ops.cast(self.vector, dtype))
        return self._each[dtype]


def numbers_of_each(
    model: Any, arguments: dict[str, Any], each: EachCount
) -> dict[str, list[Any]]:
    """The numbers of a model rule that follows each variable's count, one by one."""
    vectors, _ = model.rule({}, {}, arguments=_plain(arguments) | {"t": each.vector})
    return {name: ops.unstack(x) for name, x in vectors.items()}


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """Decay rates that know no counts: here powers are of the vector itself."""
    return {
        name: Decay(x.value, x.complement) if isinstance(x, Decay) else x
        for name, x in arguments.items()
    }
