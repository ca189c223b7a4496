"""Stages 3 to 6: what becomes of the gradients before the rule sees them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

from keras import ops

from tf_effopt.engine import clipping
from tf_effopt.engine.arguments import Arguments
from tf_effopt.engine.inputs import Inputs, kept, own_arguments, run_stage
from tf_effopt.engine.plan import (
    EVALUATING,
    OPTIMIZER,
    BoundModelRule,
    BoundStage,
    TrainedVariable,
)
from tf_effopt.engine.sparse import SparseRows

GRADIENT = "gradient"  # the phase of the finite check and of clipping
LARGE = 131072  # elements, at least: of them a TPU has the product sooner than squares


def unscaled(inputs: Inputs) -> list[Any]:
    """Stage 3: gradients in the dtype of the arithmetic, loss scaling undone."""
    gradients = [
        _elementwise(functools.partial(ops.cast, dtype=v.compute_dtype), g)
        for v, g in zip(inputs.variables, inputs.gradients, strict=True)
    ]
    arguments = Arguments(inputs.plan, inputs.scalars)
    for stage in inputs.plan.at("received"):
        gradients = [
            _changed(stage, v, g, arguments)
            for v, g in zip(inputs.variables, gradients, strict=True)
        ]
    return gradients


def _changed(
    stage: BoundStage, v: TrainedVariable, g: Any, arguments: Arguments, **further: Any
) -> Any:
    """A gradient after a stage of one of Keras's arguments, which has no slots."""
    given = further | {
        name: arguments.number(stage.owner, name, v.compute_dtype)
        for name in stage.function.names
        if name not in further
    }
    return _elementwise(lambda x: stage(x, {}, arguments=given)[0], g)


def _elementwise(function: Callable, gradient: Any) -> Any:
    """Applies a function that maps 0 to 0 to a gradient of any kind."""
    if gradient is None:
        return None
    is_sparse = isinstance(gradient, SparseRows)
    return gradient.map(function) if is_sparse else function(gradient)


def measured_numbers(inputs: Inputs, gradients: list[Any]) -> list[Any]:
    """Numbers to be added up, for clipping and for the finite check.

    Their sum is finite only if the whole gradient is, and what rules make of its
    squares. They are squared norms wherever one is asked for. There is one for each
    gradient if each is clipped by its own; else tensors of one shape share one.
    """
    plan = inputs.plan
    if plan.accumulation_steps > 1 and plan.clips:
        gradients = accumulated(inputs, gradients)
    seen = inputs.seen(gradients)
    products, squares = [], seen
    if plan.checks_finite_by_products:
        products = [_sum_by_product(g) for g in seen if _is_large(g)]
        squares = [g for g in seen if not _is_large(g)]
    alone = plan.clip == "clipnorm"
    groups = [[g] for g in squares] if alone else clipping.alike(squares)
    return products + [clipping.squared_norm(*group) for group in groups]


def _is_large(g: Any) -> bool:
    return len(g.shape) > 1 and None not in g.shape and math.prod(g.shape) >= LARGE


def _sum_by_product(g: Any) -> Any:
    """A number that is finite only if the squares of a tensor's elements are.

    A TPU's matrix unit adds up faster than the rest of it.
    """
    rows = ops.reshape(g, (-1, g.shape[-1]))
    # 2^64 times what has an infinite square is infinite. Of one row XLA makes a sum.
    factors = ops.full((8, rows.shape[0]), 2.0**64, rows.dtype)
    return ops.sum(ops.matmul(factors, rows) * 2.0**-64)


def sum_of(numbers: list[Any], dtype: str) -> Any:
    if not numbers:
        return ops.zeros((), dtype)
    return sum(ops.cast(x, dtype) for x in numbers)


def accumulated(inputs: Inputs, gradients: list[Any]) -> list[Any]:
    """Stage 4: the mean gradient of this update, should it be due."""
    for stage in inputs.plan.at("accumulation"):
        gradients = [
            None if g is None else stage(g, tensors[stage.key], arguments={})[0]
            for tensors, g in zip(inputs.state, gradients, strict=True)
        ]
    return gradients


