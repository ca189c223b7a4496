"""Rules of matrices: tensors of one shape go through their rule together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from tf_effopt.engine.arguments import Arguments
from tf_effopt.engine.inputs import Inputs
from tf_effopt.rules import Matrices

LARGE = 256 * 256  # elements of a matrix whose products keep a CPU busy
# Elements of a stack: what is between its products stays in a TPU's vector memory.
MOST_STACKED = 2 * 2**20


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


@dataclasses.dataclass(frozen=True)
class Share:
    """Which matrices one of several replicas works on.

    Attributes:
        replica: its number, an integer or a scalar tensor.
        replicas: how many there are.
    """

    replica: Any
    replicas: int

    def of(self, function: Callable, count: int) -> Callable:
        """`function` of nested stacks of `count`, with zeros for other shares.

        The sum of what all replicas get is what one gets of all.
        """
        size = -(-count // self.replicas)
        place = ops.arange(count) - self.replica * size  # in this replica's share
        mine = ops.logical_and(place >= 0, place < size)
        numbers = ops.minimum(self.replica * size + ops.arange(size), count - 1)

        def cut(x: Any) -> Any:
            return ops.take(x, numbers, axis=0)

        def put(x: Any) -> Any:
            x = ops.take(x, ops.clip(place, 0, size - 1), axis=0)
            chosen = ops.reshape(mine, (count,) + (1,) * (len(x.shape) - 1))
            return ops.where(chosen, x, ops.zeros_like(x))

        def shared(*stacks: Any) -> Any:
            results = function(*(keras.tree.map_structure(cut, x) for x in stacks))
            return keras.tree.map_structure(put, results)

        return shared


def matrix_steps(
    inputs: Inputs,
    state: list[dict],
    gradients: list[Any],
    arguments: Arguments,
    share: Share | None = None,
) -> dict[int, tuple[Any, dict]]:
    """Position -> `(delta, slots)`, for the variables that have matrices."""
    alike: dict[tuple, list[int]] = {}
    views = {}
    stacks_all = inputs.stacks_matrices or share is not None
    for i, (v, g) in enumerate(zip(inputs.variables, gradients, strict=True)):
        if v.matrices is not None and g is not None:
            views[i] = View(v.shape, v.matrices)
            numbers = v.learning_rate_multipliers, v.decay
            key = id(v.rule), views[i].matrix, v.compute_dtype, numbers
            if math.prod(views[i].matrix) >= LARGE and not stacks_all:
                key += (i,)
            alike.setdefault(key, []).append(i)
    most = MOST_STACKED * (share.replicas if share is not None else 1)
    steps = {}
    for every in alike.values():
        for members in _stacks(every, views, most):
            steps |= _together(
                inputs, members, views, state, gradients, arguments, share
            )
    return steps


def _stacks(members: list[int], views: dict[int, View], most: int) -> list[list[int]]:
    """The members in order, as many in each stack as have at most `most` elements."""
    stacks: list[list[int]] = []
    size = 0
    for i in members:
        elements = math.prod(views[i].shape)
        if not stacks or size + elements > most:
            stacks.append([])
            size = 0
        stacks[-1].append(i)
        size += elements
    return stacks


def _counted(
    inputs: Inputs, members: list[int], views: dict[int, View], arguments: Arguments
) -> dict[str, Any]:
    """What follows from the counts, of shape `(n, 1, 1)`: each matrix has its own."""
    variables = [inputs.variables[i] for i in members]
    of_each = [arguments.counted(v, v.index) for v in variables]
    counts = [views[i].count for i in members]
    return {
        name: ops.concatenate(
            [
                ops.broadcast_to(own[name], (n, 1, 1))
                for own, n in zip(of_each, counts, strict=True)
            ]
        )
        for name in of_each[0]
    }


def _together(
    inputs: Inputs,
    members: list[int],
    views: dict[int, View],
    state: list[dict],
    gradients: list[Any],
    arguments: Arguments,
    share: Share | None,
) -> dict[int, tuple[Any, dict]]:
    """The rule once, for variables that are trained alike."""
    first = inputs.variables[members[0]]
    slots = [inputs.slots(inputs.variables[i], state[i]) for i in members]

    def stacked(tensors: list[Any]) -> Any:
        parts = [
            views[i].to_matrices(x) if tuple(x.shape) == views[i].shape else x
            for i, x in zip(members, tensors, strict=True)
        ]
        return parts[0] if len(parts) == 1 else ops.concatenate(parts, axis=0)

    def rule(g: Any, slots: dict, own: dict) -> tuple[Any, dict]:
        return first.rule(g, slots, arguments=arguments.for_variable(first) | own)

    own = {}
    if "w" in first.rule.names:
        weights = [state[i]["weight"] for i in members]
        own["w"] = stacked([ops.cast(w, first.compute_dtype) for w in weights])
    own |= _counted(inputs, members, views, arguments)
    if share is not None:
        rule = share.of(rule, sum(views[i].count for i in members))
    delta, after = rule(
        stacked([gradients[i] for i in members]),
        {symbol: stacked([x[symbol] for x in slots]) for symbol in slots[0]},
        own,
    )
    steps, start = {}, 0
    for i, before in zip(members, slots, strict=True):
        end = start + views[i].count
        steps[i] = (
            views[i].from_matrices(delta[start:end]),
            {
                symbol: views[i].from_matrices(x[start:end])
                if tuple(before[symbol].shape) == views[i].shape
                else x[start:end]
                for symbol, x in after.items()
            },
        )
        start = end
    return steps
