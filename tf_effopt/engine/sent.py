"""Before stage 1: what a replica sends of its gradient, by its own slots.

These slots are apart from those of the update, since each replica has different ones.
"""

from __future__ import annotations

from typing import Any

from keras import ops

from tf_effopt.engine.arguments import Arguments
from tf_effopt.engine.inputs import Inputs, kept, run_stage
from tf_effopt.engine.plan import OPTIMIZER, Plan

SENT = "sent"


def own_slots(plan: Plan, tensors: dict) -> dict:
    """The weight, and of a variable's state what belongs to one replica."""
    keys = {stage.key for stage in plan.at(SENT)}
    return {k: x for k, x in tensors.items() if k in keys or k == "weight"}


def common_slots(plan: Plan, tensors: dict) -> dict:
    """Of a variable's state what all replicas have alike."""
    keys = {stage.key for stage in plan.at(SENT)}
    return {k: x for k, x in tensors.items() if k not in keys}


def sent(inputs: Inputs) -> tuple[list[Any], list[dict]]:
    """What this replica sends of each gradient, and its next slots by key.

    A stage sees the gradient of the loss, also if that of a scaled loss is sent: the
    scale may change from step to step, and what a stage remembers must not.
    """
    plan = inputs.plan
    arguments = Arguments(plan, inputs.scalars)
    changed, slots = [], []
    for v, tensors, g in zip(
        inputs.variables, inputs.state, inputs.gradients, strict=True
    ):
        g, after, scale = ops.cast(g, v.compute_dtype), {}, None
        if any(plan.at("received")):
            scale = arguments.number(OPTIMIZER, "loss_scale_factor", v.compute_dtype)
            g = g / scale
        for stage in plan.at(SENT):
            if stage.key in v.stages:
                g, own = run_stage(inputs, stage, v, g, tensors, arguments)
                if own:
                    after[stage.key] = kept(own, tensors[stage.key])
        changed.append(g if scale is None else g * ops.cast(scale, g.dtype))
        slots.append(after)
    return changed, slots