def accumulators(
    inputs: Inputs, gradients: list[Any], mark: Any, finite: Any
) -> list[dict]:
    """Stage 4, what is kept: `mark` is 1 after a micro-step, 0 after an update."""
    (stage,) = inputs.plan.at("accumulation")
    after = []
    for i, (tensors, g) in enumerate(zip(inputs.state, gradients, strict=True)):
        before = tensors[stage.key]
        grown = before if g is None else stage(g, before, arguments={})[1]
        grown = inputs.if_present(i, grown, before)
        kept_sums = {}
        for name, x in grown.items():
            # Not a product: the sum of finite gradients may be infinite.
            x = ops.where(mark > 0, x, ops.zeros_like(x))
            kept_sums[name] = ops.where(finite, x, before[name])
        after.append({stage.key: kept_sums})
    return after


def clipped_gradients(
    inputs: Inputs, gradients: list[Any], factors: Iterator[tuple[Any, Any]] | None
) -> list[Any]:
    """Stage 5; `factors` yields for each gradient those that clip it by a norm."""
    arguments = Arguments(inputs.plan, inputs.scalars)

    def clipped(stage: BoundStage, v: TrainedVariable, g: Any) -> Any:
        if g is None:
            return None
        further = {}
        if factors is not None:
            pair = (ops.cast(x, v.compute_dtype) for x in next(factors))
            further = dict(zip(("first", "second"), pair, strict=True))
        return _changed(stage, v, g, arguments, **further)

    for stage in inputs.plan.at("clipping"):
        gradients = [
            clipped(stage, v, g)
            for v, g in zip(inputs.variables, gradients, strict=True)
        ]
    return gradients


