"""Stages 7 to 12: the rule, and what is written."""

from __future__ import annotations

from typing import Any

from keras import ops

from tf_effopt import precision, random
from tf_effopt.averaging import ema
from tf_effopt.engine.inputs import Inputs
from tf_effopt.engine.matrices import matrix_steps
from tf_effopt.engine.plan import EVALUATING, OPTIMIZER, Arguments, TrainedVariable
from tf_effopt.engine.sparse import Rows


def updated(
    inputs: Inputs, state: list[dict], gradients: list[Any], arguments: Arguments
) -> list[dict]:
    """Stages 7 to 11; returns the next state of each variable."""
    if inputs.plan.evaluation is not None:
        state = [
            tensors | {"weight": _at_training(inputs, v, tensors, arguments)}
            for v, tensors in zip(inputs.variables, state, strict=True)
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
    if isinstance(g, Rows):
        touched = {k: x for k, x in tensors.items() if k != "average"}
        rows = g.gather(touched)
        rows = _apply_rule(
            inputs, v, rows, g.values, arguments, elements=g.elements(v.shape)
        )
        after |= g.scatter(touched, rows)
    elif g is not None:
        after |= _apply_rule(inputs, v, tensors, g, arguments, step)
    elif v.starts_at_weight:
        after["slots"] = _stored(inputs.slots(v, tensors), tensors)
    if g is not None and v.constraint is not None:
        after["weight"] = ops.cast(v.constraint(after["weight"]), v.dtype)
    return after


def averaged(inputs: Inputs, state: list[dict]) -> list[dict]:
    """Stage 12, of the state after all others."""
    if not inputs.plan.ema:
        return state
    arguments = Arguments(inputs.plan, inputs.scalars)
    return [
        tensors | _average(inputs, v, tensors, arguments)
        for v, tensors in zip(inputs.variables, state, strict=True)
    ]


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
            [state[i]["slots"] for i in members],
            arguments=arguments.of(OPTIMIZER, dtype)
            | {"counts": _counts(inputs, members, arguments, dtype)},
        )
        for i, own in zip(members, slots, strict=True):
            after[i] = state[i] | {"slots": own}
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
    for transform in plan.transforms:
        if transform.after is not None and transform.owner in v.transforms:
            own = arguments.for_variable(v, transform.owner) | {"w": w}
            delta = transform.after(delta, g, arguments=own)
    if v.decays:
        delta = delta - mine["learning_rate"] * mine["weight_decay"] * w
    after = {"slots": _stored(new_slots, tensors)}
    if "compensation" in tensors:
        delta = delta + ops.cast(tensors["compensation"], v.compute_dtype)
        after["weight"] = precision.store(w + delta, v.dtype)
        lost = (w + delta) - ops.cast(after["weight"], v.compute_dtype)
        after["compensation"] = ops.cast(lost, tensors["compensation"].dtype)
    else:
        stochastic = plan.rounding == "stochastic"
        bits = _bits(v, inputs.t, elements, salt=0) if stochastic else None
        after["weight"] = precision.store(w + delta, v.dtype, bits)
    return after


def _stored(slots: dict, tensors: dict) -> dict:
    """Slots in the dtypes in which they are kept."""
    return {k: ops.cast(slots[k], x.dtype) for k, x in tensors["slots"].items()}


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
    inputs: Inputs, v: TrainedVariable, tensors: dict, arguments: Arguments
) -> dict:
    """Stage 12 for one variable."""
    plan, t = inputs.plan, inputs.t
    numbers = arguments.of(OPTIMIZER, v.compute_dtype)
    average = ema.ema_rule(
        ops.cast(tensors["average"], v.compute_dtype),
        ops.cast(tensors["weight"], v.compute_dtype),
        t=t,
        ema_momentum=numbers["ema_momentum"],
    )
    # An average moves too slowly for rounding to nearest, compensated or not.
    bits = None if plan.rounding == "nearest" else _bits(v, t, None, salt=1)
    average = precision.store(average, v.dtype, bits)
    after = {"average": average}
    if plan.overwrites:
        frequency = ops.cast(numbers["ema_overwrite_frequency"], t.dtype)
        after["weight"] = ema.overwrite(
            average, tensors["weight"], t=t, frequency=frequency
        )
        if "compensation" in tensors:
            c = tensors["compensation"]
            after["compensation"] = ema.overwrite(
                ops.zeros_like(c), c, t=t, frequency=frequency
            )
    return after


def _bits(v: TrainedVariable, t: Any, elements: Any, salt: int) -> Any | None:
    """Random bits for one write, or None where nothing is to be rounded."""
    if not precision.is_narrow(v.dtype):
        return None
    stream = 2 * v.index + salt
    if elements is None:
        return random.bits(v.shape, t, stream)
    return random.bits_of(elements, t, stream)
