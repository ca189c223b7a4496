"""The stages of an update, in their order, as one pure function of tensors.

 1. all-reduce over replicas                      (before this, by the engine)
 2. repeated rows of a sparse gradient are summed (before this, by the engine)
 3. loss unscaling, and the finite check: a non-finite step changes nothing
 4. accumulation
 5. clipping; a global norm is that of all trained variables
 6. gradient transforms                           (none yet)
 7. each tensor's learning rate, then the rule
 8. update transforms                             (none yet)
 9. decoupled weight decay, of the weight before the step
10. one rounding on write
11. constraints
12. averages, once per update

It is written with `keras.ops`, so that the same text runs eagerly, in a
graph, in one XLA program, and on Keras's JAX and PyTorch backends. It knows
no variable, device or strategy, and of a rule only its arguments.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from keras import ops

from tf_effopt import precision
from tf_effopt.averaging import ema
from tf_effopt.engine.sparse import Rows
from tf_effopt.transforms import clipping


@dataclasses.dataclass(frozen=True)
class TrainedVariable:
    """What is fixed about one trained variable."""

    index: int
    shape: tuple[int, ...]
    dtype: str
    decays: bool
    constraint: Callable | None

    @property
    def compute_dtype(self) -> str:
        return precision.compute_dtype(self.dtype)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is fixed about an optimizer once it is built.

    Attributes:
        rule: the rule function.
        scalars: the hyper-parameters that are numbers and in use, the rule's
            and the stages': name -> descriptor.
        rule_scalars: the names of those that the rule takes.
        switches: the rule's other keyword arguments, with their values.
        takes_t, takes_weight: whether the rule has arguments `t` and `w`.
        rounding: one of `precision.ROUNDINGS`.
        accumulation_steps: gradients summed up for one update.
        clip: None or the clipping argument that is set.
        weight_decay, ema, loss_scale, overwrites: whether the stage exists.
    """

    rule: Callable
    scalars: dict[str, Any]
    rule_scalars: tuple[str, ...]
    switches: dict[str, Any]
    takes_t: bool
    takes_weight: bool
    rounding: str
    accumulation_steps: int
    clip: str | None
    weight_decay: bool
    ema: bool
    overwrites: bool
    loss_scale: bool

    @property
    def needs_norms(self) -> bool:
        return self.clip in ("clipnorm", "global_clipnorm")


@dataclasses.dataclass
class Scalars:
    """The numbers of one step, as tensors.

    Attributes:
        iterations: integer, micro-steps so far.
        learning_rate: float.
        hyperparameters: of shape `(len(names), 2)`: value and 1 minus value.
        names: of the hyper-parameters, in order.
        kinds: their descriptors.
    """

    iterations: Any
    learning_rate: Any
    hyperparameters: Any
    names: list[str]
    kinds: dict[str, Any]

    def in_dtype(self, dtype: str) -> dict[str, Any]:
        """Name -> what a rule on tensors of `dtype` receives."""
        pairs = ops.cast(self.hyperparameters, dtype)
        values = {
            name: self.kinds[name].as_rule_argument(pairs[i, 0], pairs[i, 1])
            for i, name in enumerate(self.names)
        }
        values["learning_rate"] = ops.cast(self.learning_rate, dtype)
        return values


def measure(
    plan: Plan,
    variables: list[TrainedVariable],
    state: list[dict],
    gradients: list[Any],
    scalars: Scalars,
) -> list[Any]:
    """Stage 3, and what clipping needs: numbers that tell of all gradients.

    Squared norms where a stage clips by norms, else sums. Their sum is finite
    only if the whole gradient is. There is one number for each gradient if
    each is clipped by its own; else small tensors share one.
    """
    gradients = _unscaled(plan, variables, gradients, scalars)
    seen = []
    for tensors, g in zip(state, gradients, strict=True):
        if g is None:
            continue
        if plan.accumulation_steps > 1 and plan.needs_norms:
            g = (tensors["accumulator"] + g) / plan.accumulation_steps
        elif isinstance(g, Rows):
            g = g.unique
        seen.append(g)
    if plan.clip != "clipnorm":
        seen = clipping.joined(seen)
    return [clipping.squared_norm(g) if plan.needs_norms else ops.sum(g) for g in seen]