class Transformed:
    """Stage 6, and the numbers of the whole model on its way.

    Attributes:
        gradients: after the stages that have run.
        slots: for each variable key -> the next slots of the stages that have run.
        arguments: with the numbers that the model rules have returned.
        model: owner -> symbol -> the model's slots, next ones where a rule ran.
        skips: whether a stage wants the step to be skipped.

    Args:
        overflows: boolean scalar, whether the squares of some gradient overflow; None
            where they don't.
    """

    def __init__(self, inputs: Inputs, gradients: list[Any], overflows: Any = None):
        self.inputs = inputs
        self.gradients = gradients
        self.slots: list[dict[str, dict]] = [{} for _ in gradients]
        self._overflows = overflows
        self.arguments = Arguments(inputs.plan, inputs.scalars)
        self.model = dict(inputs.scalars.model)
        self.skips: Any = False

    def run(self, until: str | None = None) -> dict[str, Any] | None:
        """Runs the stages on the gradient, and the model's rules of all stages.

        Args:
            until: None, or the phase for which to return what is to be summed up.
        """
        for stage in self.inputs.plan.stages:
            if stage.model is not None:
                if until == str(stage.owner):
                    return self._sums(stage.owner, stage.model, stage.clips)
                numbers = self._model_numbers(stage.owner, stage.model, stage.clips)
                self.arguments.numbers[stage.owner] = numbers
                if stage.decides:
                    self.skips = ops.logical_or(self.skips, numbers["skip"])
            if stage.where == "gradient" and stage.function is not None:
                self._change(stage)
        if until == str(OPTIMIZER):
            return self._sums(OPTIMIZER, self.inputs.plan.model)
        return None

    def _change(self, stage: BoundStage) -> None:
        """The gradients after one stage, and its next slots."""
        changed = list(self.gradients)
        acted = self._acted_on(stage)
        for (i, v, tensors, g), looked in zip(acted, self._look(stage), strict=True):
            changed[i], self.slots[i][stage.key] = run_stage(
                self.inputs, stage, v, g, tensors, self.arguments, **looked
            )
        self.gradients = changed

    def kept_slots(self, inputs: Inputs) -> list[dict[str, dict]]:
        """The next slots of the stages that have run, as they are kept.

        Args:
            inputs: by which a variable has a gradient, in a step that is taken.
        """
        return [
            {
                key: inputs.if_present(i, kept(slots, tensors[key]), tensors[key])
                for key, slots in own.items()
                if slots
            }
            for i, (own, tensors) in enumerate(
                zip(self.slots, inputs.state, strict=True)
            )
        ]

    def optimizer_numbers(self) -> tuple[dict[str, Any], dict]:
        """Runs the optimizer's own model rule: its numbers, all next slots."""
        plan, numbers = self.inputs.plan, {}
        # Numbers of each variable aren't those of the model: see `Arguments.of_each`.
        if plan.model is not None and not self.arguments.follows_variables:
            numbers = self._model_numbers(OPTIMIZER, plan.model)
        if plan.evaluation is not None:
            now = self.model[OPTIMIZER]
            self.model[OPTIMIZER] = now | {EVALUATING: 0 * now[EVALUATING]}
        return numbers, self.model

    def _acted_on(self, stage: BoundStage) -> list[tuple]:
        """Position, variable, state and gradient of what a stage changes."""
        inputs = self.inputs
        each = zip(inputs.variables, inputs.state, self.gradients, strict=True)
        return [
            (i, v, tensors, g)
            for i, (v, tensors, g) in enumerate(each)
            if g is not None and stage.key in v.stages
        ]

    def _look(self, stage: BoundStage) -> list[dict[str, Any]]:
        """What `look` returns of each tensor that the stage acts on."""
        acted = self._acted_on(stage)
        if stage.look is None or not acted:
            return [{} for _ in acted]

        def look(large: bool) -> list[dict[str, Any]]:
            # What is made in a branch can't be used outside of it.
            arguments = self.arguments.anew()
            return [_looked(stage, arguments, *x, large) for _, *x in acted]

        if self._overflows is None:
            return look(large=False)
        # One branch for all: on a GPU each costs a transfer.
        return ops.cond(
            self._overflows, lambda: look(large=True), lambda: look(large=False)
        )

    def _model_numbers(
        self, owner: int, model: BoundModelRule, clips: bool = False
    ) -> dict[str, Any]:
        inputs = self.inputs
        sums = {}
        if model.measure is not None:
            sums = inputs.total(str(owner), lambda: self._sums(owner, model, clips))
        before = inputs.scalars.model[owner]
        numbers, after = model.rule(
            sums, before, arguments=self.arguments.of(owner, inputs.scalar_dtype)
        )
        self.model[owner] = before | after
        return numbers

    def _sums(
        self, owner: int, model: BoundModelRule, clips: bool = False
    ) -> dict[str, Any]:
        sums = self._sums_of(self.gradients, owner, model)
        if not clips:
            return sums
        dtype = self.inputs.scalar_dtype
        # What a measure makes of a gradient that is 0.
        shrunk = {name: ops.zeros((), dtype) for name in sums}
        if self._overflows is not None and sums:
            shrunk = ops.cond(
                self._overflows,
                lambda: self._sums_of(self._shrunk(), owner, model),
                lambda: shrunk,
            )
        return sums | {f"shrunk_{name}": x for name, x in shrunk.items()}

    def _shrunk(self) -> list[Any]:
        wide = self.inputs.scalar_dtype
        factor = clipping.shrinking(self._overflows, wide)
        return [
            None
            if g is None
            else clipping.shrunk(ops.cast(g, wide), self._overflows, factor)
            for g in self.gradients
        ]

    def _arguments(self, v: TrainedVariable, owner: int) -> dict[str, Any]:
        if owner == OPTIMIZER:
            return self.arguments.for_variable(v)
        return self.arguments.for_stage(v, owner)

    def _sums_of(
        self, gradients: list[Any], owner: int, model: BoundModelRule
    ) -> dict[str, Any]:
        dtype = self.inputs.scalar_dtype
        parts: dict[str, list[Any]] = {}
        inputs = self.inputs
        for i, (v, tensors, g) in enumerate(
            zip(inputs.variables, inputs.state, gradients, strict=True)
        ):
            if g is None:
                continue
            arguments = self._arguments(v, owner) | {
                symbol: ops.cast(x, v.compute_dtype)
                for symbol, x in self.inputs.scalars.model[owner].items()
            }
            arguments |= own_arguments(v, tensors, model.measure, self.arguments)
            slots = self.inputs.slots(v, tensors)
            measured = model.measure(g, slots, arguments=arguments)
            for name, x in measured.items():
                x = self.inputs.if_present(i, x, ops.zeros_like(x))
                parts.setdefault(name, []).append(x)
        return {name: sum_of(numbers, dtype) for name, numbers in parts.items()}


def _looked(
    stage: BoundStage,
    arguments: Arguments,
    v: TrainedVariable,
    tensors: dict,
    g: Any,
    large: bool,
) -> dict[str, Any]:
    given = arguments.for_stage(v, stage.owner) | {"large": large}
    given |= own_arguments(v, tensors, stage.look, arguments)
    return stage.look(g, arguments=given)
