"""The stages of an update, in their order, as pure functions of tensors.

 1. all-reduce over replicas                      (before this, by the engine)
 2. repeated rows of a sparse gradient are summed (before this, by the engine)
 3. loss unscaling, and the finite check: a non-finite step changes nothing
 4. accumulation
 5. clipping; a global norm is that of all trained variables
 6. gradient transforms, in their order; one may skip the whole step
 7. each tensor's learning rate, then the rule; at the end of the update what a
    rule does for the slots of all tensors together
 8. update transforms, in their order
 9. decoupled weight decay, of the weight before the step
10. one rounding on write
11. constraints
12. averages, once per update

It is written with `keras.ops`, so that the same text runs eagerly, in a
graph, in one XLA program, and on Keras's JAX and PyTorch backends. It knows
no variable, device or strategy, and of a rule only its arguments.

Some stages need a number of all tensors: the gradient's norm, a sum that a
rule asks for. Where tensors are on several devices, each device first runs
`partial_sums` for each of `phases(plan)` in turn, and `step` gets the sums of
all devices as `totals`; on one device `step` does all of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from keras import ops, tree

from tf_effopt.engine.arguments import Arguments
from tf_effopt.engine.gradients import (
    GRADIENT,
    Transformed,
    accumulated,
    accumulators,
    measured_numbers,
    sum_of,
    unscaled,
)
from tf_effopt.engine.inputs import Inputs
from tf_effopt.engine.large import (
    CLIPPED,
    SHRUNK,
    LargeGradient,
    phases_after,
    phases_before,
)
from tf_effopt.engine.matrices import Share, matrix_steps
from tf_effopt.engine.plan import ACCUMULATION, OPTIMIZER, Plan
from tf_effopt.engine.stacks import Stacks
from tf_effopt.engine.updates import averaged, updated, upkept


@dataclasses.dataclass
class Outcome:
    """What became of a step.

    Attributes:
        finite: boolean, whether the gradient was finite, and is once it is clipped.
        counted: integer, how far the count of micro-steps advances.
        model: owner -> symbol -> the model's slots after this step.
    """

    finite: Any
    counted: Any
    model: dict[int, dict[str, Any]]


def phases(plan: Plan) -> list[str]:
    """The phases for which something is summed over all tensors, in order."""
    measured = [
        str(owner) for owner, model in plan.models() if model.measure is not None
    ]
    return [GRADIENT, *phases_before(plan), *measured, *phases_after(plan)]


def partial_sums(inputs: Inputs, phase: str) -> dict[str, Any]:
    """What this device's tensors add to a phase, given the phases before it."""
    if phase == GRADIENT:
        measured = measured_numbers(inputs, unscaled(inputs))
        return {"total": sum_of(measured, inputs.scalar_dtype)}
    prepared = Prepared(inputs)
    if phase == SHRUNK:
        return prepared.large.shrunk()
    if phase == CLIPPED:
        return prepared.large.clipped()
    return prepared.clipped().run(until=phase)


class Prepared:
    """Stages 3 to 6, up to the numbers of the rules.

    Attributes:
        gradients: in the dtype of the arithmetic, loss scaling undone.
        large: what is known of large gradients; None if nothing clips.
    """

    def __init__(self, inputs: Inputs):
        self.inputs = inputs
        self.gradients = unscaled(inputs)
        measured = measured_numbers(inputs, self.gradients)
        # Finite only if the whole gradient is.
        self._total = inputs.total(
            GRADIENT, lambda: {"total": sum_of(measured, inputs.scalar_dtype)}
        )["total"]
        self.large = None
        if inputs.plan.clips:
            self.large = LargeGradient(inputs, measured, self._total)

    def finite(self) -> Any:
        """Whether the gradient is, and fits once it is clipped."""
        finite = ops.isfinite(self._total)
        return finite if self.large is None else finite | self.large.fits()

    def clipped(self) -> Transformed:
        """Stages 4 and 5: the gradients to be transformed."""
        mean = accumulated(self.inputs, self.gradients)
        if self.large is None:
            return Transformed(self.inputs, mean)
        return self.large.transformed(mean)

    def transformed(self) -> Transformed:
        work = self.clipped()
        work.run()
        return work

    def arguments(self, work: Transformed) -> tuple[Arguments, dict]:
        """What the rules may ask for, and the model's next slots."""
        numbers, model = work.optimizer_numbers()
        arguments = Arguments(self.inputs.plan, self.inputs.scalars)
        arguments.numbers = work.arguments.numbers | {OPTIMIZER: numbers}
        return arguments, model


