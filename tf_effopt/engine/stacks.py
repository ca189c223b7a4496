"""For a TPU: small tensors that are trained alike, updated as one.

On a TPU an operation has a cost of its own, however small its tensors, and a model has
many vectors: biases, and the scales and offsets of its normalizations. Those of
one shape that are trained alike go through the stages as a stack. All stages but the
rule look at each element alone; the rule is mapped over the members.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable
from typing import Any

from keras import ops, tree

from tf_effopt.engine.inputs import Inputs
from tf_effopt.engine.plan import Plan, TrainedVariable
from tf_effopt.engine.sparse import SparseRows
from tf_effopt.state import precision

SMALL = 8192  # elements, at most; what is larger gains nothing


class Stacks:
    """The inputs of a step with small tensors stacked.

    Attributes:
        inputs: to be given to the stages in the place of those of the constructor.
    """

    def __init__(self, inputs: Inputs):
        alike: dict[Hashable, list[int]] = {}
        each = zip(inputs.variables, inputs.gradients, strict=True)
        for i, (v, g) in enumerate(each):
            alike.setdefault(_kind(inputs.plan, v, g) or i, []).append(i)
        self._groups = list(alike.values())
        self.inputs = dataclasses.replace(
            inputs,
            variables=[_one(inputs.variables, group) for group in self._groups],
            state=[_stacked(inputs.state, group) for group in self._groups],
            gradients=[_stacked(inputs.gradients, group) for group in self._groups],
            matrix_steps=self._at_new_places(inputs.matrix_steps),
        )

    def _at_new_places(self, steps: dict[int, Any] | None) -> dict[int, Any] | None:
        if steps is None:
            return None
        firsts = [group[0] for group in self._groups]
        return {place: steps[i] for place, i in enumerate(firsts) if i in steps}

    def apart(self, state: list[dict]) -> list[dict]:
        """The state of each variable, out of that of the stacks."""
        own: dict[int, dict] = {}
        for group, tensors in zip(self._groups, state, strict=True):
            for place, i in enumerate(group):
                own[i] = tensors if len(group) == 1 else _at(place, tensors)
        return [own[i] for i in range(len(own))]


def _kind(plan: Plan, v: TrainedVariable, g: Any) -> Hashable | None:
    """What a stack's members have in common; None for what is to stay alone."""
    measures = plan.model is not None and plan.model.measure is not None
    looks_at_whole_tensors = (
        plan.upkeep is not None
        or measures
        or (plan.evaluation is not None and not plan.elementwise)
        or any(x.key in v.stages and not x.elementwise for x in plan.stages)
        or v.constraint is not None
        or v.matrices is not None
    )
    draws = "noise" in v.rule.names or precision.is_narrow(v.dtype)
    is_dense = g is not None and not isinstance(g, SparseRows)
    if looks_at_whole_tensors or draws or not is_dense or math.prod(v.shape) > SMALL:
        return None
    alike = v.learning_rate_multipliers, v.decays, v.decay, v.stages
    return v.shape, v.dtype, str(g.dtype), id(v.rule), *alike


def _one(variables: list[TrainedVariable], group: list[int]) -> TrainedVariable:
    first = variables[group[0]]
    if len(group) == 1:
        return first
    shape = len(group), *first.shape
    members = tuple(variables[i].index for i in group)
    return dataclasses.replace(first, shape=shape, is_stack=True, members=members)


def _stacked(nested: list[Any], group: list[int]) -> Any:
    if len(group) == 1:
        return nested[group[0]]
    return tree.map_structure(lambda *x: ops.stack(x), *(nested[i] for i in group))


def _at(place: int, tensors: dict) -> dict:
    return tree.map_structure(lambda x: x[place], tensors)