def step(
    plan: Plan,
    variables: list[TrainedVariable],
    state: list[dict],
    gradients: list[Any],
    scalars: Scalars,
    measured: list[Any],
    total: Any,
) -> tuple[list[dict], Any]:
    """Stages 3 to 12 for the variables of one device.

    Args:
        plan, variables: what is fixed.
        state: for each variable a dict of tensors: `weight`, `slots`, and if
            the plan has them `accumulator`, `average`, `compensation`.
        gradients: for each variable a dense tensor, `Rows`, or None (only
            its average moves).
        scalars: the numbers of this step.
        measured: what `measure` returned for these variables.
        total: the sum of all that it returned for all devices.

    Returns:
        `(state, finite)`: the next state, and whether the gradient was finite.
    """
    gradients = _unscaled(plan, variables, gradients, scalars)
    finite = ops.isfinite(total)
    n = plan.accumulation_steps
    t = scalars.iterations // n + 1
    proceed = finite
    if n > 1:
        proceed = ops.logical_and(finite, (scalars.iterations + 1) % n == 0)
    arguments = {
        dtype: scalars.in_dtype(dtype) | {"t": ops.cast(t, dtype)}
        for dtype in sorted({v.compute_dtype for v in variables})
    }

    # What `update` doesn't change goes through a branch that does nothing at
    # all: only then does XLA update in place. The mark goes with it to tell
    # the accumulators, which move in either case, what happened.
    before = [{k: x for k, x in s.items() if k != "accumulator"} for s in state]
    mark = ops.cast(finite, "float32")

    def update() -> tuple[list[dict], Any]:
        clipped = gradients
        if n > 1:
            clipped = [
                None if g is None else (s["accumulator"] + g) / n
                for s, g in zip(state, gradients, strict=True)
            ]
        clipped = _clipped(plan, variables, clipped, measured, total, arguments)
        after = [
            _update_one(plan, v, s, g, t, arguments[v.compute_dtype])
            for v, s, g in zip(variables, before, clipped, strict=True)
        ]
        return after, mark * 0.0

    after, mark = ops.cond(proceed, update, lambda: (before, mark))
    if n > 1:
        for old, new, g in zip(state, after, gradients, strict=True):
            accumulator = old["accumulator"]
            grown = accumulator if g is None else accumulator + g
            # `mark` is 1 after a micro-step, 0 after an update.
            grown = ops.cast(mark, grown.dtype) * grown
            new["accumulator"] = ops.where(finite, grown, accumulator)
    return after, finite


def _unscaled(
    plan: Plan,
    variables: list[TrainedVariable],
    gradients: list[Any],
    scalars: Scalars,
) -> list[Any]:
    """The gradients in the dtype of the arithmetic, loss scaling undone."""
    scales = {}
    if plan.loss_scale:
        for dtype in sorted({v.compute_dtype for v in variables}):
            scales[dtype] = scalars.in_dtype(dtype)["loss_scale_factor"]

    def unscale(v: TrainedVariable, x: Any) -> Any:
        x = ops.cast(x, v.compute_dtype)
        return x / scales[v.compute_dtype] if scales else x

    return [
        _elementwise(functools.partial(unscale, v), g)
        for v, g in zip(variables, gradients, strict=True)
    ]


def _elementwise(function: Callable, gradient: Any) -> Any:
    """Applies a function that maps 0 to 0 to a gradient of any kind."""
    if gradient is None:
        return None
    return gradient.map(function) if isinstance(gradient, Rows) else function(gradient)


