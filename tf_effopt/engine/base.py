"""What the engines of all backends share."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from tf_effopt import precision
from tf_effopt.engine import stages
from tf_effopt.hyperparameters import Number

# Arguments of a rule that aren't hyper-parameters of its class.
STEP_ARGUMENTS = ("t", "learning_rate", "w")
CLIP_ARGUMENTS = ("clipnorm", "clipvalue", "global_clipnorm")
STAGE_ARGUMENTS = (
    *CLIP_ARGUMENTS,
    "weight_decay",
    "ema_momentum",
    "ema_overwrite_frequency",
    "loss_scale_factor",
)


class Engine:
    """Runs the stages for one optimizer.

    Attributes:
        state: for each variable a dict of Keras variables: `weight`, `slots`,
            and if the plan has them `accumulator`, `average` and
            `compensation`. None for a variable that isn't trained by a rule.
    """

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer
        self.state: list[dict | None] = []
        self.variables: list[stages.TrainedVariable | None] = []
        self.plan: stages.Plan | None = None

    # ------------------------------------------------------------- building

    def building(self) -> contextlib.AbstractContextManager:
        """The context in which the state is to be made."""
        return contextlib.nullcontext()

    def colocated(self, variable: Any) -> contextlib.AbstractContextManager:
        """The context that puts a slot on the device of its weight."""
        return contextlib.nullcontext()

    def check_variable(self, variable: Any) -> None:
        """Raises `ValueError` if this engine can't train `variable`."""

    def build(self, state: list[dict | None]) -> None:
        """Fixes the plan; `state` is as in the class's docstring."""
        optimizer = self.optimizer
        self.state = state
        self.plan = make_plan(optimizer)
        self.variables = [
            None if tensors is None else self._describe(tensors["weight"], i)
            for i, tensors in enumerate(state)
        ]

    def _describe(self, variable: Any, index: int) -> stages.TrainedVariable:
        return stages.TrainedVariable(
            index=index,
            shape=tuple(variable.shape),
            dtype=dtype_name(variable),
            decays=self.optimizer._decays(variable, index),
            constraint=getattr(variable, "constraint", None),
        )

    def involved(self, indices: list[int]) -> list[int]:
        """The variables that a step with gradients of `indices` changes."""
        if self.plan.ema or self.plan.accumulation_steps > 1:
            return [i for i, tensors in enumerate(self.state) if tensors is not None]
        return indices

    @property
    def scalar_dtype(self) -> str:
        """float32; float64 if any weight has it."""
        wide = any(v and v.compute_dtype == "float64" for v in self.variables)
        return "float64" if wide else "float32"

    def hyperparameters(self) -> np.ndarray:
        """Each number and 1 minus it, rounded once from float64."""
        rows = []
        for name in self.plan.scalars:
            value = getattr(self.optimizer, name)
            rows.append((value, 1.0 - value))
        return np.array(rows or np.zeros((0, 2)), "float64").astype(self.scalar_dtype)

    def make_scalars(self, iterations: Any, learning_rate: Any, pairs: Any) -> Any:
        return stages.Scalars(
            iterations, learning_rate, pairs, list(self.plan.scalars), self.plan.scalars
        )

    def set_hyperparameter(self, name: str, value: Any) -> None:
        """Called before a number changes after the optimizer was built."""

    # -------------------------------------------------------------- running

    def apply(self, gradients: list[Any], indices: list[int]) -> Any:
        """Runs one step; returns whether the gradient was finite.

        Args:
            gradients: one for each of `indices`, none of them None.
            indices: of the trained variables.
        """
        raise NotImplementedError

    def count_step(self) -> Any:
        """A step in which no rule has anything to do; returns true."""
        iterations = self.optimizer._iterations
        self.assign_alike(iterations, iterations + 1)
        return ops.equal(iterations, iterations)

    def assign_alike(self, variable: Any, value: Any) -> None:
        """Writes what every replica has computed alike."""
        variable.assign(value)

    def finite_everywhere(self, finite: Any) -> Any:
        """Whether `finite` is true on every replica."""
        return finite

    def overwrite_with_averages(self) -> None:
        """Puts the averages in the place of the weights."""
        for tensors in self.state:
            if tensors is not None:
                # A copy: JAX can't be handed one array as two variables.
                tensors["weight"].assign(ops.copy(tensors["average"].value))

    def skipped_steps(self) -> int | None:
        """Steps skipped because the gradient wasn't finite."""
        raise NotImplementedError


def make_plan(optimizer: Any) -> stages.Plan:
    """Reads what is fixed off an optimizer."""
    rule = optimizer.rule
    wanted = keyword_arguments(rule)
    scalars, switches = {}, {}
    for name in dict.fromkeys(wanted + STAGE_ARGUMENTS):
        if name in STEP_ARGUMENTS:
            continue
        kind, value = getattr(type(optimizer), name, None), getattr(optimizer, name)
        in_use = name in wanted or not kind.is_off(value)
        if isinstance(kind, Number) and value is not None and in_use:
            scalars[name] = kind
        elif name in wanted:
            switches[name] = value
    # A rule that takes `weight_decay` or another stage's number does itself
    # what the stage would do.
    stage = {name: name in scalars and name not in wanted for name in STAGE_ARGUMENTS}
    return stages.Plan(
        rule=rule,
        scalars=scalars,
        rule_scalars=tuple(name for name in wanted if name in scalars),
        switches=switches,
        takes_t="t" in wanted,
        takes_weight="w" in wanted,
        rounding=optimizer.rounding,
        accumulation_steps=optimizer.gradient_accumulation_steps or 1,
        clip=next((name for name in CLIP_ARGUMENTS if stage[name]), None),
        weight_decay=stage["weight_decay"],
        ema=optimizer.use_ema,
        overwrites=optimizer.use_ema and stage["ema_overwrite_frequency"],
        loss_scale=stage["loss_scale_factor"],
    )


def keyword_arguments(rule: Callable) -> tuple[str, ...]:
    """The names of a rule's keyword-only arguments."""
    return tuple(
        name
        for name, parameter in inspect.signature(rule).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    )


def dtype_name(variable: Any) -> str:
    """The dtype of a Keras variable or a backend's own, as a string."""
    return getattr(variable.dtype, "name", str(variable.dtype))


def check_dtype(variable: Any) -> None:
    dtype = dtype_name(variable)
    if dtype not in ("float32", "float64", *precision.MANTISSA_BITS):
        raise ValueError(
            "Only variables of dtype float32, bfloat16, float16 and float64 can "
            f"be trained. Received: {path_of(variable)} of dtype {dtype}. Pass "
            "`model.trainable_variables`, or make it non-trainable."
        )


def path_of(variable: Any) -> str:
    """A variable's path, on all backends; TensorFlow's own has a name only."""
    return getattr(variable, "path", None) or variable.name
