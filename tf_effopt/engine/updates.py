"""Stages 7 to 12: the rule, and what is written."""

from __future__ import annotations

import functools
from typing import Any

from keras import ops

from tf_effopt.engine.arguments import Arguments
from tf_effopt.engine.inputs import Inputs, kept, run_stage
from tf_effopt.engine.matrices import matrix_steps
from tf_effopt.engine.plan import (
    COMPENSATION,
    EVALUATING,
    OPTIMIZER,
    RULE,
    BoundStage,
    TrainedVariable,
)
from tf_effopt.engine.sparse import SparseRows
from tf_effopt.state import precision, random


def updated(
    inputs: Inputs, state: list[dict], gradients: list[Any], arguments: Arguments
) -> list[dict]:
    """Stages 7 to 11; returns the next state of each variable."""
    if inputs.plan.evaluation is not None:
        state = [
            tensors | {"weight": _at_training(inputs, v, tensors, arguments)}
            for v, tensors in zip(inputs.variables, state, strict=True)
        ]
    if inputs.scalars.present is not None:
        return [
            _update_if_present(inputs, i, tensors, g, arguments)
            for i, (tensors, g) in enumerate(zip(state, gradients, strict=True))
        ]
    steps = inputs.matrix_steps
    if steps is None:
        steps = matrix_steps(inputs, state, gradients, arguments)
    return [
        _update_one(inputs, v, tensors, g, arguments, steps.get(i))
        for i, (v, tensors, g) in enumerate(
            zip(inputs.variables, state, gradients, strict=True)
        )
    ]


def _update_if_present(
    inputs: Inputs, i: int, tensors: dict, g: Any, arguments: Arguments
) -> dict:
    """Stages 7 to 11 for one variable, whose gradient may be a stand-in."""
    v = inputs.variables[i]
    if g is None:
        return tensors
    own = arguments.in_branch(v)

    def update(_: Any, tensors: dict) -> tuple[Any, dict]:
        steps = inputs.matrix_steps
        if steps is None and v.matrices is not None:
            alone = [g if i == k else None for k in range(len(inputs.variables))]
            steps = matrix_steps(inputs, [tensors] * len(alone), alone, own)
        after = _update_one(inputs, v, tensors, g, own, (steps or {}).get(i))
        return ops.zeros((), "bool"), after

    # A loop of one turn or none: XLA runs it in place, where a branch that leaves the
    # tensors alone would copy them.
    _, after = ops.while_loop(
        lambda is_due, _: is_due, update, (inputs.is_present(i), tensors)
    )
    return after


def _update_one(
    inputs: Inputs,
    v: TrainedVariable,
    tensors: dict,
    g: Any,
    arguments: Arguments,
    step: tuple[Any, dict] | None,
) -> dict:
    """Stages 7 to 11 for one variable; `step` is its rule's, if known already."""
    after = dict(tensors)
    if isinstance(g, SparseRows):
        averages = {stage.key for stage in inputs.plan.at("average")}
        touched = {k: x for k, x in tensors.items() if k not in averages}
        rows = g.gather(touched)
        rows = _apply_rule(
            inputs, v, rows, g.values, arguments, elements=g.elements(v.shape)
        )
        after |= g.scatter(touched, rows)
    elif g is not None:
        after |= _apply_rule(inputs, v, tensors, g, arguments, step)
    elif any(key == RULE for key, _ in v.starts_at_weight):
        after[RULE] = kept(inputs.slots(v, tensors), tensors[RULE])
    if g is not None and v.constraint is not None:
        after["weight"] = ops.cast(v.constraint(after["weight"]), v.dtype)
    return after


def averaged(inputs: Inputs, state: list[dict], arguments: Arguments) -> list[dict]:
    """Stage 12, of the state after all others."""
    for stage in inputs.plan.at("average"):
        state = [
            tensors | _average(inputs, stage, v, before, tensors, arguments)
            if stage.key in v.stages
            else tensors
            for v, before, tensors in zip(
                inputs.variables, inputs.state, state, strict=True
            )
        ]
    return state


def upkept(
    inputs: Inputs, state: list[dict], gradients: list[Any], arguments: Arguments
) -> list[dict]:
    """The state with the slots that all tensors of a dtype get together."""
    after = list(state)
    dtypes: dict[str, list[int]] = {}
    for i, (v, g) in enumerate(zip(inputs.variables, gradients, strict=True)):
        if g is not None:
            dtypes.setdefault(v.compute_dtype, []).append(i)
    for dtype, members in dtypes.items():
        slots = inputs.plan.upkeep(
            [gradients[i] for i in members],
            [state[i].get(RULE, {}) for i in members],
            arguments=arguments.of(OPTIMIZER, dtype)
            | {"counts": _counts(inputs, members, arguments, dtype)},
        )
        for i, own in zip(members, slots, strict=True):
            after[i] = state[i] | {RULE: inputs.if_present(i, own, state[i][RULE])}
    return after


def _counts(
    inputs: Inputs, members: list[int], arguments: Arguments, dtype: str
) -> list[Any]:
    """The number of this update of each of these variables."""
    if arguments.counts is None:
        return [ops.cast(arguments.t, dtype)] * len(members)
    each = arguments.counts.each(dtype)
    return [each.scalars[inputs.variables[i].index] for i in members]


