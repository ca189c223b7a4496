"""What is fixed about an optimizer once it is built, and the numbers of a step."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import keras
from keras import ops

from tf_effopt.engine.spelling import did_you_mean
from tf_effopt.rules import Matrices
from tf_effopt.state import precision

CLIP_ARGUMENTS = ("clipnorm", "clipvalue", "global_clipnorm")
EVALUATING = "evaluating"  # a slot of the model: 1 or 0
OPTIMIZER = 0  # the first owner; stages, then groups, come after it
RULE = "rule"  # the key of the rule's slots; further keys are those of stages
ACCUMULATION = "accumulation"
COMPENSATION = "compensation"
EMA = "ema"
LOSS_SCALE = "loss_scale"


class UnknownArgument(TypeError):
    """A function asks for an argument by a name that nothing provides."""

    def __init__(self, function: Callable, name: str, known: Iterable[str]):
        known = sorted(known)
        super().__init__(
            f"`{function.__name__}` takes `{name}`, which nothing provides."
            f"{did_you_mean(name, known, '`')} It may take: {', '.join(known)}."
        )


@dataclasses.dataclass(frozen=True)
class Bound:
    """A pure function, and where its keyword-only arguments come from.

    Attributes:
        names: those that a step provides, by name.
        fixed: the others, with their values.
        of_model: those of `names` that only a `model_rule` or `look` can provide.
    """

    function: Callable
    names: tuple[str, ...]
    fixed: dict[str, Any]
    of_model: tuple[str, ...] = ()

    def __call__(self, *tensors: Any, arguments: dict[str, Any]) -> Any:
        try:
            given = {name: arguments[name] for name in self.names}
        except KeyError as error:
            name, known = error.args[0], {*arguments, *self.fixed}
            raise UnknownArgument(self.function, name, known) from None
        return self.function(*tensors, **given, **self.fixed)


@dataclasses.dataclass(frozen=True)
class BoundModelRule:
    """A `ModelRule`, bound."""

    rule: Bound
    measure: Bound | None
    each_count: bool = False


@dataclasses.dataclass(frozen=True)
class BoundStage:
    """A function of a stage, bound; see `tf_effopt.Stage`.

    Attributes:
        key: under which a variable's state has its slots.
        owner: whose numbers it takes.
        where, form: see `tf_effopt.base.stage.Function`.
        function: None for numbers of the whole model alone.
        model, decides, clips, look, elementwise: as of the stage.
    """

    key: str
    owner: int
    where: str
    function: Bound | None
    form: str = "stage"
    model: BoundModelRule | None = None
    decides: bool = False
    clips: bool = False
    look: Bound | None = None
    elementwise: bool = False

    def __call__(
        self, x: Any, slots: dict, *, arguments: dict[str, Any]
    ) -> tuple[Any, dict]:
        """What becomes of `x`, and the next slots."""
        if self.function is None:
            return x, slots
        if self.form == "before":
            return self.function(x, arguments=arguments), slots
        if self.form == "after":
            return self.function(x, arguments["g"], arguments=arguments), slots
        result = self.function(x, slots, arguments=arguments)
        is_pair = isinstance(result, tuple) and len(result) == 2
        if (
            not is_pair
            or not isinstance(result[1], dict)
            or set(result[1]) != set(slots)
        ):
            raise TypeError(
                f"`{self.function.function.__name__}`, the function of a stage, must "
                f"return `(x, slots)`, where `slots` is a dict with the keys "
                f"{list(slots)}. Received: {result!r}"
            )
        return result


@dataclasses.dataclass(frozen=True)
class BoundEvaluation:
    """An `Evaluation`, bound."""

    to_evaluation: Bound
    to_training: Bound


@dataclasses.dataclass(frozen=True)
class TrainedVariable:
    """What is fixed about one trained variable.

    Attributes:
        rule: bound; the same object for variables that are trained alike.
        part: the name of its rule, for people.
        stages: the keys of the stages that act on it.
        learning_rate_multipliers: the owner and the name of each number that
            the learning rate is multiplied by.
        decays: whether the stage of weight decay acts on it.
        decay: the owner and the name of the number that decays it; None for none.
        matrices: how the rule looks at it; None if as it is.
        input_axes: those along which the weights of an output unit lie.
        starts_at_weight: the key of the rule or stage and the symbol of the slots that
            do.
        is_stack: whether it is several variables, along the first axis of each tensor.
        members: the indices of a stack's variables.
    """

    index: int
    shape: tuple[int, ...]
    dtype: str
    constraint: Callable | None
    rule: Bound
    part: str
    stages: frozenset[str]
    learning_rate_multipliers: tuple[tuple[int, str], ...]
    decays: bool
    decay: tuple[int, str] | None
    matrices: Matrices | None
    input_axes: tuple[int, ...]
    starts_at_weight: tuple[tuple[str, str], ...]
    is_stack: bool = False
    members: tuple[int, ...] = ()

    @property
    def compute_dtype(self) -> str:
        return precision.compute_dtype(self.dtype)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is fixed about an optimizer once it is built.

    Attributes:
        numbers: the hyperparameters that are numbers and in use, in order:
            (owner, name) -> descriptor.
        stages: what stands around the rule, in order.
        model: the optimizer's own model rule, or None.
        upkeep: work on the slots of all tensors together, or None.
        evaluation: how to go to other weights for evaluation, or None. The
            model's slot `EVALUATING` tells which are in place.
        rounding: one of `precision.ROUNDINGS`.
        elementwise: whether each element's step depends on it alone.
        is_for_tpu: whether the program is one for a TPU, where other ways are best:
            see `uses_select` and `checks_finite_by_products`.
    """

    numbers: dict[tuple[int, str], Any]
    stages: tuple[BoundStage, ...]
    model: BoundModelRule | None
    upkeep: Bound | None
    evaluation: BoundEvaluation | None
    rounding: str
    elementwise: bool
    is_for_tpu: bool = False

    @functools.cached_property
    def accumulation_steps(self) -> int:
        """Gradients summed up for one update."""
        stage = next(self.at("accumulation"), None)
        return 1 if stage is None else stage.function.fixed["steps"]

    @property
    def clip(self) -> str | None:
        """The clipping argument that is set, or None."""
        return next((stage.key for stage in self.at("clipping")), None)

    @property
    def needs_norms(self) -> bool:
        return self.clip in ("clipnorm", "global_clipnorm")

    @property
    def clips(self) -> bool:
        """Whether a gradient whose squares overflow may be clipped to one that fits."""
        return any(x.clips for x in self.stages)

    @property
    def measures_received(self) -> bool:
        """Whether norms and the finite check are those of the gradients received."""
        accumulates = self.accumulation_steps > 1 and self.clips
        return not (any(self.at("received")) or accumulates)

    @property
    def uses_select(self) -> bool:
        """Whether a step to be skipped is computed and not taken.

        Else it goes through another branch, which would copy stacks.
        """
        return self.is_for_tpu and self.accumulation_steps == 1

    @property
    def checks_finite_by_products(self) -> bool:
        """Whether matrix products tell if the gradient is finite.

        The rules that look at whole tensors have sums of their own over them, which
        share their loop with squares.
        """
        squares = self.needs_norms or not self.elementwise
        return self.is_for_tpu and self.measures_received and not squares

    @property
    def decides(self) -> bool:
        """Whether a stage may skip a step."""
        return any(stage.decides for stage in self.stages)

    @property
    def moves_all(self) -> bool:
        """Whether a step moves something of variables without a gradient, too."""
        averages = any(stage.where == "average" for stage in self.stages)
        return averages or self.accumulation_steps > 1 or self.evaluation is not None

    def at(self, where: str) -> Iterator[BoundStage]:
        """The stages of one place, in order."""
        return (stage for stage in self.stages if stage.where == where)

    def update_number(self, iterations: Any) -> Any:
        """The number of the update that comes after so many micro-steps, from 1."""
        return iterations // self.accumulation_steps + 1

    def functions(self) -> Iterator[Bound]:
        """The functions that it calls, other than the rules of variables."""
        evaluation = self.evaluation
        bound = [self.upkeep]
        bound += [x for stage in self.stages for x in (stage.function, stage.look)]
        bound += [x for _, model in self.models() for x in (model.rule, model.measure)]
        bound.append(None if evaluation is None else evaluation.to_training)
        return (x for x in bound if x is not None)

    def models(self) -> Iterator[tuple[int, BoundModelRule]]:
        """The rules for the whole model, by owner, in their order."""
        for stage in self.stages:
            if stage.model is not None:
                yield stage.owner, stage.model
        if self.model is not None:
            yield OPTIMIZER, self.model


