"""Rules of matrices: tensors of one shape go through their rule together."""

from __future__ import annotations

import math
from typing import Any

from keras import ops

from tf_effopt.engine.inputs import Inputs, in_compute_dtype
from tf_effopt.engine.plan import Arguments
from tf_effopt.rules import Matrices


class View:
    """A tensor of a shape as `(n, inputs, outputs)`, and back."""

    def __init__(self, shape: tuple[int, ...], matrices: Matrices):
        self.shape = shape
        self.split = tuple(matrices.split or shape)
        counted = set(range(len(self.split))) - {*matrices.inputs, *matrices.outputs}
        self.order = (*sorted(counted), *matrices.inputs, *matrices.outputs)
        self.sizes = tuple(self.split[axis] for axis in self.order)
        rows = math.prod(self.split[axis] for axis in matrices.inputs)
        columns = math.prod(self.split[axis] for axis in matrices.outputs)
        self.count = math.prod(self.split[axis] for axis in counted)
        self.matrix = (rows, columns)

    def to_matrices(self, x: Any) -> Any:
        x = ops.transpose(ops.reshape(x, self.split), self.order)
        return ops.reshape(x, (self.count, *self.matrix))

    def from_matrices(self, x: Any) -> Any:
        back = tuple(self.order.index(axis) for axis in range(len(self.order)))
        x = ops.transpose(ops.reshape(x, self.sizes), back)
        return ops.reshape(x, self.shape)


def matrix_steps(
    inputs: Inputs, state: list[dict], gradients: list[Any], arguments: Arguments
) -> dict[int, tuple[Any, dict]]:
    """Position -> `(delta, slots)`, for the variables that have matrices."""
    alike: dict[tuple, list[int]] = {}
    views = {}
    for i, (v, g) in enumerate(zip(inputs.variables, gradients, strict=True)):
        if v.matrices is not None and g is not None:
            views[i] = View(v.shape, v.matrices)
            numbers = v.learning_rate_multipliers, v.decay
            key = id(v.rule), views[i].matrix, v.compute_dtype, numbers
            alike.setdefault(key, []).append(i)
    steps = {}
    for members in alike.values():
        steps |= _together(inputs, members, views, state, gradients, arguments)
    return steps


def _together(
    inputs: Inputs,
    members: list[int],
    views: dict[int, View],
    state: list[dict],
    gradients: list[Any],
    arguments: Arguments,
) -> dict[int, tuple[Any, dict]]:
    """The rule once, for variables that are trained alike."""
    first = inputs.variables[members[0]]
    slots = [in_compute_dtype(inputs.variables[i], state[i]["slots"]) for i in members]

    def stacked(tensors: list[Any]) -> Any:
        parts = [
            views[i].to_matrices(x) if tuple(x.shape) == views[i].shape else x
            for i, x in zip(members, tensors, strict=True)
        ]
        return parts[0] if len(parts) == 1 else ops.concatenate(parts, axis=0)

    mine = arguments.for_variable(first)
    if "w" in first.rule.names:
        weights = [state[i]["weight"] for i in members]
        mine |= {"w": stacked([ops.cast(w, first.compute_dtype) for w in weights])}
    delta, after = first.rule(
        stacked([gradients[i] for i in members]),
        {letter: stacked([x[letter] for x in slots]) for letter in slots[0]},
        arguments=mine,
    )
    steps, start = {}, 0
    for i, before in zip(members, slots, strict=True):
        end = start + views[i].count
        steps[i] = (
            views[i].from_matrices(delta[start:end]),
            {
                letter: views[i].from_matrices(x[start:end])
                if tuple(before[letter].shape) == views[i].shape
                else x[start:end]
                for letter, x in after.items()
            },
        )
        start = end
    return steps