def _at_training(
    inputs: Inputs, v: TrainedVariable, tensors: dict, arguments: Arguments
) -> Any:
    """The weight at which to train, even if that for evaluation is in place."""
    w = tensors["weight"]
    back = inputs.plan.evaluation.to_training(
        ops.cast(w, v.compute_dtype),
        inputs.slots(v, tensors),
        arguments=arguments.for_variable(v),
    )
    evaluating = inputs.scalars.model[OPTIMIZER][EVALUATING] > 0
    if inputs.proceeds is not None:
        evaluating = ops.logical_and(evaluating, inputs.proceeds)
    return ops.where(evaluating, precision.store(back, v.dtype), w)


def _apply_rule(
    inputs: Inputs,
    v: TrainedVariable,
    tensors: dict,
    g: Any,
    arguments: Arguments,
    step: tuple[Any, dict] | None = None,
    elements: Any = None,
) -> dict:
    """Stages 7 to 10: the rule, update transforms, decay and the rounding."""
    plan = inputs.plan
    w = ops.cast(tensors["weight"], v.compute_dtype)
    mine = arguments.for_variable(v) | {"w": w}
    slots = inputs.slots(v, tensors)
    if v.is_stack:
        delta, new_slots = _rule_of_each(v, g, slots, w, arguments)
    else:
        delta, new_slots = step or v.rule(g, slots, arguments=mine)
    after = {RULE: kept(new_slots, tensors.get(RULE, {}))}

    def staged(x: Any, where: str, **further: Any) -> Any:
        for stage in plan.at(where):
            if stage.key in v.stages:
                x, own = run_stage(
                    inputs, stage, v, x, tensors, arguments, g=g, **further
                )
                if own:
                    after[stage.key] = kept(own, tensors[stage.key])
        return x

    delta = staged(delta, "update")
    if v.decays:
        delta = delta - mine["learning_rate"] * mine["weight_decay"] * w
    stochastic = plan.rounding == "stochastic"
    bits = _bits(v, inputs.t, elements, salt=0) if stochastic else None
    rounded = functools.partial(_rounded, v.dtype)
    new = staged(w + delta, "write", delta=delta, rounded=rounded)
    after["weight"] = precision.store(new, v.dtype, bits)
    return after


def _rounded(dtype: str, x: Any) -> Any:
    """Rounded to the nearest number of a dtype, in the dtype that it has."""
    return ops.cast(precision.store(x, dtype), x.dtype)


def _rule_of_each(
    v: TrainedVariable, g: Any, slots: dict, w: Any, arguments: Arguments
) -> tuple[Any, dict]:
    """What the rule makes of each member of a stack, as stacks."""

    counted = [arguments.counted(v, i) for i in v.members]
    counted = {k: ops.stack([own[k] for own in counted]) for k in counted[0]}

    def rule(tensors: tuple) -> tuple[Any, dict]:
        g, slots, w, counted = tensors
        # Made here: what is made in this function can't be used outside of it.
        mine = arguments.anew().for_variable(v) | {"w": w} | counted
        return v.rule(g, slots, arguments=mine)

    return ops.vectorized_map(rule, (g, slots, w, counted))


def switched(inputs: Inputs, to_evaluation: bool) -> list[Any]:
    """The weights at which to evaluate, or those at which to train."""
    evaluation = inputs.plan.evaluation
    way = evaluation.to_evaluation if to_evaluation else evaluation.to_training
    arguments = Arguments(inputs.plan, inputs.scalars)
    return [
        precision.store(
            way(
                ops.cast(tensors["weight"], v.compute_dtype),
                inputs.slots(v, tensors),
                arguments=arguments.for_variable(v),
            ),
            v.dtype,
        )
        for v, tensors in zip(inputs.variables, inputs.state, strict=True)
    ]


def _average(
    inputs: Inputs,
    stage: BoundStage,
    v: TrainedVariable,
    before: dict,
    after: dict,
    arguments: Arguments,
) -> dict:
    """One stage on one variable's weight: what changes of its state.

    Args:
        before, after: its state, before and after the update.
    """
    plan, t = inputs.plan, inputs.t
    w = ops.cast(after["weight"], v.compute_dtype)
    if COMPENSATION in after:
        w = w + ops.cast(after[COMPENSATION]["lost"], v.compute_dtype)
    new, slots = run_stage(inputs, stage, v, w, after, arguments, before, t=t)
    # An average moves too slowly for rounding to nearest, compensated or not.
    bits = None if plan.rounding == "nearest" else _bits(v, t, None, salt=1)
    own = {stage.key: kept(slots, before[stage.key], bits)} if slots else {}
    return own if new is w else own | _moved(v, w, new, after, bits)


def _moved(v: TrainedVariable, w: Any, new: Any, tensors: dict, bits: Any) -> dict:
    """A weight moved from `w` to `new`, as it is kept; not rounded where it stays."""
    weight = precision.store(new, v.dtype, bits)
    if COMPENSATION not in tensors:
        return {"weight": weight}
    before = tensors[COMPENSATION]["lost"]
    lost = ops.cast(new - ops.cast(weight, v.compute_dtype), before.dtype)
    stays = new == w
    return {
        "weight": ops.where(stays, tensors["weight"], weight),
        COMPENSATION: {"lost": ops.where(stays, before, lost)},
    }


def _bits(v: TrainedVariable, t: Any, elements: Any, salt: int) -> Any | None:
    """Random bits for one write, or None where nothing is to be rounded."""
    if not precision.is_narrow(v.dtype):
        return None
    stream = 2 * v.index + salt
    if elements is None:
        return random.bits(v.shape, t, stream)
    return random.bits_of(elements, t, stream)
