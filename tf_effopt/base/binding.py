"""From an optimizer and its stages to a plan: which function gets what."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from tf_effopt.base.configurable import fields
from tf_effopt.base.groups import decay_of, multipliers_of
from tf_effopt.base.roles_by_path import input_axes
from tf_effopt.engine import ema, keras_stages
from tf_effopt.engine.plan import (
    ACCUMULATION,
    CLIP_ARGUMENTS,
    COMPENSATION,
    EMA,
    LOSS_SCALE,
    OPTIMIZER,
    RULE,
    Bound,
    BoundEvaluation,
    BoundModelRule,
    BoundStage,
    Plan,
    TrainedVariable,
    UnknownArgument,
)
from tf_effopt.hyperparameters import Number
from tf_effopt.rules import Evaluation, ModelRule, Part, each_slot
from tf_effopt.state import precision
from tf_effopt.state.variables import dtype_name, shape_of

# Arguments of a rule that aren't hyperparameters of its class.
STEP_ARGUMENTS = ("t", "counts", "learning_rate", "w", "noise", "input_axes")
# What a function may ask for besides, by where it runs.
FURTHER = {"update": ("g",), "write": ("g", "delta", "rounded")}
WITHOUT_SLOTS = (*CLIP_ARGUMENTS, LOSS_SCALE)  # keys of stages that act on all
# Numbers of Keras's arguments, which no rule has to name.
STAGE_ARGUMENTS = (
    *CLIP_ARGUMENTS,
    "weight_decay",
    "ema_momentum",
    "ema_overwrite_frequency",
    "loss_scale_factor",
)


def make_plan(
    optimizer: Any, state: list[dict | None], parts: list[Part | None]
) -> tuple[Plan, list[TrainedVariable | None]]:
    """Reads what is fixed off an optimizer and its variables."""
    numbers: dict[tuple[int, str], Any] = {}
    binder = Binder(optimizer, OPTIMIZER, numbers, optimizer.model_rule)
    for name in STAGE_ARGUMENTS:
        if _is_on(optimizer, name):
            numbers[OPTIMIZER, name] = getattr(type(optimizer), name)
    stages = [
        *(x for pair in stage_owners(optimizer) for x in _bind_stage(*pair, numbers)),
        *_stages_of_keras(optimizer, state, binder),
    ]
    variables = _describe(optimizer, state, parts, binder, stages)
    upkeep = optimizer.upkeep
    plan = Plan(
        numbers=numbers,
        stages=tuple(stages),
        model=binder.bind_model(optimizer.model_rule),
        upkeep=None if upkeep is None else binder.bind(upkeep),
        evaluation=binder.bind_evaluation(optimizer.evaluation),
        rounding=optimizer.rounding,
        elementwise=optimizer.elementwise,
    )
    return plan, variables


def stage_owners(optimizer: Any) -> list[tuple[int, Any]]:
    """The stages that were passed to an optimizer, with their places in `owners`."""
    return list(enumerate(optimizer.stages(), 1))


def key_of(number: int, stage: Any) -> str:
    """Under which a variable's state has the slots of a stage that was passed."""
    return f"{number}_{type(stage).__name__}"


def _stages_of_keras(
    optimizer: Any, state: list[dict | None], binder: Binder
) -> Iterator[BoundStage]:
    """Those that Keras's arguments make."""

    def stage(key: str, where: str, function: Callable, **options: Any) -> BoundStage:
        further = (*FURTHER.get(where, ()), *options.pop("further", ()))
        bound = binder.bind(function, options.pop("settings", ()), further)
        return BoundStage(key, OPTIMIZER, where, bound, **options)

    if _is_on(optimizer, "loss_scale_factor"):
        yield stage(LOSS_SCALE, "received", keras_stages.unscaled, elementwise=True)
    if steps := optimizer.gradient_accumulation_steps:
        yield stage(
            ACCUMULATION,
            "accumulation",
            keras_stages.accumulated,
            settings={"steps": steps},
            elementwise=True,
        )
    for name, function in keras_stages.BY_CLIP_ARGUMENT.items():
        if _is_on(optimizer, name):
            yield stage(
                name,
                "clipping",
                function,
                further=("first", "second"),
                clips=True,
                elementwise=name != "clipnorm",
            )
    if any(tensors is not None and COMPENSATION in tensors for tensors in state):
        yield stage(COMPENSATION, "write", precision.compensated, elementwise=True)
    if optimizer.use_ema:
        yield stage(EMA, "average", ema.ema, elementwise=True)


def _is_on(optimizer: Any, name: str) -> bool:
    kind = getattr(type(optimizer), name)
    return not kind.is_off(getattr(optimizer, name))


def _describe(
    optimizer: Any,
    state: list[dict | None],
    parts: list[Part | None],
    binder: Binder,
    stages: list[BoundStage],
) -> list[TrainedVariable | None]:
    rules: dict[int, Any] = {}  # one bound rule for all that are trained alike
    owners = optimizer.owners()
    passed = dict(stage_owners(optimizer))
    groups = list(enumerate(owners))[1 + len(passed) :]
    variables: list[TrainedVariable | None] = []
    for i, (tensors, part) in enumerate(zip(state, parts, strict=True)):
        if tensors is None:
            variables.append(None)
            continue
        if id(part) not in rules:
            rule = binder.bind(part.rule, part.settings)
            rules[id(part)] = next((r for r in rules.values() if r == rule), rule)
        rule = rules[id(part)]
        weight = tensors["weight"]
        multipliers = multipliers_of(i, groups)
        decay = None
        if i not in optimizer._decay_exempt:
            decay = decay_of(i, groups) or _decay_of_part(optimizer, part)
        for owner, name in (*multipliers, *([decay] if decay else [])):
            binder.numbers[owner, name] = getattr(type(owners[owner]), name)
        variables.append(
            TrainedVariable(
                index=i,
                shape=shape_of(weight),
                dtype=dtype_name(weight),
                constraint=getattr(weight, "constraint", None),
                rule=rule,
                part=part.name,
                stages=frozenset(
                    stage.key
                    for stage in stages
                    if _acts_on(stage, passed, tensors, optimizer, i)
                ),
                learning_rate_multipliers=multipliers,
                # A rule that takes `weight_decay` does itself what the stage does.
                decays=decay is not None and "weight_decay" not in rule.names,
                decay=decay,
                matrices=part.matrices,
                input_axes=input_axes(*optimizer._built_on[i]),
                starts_at_weight=tuple(_starting_at_weight(part, passed)),
            )
        )
    return variables


