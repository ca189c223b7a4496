"""What the engines of all backends share."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule

from tf_effopt.engine import counts
from tf_effopt.engine.inputs import Inputs
from tf_effopt.engine.names import check_names
from tf_effopt.engine.plan import (
    COMPENSATION,
    EMA,
    EVALUATING,
    OPTIMIZER,
    Plan,
    Scalars,
    TrainedVariable,
)
from tf_effopt.engine.updates import switched


@dataclasses.dataclass
class Communication:
    """How replicas exchange gradients, and what they divide among them.

    Attributes:
        gradient_dtype: in which they sum up gradients; None: the gradients' own.
        divides_matrices: whether each works on its share of the matrices.
    """

    gradient_dtype: str | None = None
    divides_matrices: bool = False

    def get_config(self) -> dict[str, Any]:
        """What isn't as it is without a choice."""
        default = Communication()
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if value != getattr(default, name)
        }


class Engine:
    """Runs the stages for one optimizer.

    Attributes:
        plan: what is fixed about the optimizer.
        variables: what is fixed about each variable.
        state: for each variable a dict of Keras variables: `weight`, and under the key
            of the rule and of each stage a dict of its slots. None for a variable that
            isn't trained by a rule.
        model_state: owner -> symbol -> Keras variable: the slots of rules for
            the whole model.
        communication: what replicas exchange.
        owners: whose hyperparameters there are: the optimizer, its stages and its
            groups.
    """

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer
        self.owners: list[Any] = [optimizer]
        self.communication = Communication()
        self.state: list[dict | None] = []
        self.model_state: dict[int, dict[str, Any]] = {}
        self.variables: list[TrainedVariable | None] = []
        self.counts_each = False  # whether a variable's own count matters
        self.plan: Plan | None = None
        self.schedules: dict[int, Callable] = {}  # by the row of their number

    # ------------------------------------------------------------- building

    def building(self) -> contextlib.AbstractContextManager:
        """The context in which the state is to be made."""
        return contextlib.nullcontext()

    def colocated(self, variable: Any) -> contextlib.AbstractContextManager:
        """The context that puts a slot on the device of its weight."""
        return contextlib.nullcontext()

    def check_variable(self, variable: Any) -> None:
        """Raises `ValueError` if this engine can't train `variable`."""

    def has_value(self, variable: Any) -> bool:
        """Whether `variable` is initialized: not where `fit` builds the layers."""
        return True

    def build(
        self,
        plan: Plan,
        variables: list[TrainedVariable | None],
        state: list[dict | None],
        model_state: dict[int, dict[str, Any]],
    ) -> None:
        """Fixes what the step does; the arguments are as in the class's docstring."""
        self.plan = plan
        self.variables = variables
        self.state = state
        self.model_state = model_state
        self.owners = self.optimizer.owners()
        for row, (number, kind) in enumerate(plan.numbers.items()):
            value = self._value_of(number)
            if isinstance(value, LearningRateSchedule):
                self.schedules[row] = functools.partial(kind.at, value)
        check_names(self.plan, self.variables, state, model_state)
        self.counts_each = counts.uses_counts(self.plan, self.variables)
        self.finish_build()
        for owner in self.owners[1:]:
            owner.attach(self)

    def finish_build(self) -> None:
        """Makes what the engine of a backend keeps in addition to the state."""

    def variables_to_update(self, indices: list[int]) -> list[int]:
        """The variables that a step with gradients of `indices` changes."""
        if self.plan.moves_all:
            return [i for i, tensors in enumerate(self.state) if tensors is not None]
        return indices

    @property
    def scalar_dtype(self) -> str:
        """float32; float64 if any weight has it."""
        wide = any(v and v.compute_dtype == "float64" for v in self.variables)
        return "float64" if wide else "float32"

    def hyperparameters(self) -> np.ndarray:
        """Each number and 1 minus it, rounded once from float64."""
        values = [
            0.0 if isinstance(value, LearningRateSchedule) else value
            for value in map(self._value_of, self.plan.numbers)
        ]
        rows = [(value, 1.0 - value) for value in values]
        return np.array(rows or np.zeros((0, 2)), "float64").astype(self.scalar_dtype)

    def _value_of(self, number: tuple[int, str]) -> Any:
        """What was set: a number, or a schedule."""
        owner, name = number
        return getattr(self.owners[owner], name)

    def with_schedules(self, pairs: Any) -> Any:
        """The hyperparameters, with the values now of those given by a schedule."""
        for row, schedule in self.schedules.items():
            now = ops.cast(schedule(self.optimizer._iterations), pairs.dtype)
            own = ops.reshape(ops.stack([now, 1.0 - now]), (1, 2))
            pairs = ops.slice_update(pairs, (row, 0), own)
        return pairs

    def set_hyperparameter(self, owner: Any, name: str, value: Any) -> None:
        """Called before a number changes after the optimizer was built."""

    # -------------------------------------------------------------- running

    def apply(self, gradients: list[Any], indices: list[int]) -> Any:
        """Runs one step; returns whether the gradient was finite.

        Args:
            gradients: one for each of `indices`, none of them None.
            indices: of the trained variables.
        """
        raise NotImplementedError

    def trained_indices(self) -> list[int]:
        """The variables that a rule may train: those that aren't frozen."""
        frozen = self.optimizer._frozen
        return [
            i
            for i, tensors in enumerate(self.state)
            if tensors is not None and i not in frozen
        ]

    def without_gradient(self, indices: list[int]) -> list[int]:
        """The trained variables that miss an update of those of `indices`."""
        if not self.counts_each:
            return []
        given = set(indices)
        return [i for i in self.trained_indices() if i not in given]

    def updates_between(self, before: Any, after: Any) -> Any:
        """How many updates there were between two counts of micro-steps."""
        n = self.plan.accumulation_steps
        return after // n - before // n

    def count_missed(self, indices: list[int], updates: Any) -> None:
        """Counts updates that the variables of `indices` missed."""

    def missed(self) -> np.ndarray | None:
        """What each variable missed of the updates; None if all have one count."""
        return None

    def set_missed(self, missed: np.ndarray | None) -> None:
        """Sets what each variable missed of the updates; None for nothing."""

    def count_step(self) -> Any:
        """A step in which no rule has anything to do; returns true."""
        iterations = self.optimizer._iterations
        before = ops.convert_to_tensor(iterations.value)
        for tensors in self.state:
            if tensors is not None and EMA in tensors:
                # It starts here if the weight had no value before.
                average = tensors[EMA]["average"]
                start = _value(tensors["weight"])
                self.assign_alike(
                    average, ops.where(before == 0, start, _value(average))
                )
        absent = self.without_gradient([])
        if absent:
            self.count_missed(absent, self.updates_between(before, before + 1))
        self.assign_alike(iterations, iterations + 1)
        return ops.equal(iterations, iterations)

    def assign_alike(self, variable: Any, value: Any) -> None:
        """Writes what every replica has computed alike."""
        variable.assign(value)

    def finite_everywhere(self, finite: Any) -> Any:
        """Whether `finite` is true on every replica."""
        return finite

    def number_now(self, name: str) -> Any:
        """An optimizer's number in use, as a step that is compiled can read it."""
        return self.optimizer.current(name)

    def overwrite_with_averages(self, indices: list[int]) -> None:
        """Puts the averages of these variables in the place of the weights."""
        for i in indices:
            tensors = self.state[i]
            if tensors is not None:
                # A copy: JAX can't be handed one array as two variables.
                average = _value(tensors[EMA]["average"])
                self.assign_everywhere(tensors["weight"], ops.copy(average))
                if COMPENSATION in tensors:
                    lost = tensors[COMPENSATION]["lost"]
                    self.assign_everywhere(lost, ops.zeros_like(_value(lost)))

    def model_slot(self, owner: Any, symbol: str) -> float:
        """The value now of a slot of a rule for the whole model."""
        slots = self.model_state[self.owner_index(owner)]
        return float(ops.convert_to_numpy(slots[symbol]))

    def owner_index(self, owner: Any) -> int:
        """The place of an owner among `owners`."""
        return next(i for i, x in enumerate(self.owners) if x is owner)

    def switch(self, to_evaluation: bool) -> None:
        """Puts in place the weights to evaluate at, or those to train at."""
        trained = self.trained_indices()
        inputs = Inputs(
            self.plan,
            [self.variables[i] for i in trained],
            [values(self.state[i]) for i in trained],
            [None] * len(trained),
            self.scalars(),
        )
        weights = switched(inputs, to_evaluation)
        for i, value in zip(trained, weights, strict=True):
            self.assign_everywhere(self.state[i]["weight"], value)
        mark = self.model_state[OPTIMIZER][EVALUATING]
        self.assign_everywhere(mark, ops.full_like(mark.value, float(to_evaluation)))

    def scalars(self) -> Scalars:
        """The numbers of a step now, as tensors."""
        optimizer = self.optimizer
        return Scalars(
            ops.convert_to_tensor(optimizer._iterations.value),
            ops.convert_to_tensor(optimizer.learning_rate),
            self.with_schedules(ops.convert_to_tensor(self.hyperparameters())),
            values(self.model_state),
            self.missed(),
        )

    def assign_everywhere(self, variable: Any, value: Any) -> None:
        """Writes a variable outside of a step."""
        variable.assign(value)

    def untracked_variables(self) -> dict[str, Any]:
        """What this engine keeps in variables that neither Keras nor a file knows."""
        return {}

    def skipped_steps(self) -> int | None:
        """Steps skipped because the gradient wasn't finite."""
        raise NotImplementedError


def values(tensors: dict) -> dict:
    """The tensors in a (nested) dict of variables."""
    return {
        k: values(x) if isinstance(x, dict) else _value(x) for k, x in tensors.items()
    }


def _value(variable: Any) -> Any:
    if isinstance(variable, keras.Variable):
        return variable.value
    return ops.convert_to_tensor(variable)
