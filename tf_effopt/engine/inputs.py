"""What a step has to work with on one device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import keras
from keras import ops, tree

from tf_effopt.engine.arguments import Arguments
from tf_effopt.engine.plan import (
    RULE,
    Bound,
    BoundStage,
    Pairs,
    Plan,
    Scalars,
    TrainedVariable,
)
from tf_effopt.engine.sparse import SparseRows
from tf_effopt.state import precision, random


@dataclasses.dataclass
class Inputs:
    """What a step has to work with on one device.

    Attributes:
        state: for each variable a dict of tensors: `weight`, and under the key of the
            rule and of each stage a dict of its slots.
        gradients: for each variable a dense tensor, `SparseRows`, or None (only
            its average moves).
        scalars: the numbers of this step.
        totals: phase -> sums over all devices, those known so far; what is missing
            is measured here, where there is one device only.
        matrix_steps: what `matrices.matrix_steps` returns, if it is known; None
            where it is to be computed.
        proceeds: boolean, whether the step is taken, if the update is to ask; None
            where the whole update is in one branch.
        stacks_matrices: whether large matrices of one shape are multiplied as
            a stack. Otherwise, and that is faster on a CPU, each is alone.
    """

    plan: Plan
    variables: list[TrainedVariable]
    state: list[dict]
    gradients: list[Any]
    scalars: Scalars
    totals: dict[str, dict[str, Any]] | None = None
    matrix_steps: dict[int, tuple[Any, dict]] | None = None
    proceeds: Any = None
    stacks_matrices: bool = True

    def __post_init__(self) -> None:
        # Here, outside of all branches: what is made in one can't be used outside.
        pairs = Pairs.of(self.scalars.pairs)
        self.scalars = dataclasses.replace(self.scalars, pairs=pairs)

    @property
    def scalar_dtype(self) -> str:
        return self.scalars.pairs.dtype

    @property
    def t(self) -> Any:
        """The number of this update, from 1."""
        return self.plan.update_number(self.scalars.iterations)

    def total(self, phase: str, sums: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The sums of a phase over all devices."""
        known = self.totals or {}
        return known[phase] if phase in known else sums()

    def of_step(self, proceed: Any) -> Inputs:
        """The same for a step in which no variable has a gradient unless it proceeds."""
        present = [ops.logical_and(proceed, x) for x in self.scalars.present]
        scalars = dataclasses.replace(self.scalars, present=present)
        return dataclasses.replace(self, scalars=scalars, proceeds=proceed)

    def is_present(self, i: int) -> Any:
        """Whether a variable has a gradient, if that is known at run time only; or None."""
        return None if self.scalars.present is None else self.scalars.present[i]

    def if_present(self, i: int, new: Any, old: Any) -> Any:
        """Nested tensors: `new`, or `old` where a variable has no gradient."""
        is_present = self.is_present(i)
        if is_present is None:
            return new
        return tree.map_structure(lambda x, y: ops.where(is_present, x, y), new, old)

    def seen(self, gradients: list[Any]) -> list[Any]:
        """The gradients of a list that are there, to be looked at: 0 for stand-ins."""
        found = []
        for i, g in enumerate(gradients):
            if g is None:
                continue
            g = g.unique if isinstance(g, SparseRows) else g
            is_present = self.is_present(i)
            if is_present is not None:
                g = ops.where(is_present, g, ops.zeros_like(g))
            found.append(g)
        return found

    def _count(self, v: TrainedVariable) -> Any:
        """The number of this update of a variable, or of each in a stack."""
        t, missed = self.t, self.scalars.missed
        if missed is None:
            return t
        if not v.is_stack:
            return t - ops.cast(missed[v.index], t.dtype)
        missed = ops.stack([missed[i] for i in v.members])
        missed = ops.reshape(missed, (-1,) + (1,) * (len(v.shape) - 1))
        return t - ops.cast(missed, t.dtype)

    def slots(
        self, v: TrainedVariable, tensors: dict, key: str = RULE
    ) -> dict[str, Any]:
        """The slots of a variable in the dtype of the arithmetic.

        Before the variable's first update those that start at the weight are the
        weight of now: it may have been loaded after `build`, or had no value then.

        Args:
            v: the variable.
            tensors: its state.
            key: of the rule or stage whose slots they are.
        """
        kept = tensors.get(key, {})  # A stage without slots has no entry.
        slots = {k: ops.cast(x, v.compute_dtype) for k, x in kept.items()}
        for of, symbol in v.starts_at_weight:
            if of == key:
                w = ops.cast(tensors["weight"], v.compute_dtype)
                slots[symbol] = ops.where(self._count(v) == 1, w, slots[symbol])
        return slots


def kept(slots: dict, variables: dict, bits: Any = None) -> dict[str, Any]:
    """Slots in the dtypes in which they are kept.

    Args:
        slots: in the dtype of the arithmetic.
        variables: those before, by which the dtypes go.
        bits: random ones, to round stochastically what is narrower.
    """
    return {
        symbol: precision.store(
            slots[symbol], keras.backend.standardize_dtype(x.dtype), bits
        )
        for symbol, x in variables.items()
    }


def run_stage(
    inputs: Inputs,
    stage: BoundStage,
    v: TrainedVariable,
    x: Any,
    tensors: dict,
    arguments: Arguments,
    before: dict | None = None,
    **further: Any,
) -> tuple[Any, dict]:
    """What a stage makes of one tensor, and its next slots.

    Args:
        inputs, arguments: of the step.
        stage, v: what runs, and on which variable.
        x: the tensor that it changes.
        tensors: the variable's state, in which the weight is the function's `w`.
        before: the state whose slots it gets, if that is another one.
        **further: arguments besides those of each stage.
    """
    given = arguments.for_stage(v, stage.owner)
    given |= own_arguments(v, tensors, stage.function, arguments) | further
    slots = inputs.slots(v, tensors if before is None else before, stage.key)
    return stage(x, slots, arguments=given)


def own_arguments(
    v: TrainedVariable, tensors: dict, function: Bound | None, arguments: Arguments
) -> dict[str, Any]:
    """What `function` takes that is of one variable."""
    own: dict[str, Any] = {}
    if function is None:
        return own
    if "w" in function.names:
        own["w"] = ops.cast(tensors["weight"], v.compute_dtype)
    if "noise" in function.names:
        own["noise"] = functools.partial(
            random.normal, v.shape, arguments.t, v.index, v.compute_dtype
        )
    if "input_axes" in function.names:
        own["input_axes"] = v.input_axes
    return own