def _clipped(
    plan: Plan,
    variables: list[TrainedVariable],
    gradients: list[Any],
    measured: list[Any],
    total: Any,
    arguments: dict[str, dict],
) -> list[Any]:
    """Stage 5."""
    if plan.clip is None:
        return gradients
    measured = iter(measured)
    clipped = []
    for v, g in zip(variables, gradients, strict=True):
        if g is None:
            clipped.append(None)
            continue
        limit = arguments[v.compute_dtype][plan.clip]
        if plan.clip == "clipvalue":
            clip = functools.partial(clipping.clip_by_value, clipvalue=limit)
        else:
            squared = next(measured) if plan.clip == "clipnorm" else total
            norm = ops.sqrt(ops.cast(squared, v.compute_dtype))
            clip = functools.partial(clipping.clip_by_norm, norm=norm, clipnorm=limit)
        clipped.append(_elementwise(clip, g))
    return clipped


def _update_one(
    plan: Plan, v: TrainedVariable, tensors: dict, g: Any, t: Any, arguments: dict
) -> dict:
    """Stages 6 to 12 for one variable."""
    after = dict(tensors)
    if isinstance(g, Rows):
        touched = {k: x for k, x in tensors.items() if k != "average"}
        rows = g.gather(touched)
        rows = _apply_rule(plan, v, rows, g.values, t, arguments, g.elements(v.shape))
        after |= g.scatter(touched, rows)
    elif g is not None:
        after |= _apply_rule(plan, v, tensors, g, t, arguments, None)
    if g is not None and v.constraint is not None:
        after["weight"] = ops.cast(v.constraint(after["weight"]), v.dtype)
    if plan.ema:
        after |= _average(plan, v, after, t, arguments)
    return after


def _apply_rule(
    plan: Plan,
    v: TrainedVariable,
    tensors: dict,
    g: Any,
    t: Any,
    arguments: dict,
    elements: Any,
) -> dict:
    """Stages 7 to 10: the rule, decay and the rounding on write."""
    w = ops.cast(tensors["weight"], v.compute_dtype)
    slots = {k: ops.cast(x, v.compute_dtype) for k, x in tensors["slots"].items()}
    keywords = {name: arguments[name] for name in plan.rule_scalars} | plan.switches
    if plan.takes_t:
        keywords["t"] = arguments["t"]
    if plan.takes_weight:
        keywords["w"] = w
    eta = arguments["learning_rate"]
    delta, new_slots = plan.rule(g, slots, learning_rate=eta, **keywords)
    if plan.weight_decay and v.decays:
        delta = delta - eta * arguments["weight_decay"] * w
    after = {
        "slots": {
            k: ops.cast(new_slots[k], x.dtype) for k, x in tensors["slots"].items()
        }
    }
    if "compensation" in tensors:
        delta = delta + ops.cast(tensors["compensation"], v.compute_dtype)
        after["weight"] = precision.store(w + delta, v.dtype)
        lost = (w + delta) - ops.cast(after["weight"], v.compute_dtype)
        after["compensation"] = ops.cast(lost, tensors["compensation"].dtype)
    else:
        stochastic = plan.rounding == "stochastic"
        bits = _bits(v, t, elements, salt=0) if stochastic else None
        after["weight"] = precision.store(w + delta, v.dtype, bits)
    return after


def _average(
    plan: Plan, v: TrainedVariable, tensors: dict, t: Any, arguments: dict
) -> dict:
    """Stage 12."""
    w = ops.cast(tensors["weight"], v.compute_dtype)
    average = ema.ema_rule(
        ops.cast(tensors["average"], v.compute_dtype),
        w,
        t=t,
        ema_momentum=arguments["ema_momentum"],
    )
    # An average moves too slowly for rounding to nearest, compensated or not.
    bits = None if plan.rounding == "nearest" else _bits(v, t, None, salt=1)
    average = precision.store(average, v.dtype, bits)
    after = {"average": average}
    if plan.overwrites:
        frequency = ops.cast(arguments["ema_overwrite_frequency"], t.dtype)
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
        return precision.random_bits(v.shape, t, stream)
    return precision.hash_rows(elements, t, stream)