@dataclasses.dataclass
class Pairs:
    """The hyperparameters of a step as scalars: each and 1 minus it, in `dtype`."""

    dtype: str
    each: list[tuple[Any, Any]]

    @classmethod
    def of(cls, pairs: Any) -> Pairs:
        """Taken apart out of a tensor of shape `(n, 2)`, all at once; or as they are."""
        if isinstance(pairs, cls):
            return pairs
        dtype = keras.backend.standardize_dtype(pairs.dtype)
        flat = ops.unstack(ops.reshape(pairs, (-1,))) if pairs.shape[0] else []
        return cls(dtype, list(zip(flat[::2], flat[1::2], strict=True)))


@dataclasses.dataclass
class Scalars:
    """The numbers of one step, as tensors.

    Attributes:
        iterations: integer, micro-steps so far.
        learning_rate: float.
        pairs: of shape `(len(plan.numbers), 2)`: value and 1 minus value; or `Pairs`.
        model: owner -> symbol -> the model's slots before this step.
        missed: integers, what each variable missed of the updates; None if all
            have the model's count. See `tf_effopt.engine.counts`.
        of_each: dtype -> name -> for each variable a number that follows from its
            count; None where they are made when they are asked for.
        present: for each variable of a program a boolean, whether it has a gradient; one
            that hasn't got is passed a stand-in. None where gradients are what they are.
    """

    iterations: Any
    learning_rate: Any
    pairs: Any
    model: dict[int, dict[str, Any]]
    missed: Any = None
    of_each: dict[str, dict[str, list[Any]]] | None = None
    present: list[Any] | None = None


def smallest_of_each(
    variables: list[TrainedVariable], kind: Callable[[TrainedVariable], Hashable]
) -> dict[Hashable, int]:
    """Kind -> the position of its smallest variable: enough for a trial."""
    smallest: dict[Hashable, int] = {}
    for i, v in enumerate(variables):
        best = smallest.setdefault(kind(v), i)
        if math.prod(v.shape) < math.prod(variables[best].shape):
            smallest[kind(v)] = i
    return smallest