def _decay_of_part(optimizer: Any, part: Any) -> tuple[int, str] | None:
    """The owner and name of the optimizer's own decay of a part, or None."""
    kind = getattr(type(optimizer), part.weight_decay, None)
    if not isinstance(kind, Number):
        raise TypeError(
            f"The part {part.name!r} of {type(optimizer).__name__} decays by "
            f"`{part.weight_decay}`, which is no hyperparameter of the class."
        )
    if kind.is_off(getattr(optimizer, part.weight_decay)):
        return None
    return OPTIMIZER, part.weight_decay


def _starting_at_weight(part: Part, passed: dict[int, Any]) -> Iterator[tuple]:
    """The key of the rule or stage, and the symbol, of each slot that does."""
    groups = [(RULE, group) for group in part.groups()]
    groups += [(key_of(*pair), each_slot(pair[1].slots)) for pair in passed.items()]
    for key, slots in groups:
        yield from ((key, k) for k, slot in slots.items() if slot.starts_at_weight)


def _acts_on(
    stage: BoundStage,
    passed: dict[int, Any],
    tensors: dict,
    optimizer: Any,
    index: int,
) -> bool:
    """Whether a stage acts on a variable."""
    if stage.owner in passed:
        # An average would move what is to stay.
        if index in optimizer._frozen and stage.where == "average":
            return False
        return passed[stage.owner].acts_on(*optimizer._built_on[index])
    return stage.key in tensors or stage.key in WITHOUT_SLOTS


def _bind_stage(
    number: int, stage: Any, numbers: dict[tuple[int, str], Any]
) -> Iterator[BoundStage]:
    binder = Binder(stage, number, numbers, stage.model_rule, stage.look)
    look = None if stage.look is None else binder.bind(stage.look)
    for i, x in enumerate(stage.functions()):
        bound = None
        if x.function is not None:
            bound = binder.bind(x.function, further=FURTHER.get(x.where, ()))
        yield BoundStage(
            key=key_of(number, stage),
            owner=number,
            where=x.where,
            function=bound,
            form=x.form,
            model=binder.bind_model(stage.model_rule) if i == 0 else None,
            decides=stage.decides and i == 0,
            clips=stage.clips and i == 0,
            look=look if i == 0 else None,
            elementwise=stage.elementwise,
        )


def keyword_arguments(function: Callable) -> tuple[str, ...]:
    """The names of a function's keyword-only arguments."""
    return tuple(
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    )


class Binder:
    """Finds, for the functions of one owner, where their arguments come from.

    Args:
        owner: an optimizer or a stage.
        number: of this owner.
        numbers: of the plan; those that the functions use are added.
        model: the owner's `ModelRule`, or None.
        look: what else provides arguments: see `Stage.look`.
    """

    def __init__(
        self,
        owner: Any,
        number: int,
        numbers: dict,
        model: ModelRule | None,
        look: Callable | None = None,
    ):
        self.owner = owner
        self.number = number
        self.numbers = numbers
        self.has_model = model is not None or look is not None

    def bind(
        self, function: Callable, settings: Any = (), further: tuple[str, ...] = ()
    ) -> Bound:
        """Binds a function.

        Args:
            function: to be bound.
            settings: fixed arguments of this use of it.
            further: names that a step provides where it is used.
        """
        names, fixed, of_model = [], dict(settings), []
        provided = (*STEP_ARGUMENTS, *further, "weight_decay")
        for name in keyword_arguments(function):
            if name in fixed:
                continue
            kind = getattr(type(self.owner), name, None)
            if name in provided:
                names.append(name)
            elif kind is not None and hasattr(kind, "structure"):
                value = getattr(self.owner, name)
                if not isinstance(kind, Number):
                    fixed[name] = value
                elif kind.is_off(value):
                    fixed[name] = None
                else:
                    self.numbers[self.number, name] = kind
                    names.append(name)
            elif self.has_model:
                names.append(name)
                of_model.append(name)
            else:
                shared = {x.name for x in self.owner.shared_arguments()}
                own = set(fields(type(self.owner))) - shared
                raise UnknownArgument(function, name, {*provided, *own})
        extra = set(fixed) - set(keyword_arguments(function))
        return Bound(
            function,
            tuple(names),
            {name: value for name, value in fixed.items() if name not in extra},
            tuple(of_model),
        )

    def bind_model(self, model: ModelRule | None) -> BoundModelRule | None:
        if model is None:
            return None
        return BoundModelRule(
            rule=self.bind(model.rule),
            measure=None if model.measure is None else self.bind(model.measure),
            each_count=model.each_count,
        )

    def bind_evaluation(self, evaluation: Evaluation | None) -> BoundEvaluation | None:
        if evaluation is None:
            return None
        return BoundEvaluation(
            self.bind(evaluation.to_evaluation), self.bind(evaluation.to_training)
        )