def matrix_share(inputs: Inputs, share: Share) -> dict[int, tuple[Any, dict]]:
    """What `matrix_steps` returns, with zeros for matrices of other replicas."""
    prepared = Prepared(inputs)
    work = prepared.transformed()
    arguments, _ = prepared.arguments(work)
    return matrix_steps(inputs, inputs.state, work.gradients, arguments, share)


def step(inputs: Inputs) -> tuple[list[dict], Outcome]:
    """Stages 3 to 12 for the variables of one device; returns the next state."""
    if not inputs.plan.uses_select:
        return _step(inputs)
    stacks = Stacks(inputs)
    after, outcome = _step(stacks.inputs)
    return stacks.apart(after), outcome


def _step(inputs: Inputs) -> tuple[list[dict], Outcome]:
    plan, scalars = inputs.plan, inputs.scalars
    prepared = Prepared(inputs)
    gradients = prepared.gradients
    finite = prepared.finite() & ops.isfinite(scalars.learning_rate)
    n = plan.accumulation_steps
    proceed = finite
    if n > 1:
        proceed = ops.logical_and(finite, (scalars.iterations + 1) % n == 0)

    counted = ops.cast(finite, scalars.iterations.dtype)
    decided = None
    if plan.decides:
        # Whether to go on has to be known before the branch.
        decided = prepared.transformed()
        skips = ops.logical_and(proceed, decided.skips)
        # The micro-steps of this update are taken back.
        counted = ops.where(skips, ops.cast(1 - n, counted.dtype), counted)
        # Of a step that is skipped only those that decide about it keep a memory.
        deciding = {x.owner for x in plan.stages if x.decides}
        remembered = {k: x for k, x in decided.model.items() if k in deciding}
        model_before = where(proceed, scalars.model | remembered, scalars.model)
        proceed = ops.logical_and(proceed, ops.logical_not(skips))
    else:
        model_before = scalars.model

    # What `update` doesn't change goes through a branch that does nothing at
    # all: only then does XLA update in place. The mark goes with it to tell
    # the accumulators, which move in either case, what happened.
    before = [{k: x for k, x in s.items() if k != ACCUMULATION} for s in inputs.state]
    mark = ops.cast(finite, "float32")

    def update(inputs: Inputs) -> tuple[list[dict], Arguments, tuple[dict, Any]]:
        work = decided or prepared.transformed()
        after, arguments, model = _update(inputs, prepared, work, before)
        return after, arguments, (model, mark * 0.0)

    def whole_update() -> tuple[list[dict], dict, Any]:
        after, arguments, others = update(inputs)
        return averaged(inputs, after, arguments), *others

    unchanged = (before, model_before, mark)
    if scalars.present is not None:
        after, arguments, others = update(inputs.of_step(proceed))
        model, mark = where(proceed, others, unchanged[1:])
        after = where(proceed, averaged(inputs, after, arguments), after)
    elif plan.uses_select:
        after, arguments, others = update(inputs)
        after, model, mark = where(proceed, (after, *others), unchanged)
        # Of the weights that are kept: XLA makes one loop of a tensor's update only
        # if what leads to an output is one itself.
        after = where(proceed, averaged(inputs, after, arguments), after)
    else:
        after, model, mark = ops.cond(proceed, whole_update, lambda: unchanged)
    if n > 1:
        if plan.decides:
            mark = ops.where(skips, ops.zeros_like(mark), mark)
        sums = accumulators(inputs, gradients, mark, finite)
        after = [new | own for new, own in zip(after, sums, strict=True)]
    return after, Outcome(finite, counted, model)


def _update(
    inputs: Inputs, prepared: Prepared, work: Transformed, before: list[dict]
) -> tuple[list[dict], Arguments, dict]:
    """Stages 7 to 11: the next state, the model's next slots."""
    arguments, model = prepared.arguments(work)
    after = updated(inputs, before, work.gradients, arguments)
    slots = work.kept_slots(inputs)
    after = [new | own for new, own in zip(after, slots, strict=True)]
    if inputs.plan.upkeep is not None:
        after = upkept(inputs, after, work.gradients, arguments)
    return after, arguments, model


def run_without_branch(inputs: Inputs) -> list[dict]:
    """The next state, of a step that is taken: errors come as they are raised."""
    prepared = Prepared(inputs)
    work = prepared.transformed()
    after, arguments, _ = _update(inputs, prepared, work, inputs.state)
    return averaged(inputs, after, arguments)


def where(condition: Any, one: Any, other: Any) -> Any:
    """`ops.where` over nested tensors, where they aren't the same ones."""
    return tree.map_structure(
        lambda x, y: x if x is y else ops.where(condition, x, y), one, other
    )
