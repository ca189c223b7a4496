"""What an optimizer does when it is built: its slots and its plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from tf_effopt.base import copies, overrides
from tf_effopt.base.binding import key_of, make_plan, stage_owners
from tf_effopt.base.checks import check_dtype, checked_variables
from tf_effopt.base.groups import check_overlaps, frozen_indices
from tf_effopt.base.selection import Trained
from tf_effopt.base.stage import REPLICATED, Stage
from tf_effopt.engine import counts
from tf_effopt.engine.plan import (
    ACCUMULATION,
    COMPENSATION,
    EMA,
    EVALUATING,
    OPTIMIZER,
    RULE,
)
from tf_effopt.rules import Part, Slot, each_slot, slot_groups
from tf_effopt.runtime import private_names
from tf_effopt.state.precision import compute_dtype, is_narrow
from tf_effopt.state.variables import dtype_name, path_of, resolve_renamed, shape_of


class Building(keras.optimizers.Optimizer):
    """The part of `Optimizer` that makes its state."""

    def build(self, variables: list[Any]) -> None:
        """Makes the state for `variables`.

        Called by the first `apply`, and by `fit`. In a custom training
        loop under a strategy, call it inside `strategy.scope()`.

        Args:
            variables: the trained variables, `model.trainable_variables`.

        Raises:
            ValueError: a variable's dtype can't be trained, it belongs to
                another strategy, or a group has a member that isn't there.
        """
        if not self.built:
            # Once more: a class can be given a method after it was made.
            self.check_overrides()
            overrides.check_instance(self, overrides.IGNORED)
            variables = checked_variables(variables)
            if not variables:
                return  # So Keras builds the optimizer of a model that it loads of `.h5`.
            if self._unpickled_from is not None:
                self._check_origin(variables)
            for variable in variables:
                if not self._overwrite_variable_with_gradient(variable):
                    check_dtype(variable)
                    self._engine.check_variable(variable)
            saved, self._built_on = (
                self._built_on,
                resolve_renamed(variables, self._built_on),
            )
            if set(self._built_on) < set(saved):
                self._built_on_before = saved
            self._find_members(Trained(variables, [path for path, _ in self._built_on]))
            with self._engine.building():
                super().build(variables)  # averages, then accumulators
                state, parts = self._build_state(variables)
                model_state = self._build_model_state(state)
                plan, described = make_plan(self, state, parts)
                self._engine.build(plan, described, state, model_state)
                if self._record_of_missed() is not None:  # By an earlier `restore`.
                    self._handle_deferred_dependencies(
                        counts.MISSED, self._record_of_missed()
                    )
        if self._state_to_load is not None:
            with self._engine.building():
                self._assign_pending_state()
                self._assign_missed()

    def _check_origin(self, variables: list[Any]) -> None:
        """That the state that came with a pickle is of these variables."""
        keys = [self._var_key(v) for v in variables]
        with self._engine.building():
            if not self._unpickled_from.is_of(keys, variables):
                if int(self._iterations) > 0:
                    raise ValueError(copies.of_another_model(self.name, variables))
                # It hasn't trained.
                self._state_to_load = self._missed_to_load = None
        self._unpickled_from = None

    def _find_members(self, trained: Trained) -> None:
        for group in self.groups:
            group.find(trained, is_subset=bool(self._built_on_before))
        check_overlaps(self.groups, trained.paths)
        self._frozen = frozen_indices(self.groups)
        found = self._decay_exclusions.find(trained)
        self._decay_exempt = frozenset(i for places in found for i in places)

    def _build_state(
        self, variables: list[Any]
    ) -> tuple[list[dict | None], list[Part | None]]:
        """Makes the slots; returns each variable's state (see `Engine`) and its rule."""
        own = [not self._overwrite_variable_with_gradient(v) for v in variables]
        parts = [
            part if is_own else None
            for part, is_own in zip(self.parts(self._built_on), own, strict=True)
        ]
        state: list[dict | None] = [
            {"weight": v, RULE: {}} if is_own else None
            for v, is_own in zip(variables, own, strict=True)
        ]
        self._slots_start = len(self.variables)
        for group in slot_groups(parts):
            for tensors, slots in zip(state, group, strict=True):
                for symbol, slot in slots.items():
                    tensors[RULE][symbol] = self._add_slot(tensors["weight"], slot)
        trained = [(i, tensors) for i, tensors in enumerate(state) if tensors]
        for i, tensors in trained:
            if self.gradient_accumulation_steps:
                tensors[ACCUMULATION] = {"sum": self._accumulated_gradients[i]}
            if self.use_ema:
                average = self._model_variables_moving_average[i]
                tensors[EMA] = {"average": average}
            weight = tensors["weight"]
            if self.rounding == "compensated" and is_narrow(dtype_name(weight)):
                lost = self.add_variable_from_reference(weight, name="compensation")
                tensors[COMPENSATION] = {"lost": lost}
        for number, stage in stage_owners(self):
            slots = each_slot(stage.slots)
            for i, tensors in trained if slots else ():
                if stage.acts_on(*self._built_on[i]):
                    tensors[key_of(number, stage)] = {
                        symbol: self._add_slot(tensors["weight"], slot, stage.scope)
                        for symbol, slot in slots.items()
                    }
        return state, parts

    def _build_model_state(self, state: list[dict | None]) -> dict[int, dict]:
        """Makes the slots of rules for the whole model, owner by owner."""
        dtypes = {compute_dtype(dtype_name(t["weight"])) for t in state if t}
        dtype = "float64" if "float64" in dtypes else "float32"
        made: dict[int, dict] = {}
        for number, owner in enumerate(self.owners()):
            slots = dict(owner.model_rule.slots) if owner.model_rule else {}
            if number == OPTIMIZER and self.evaluation is not None:
                slots[EVALUATING] = (EVALUATING, 0.0)
            if slots or owner.model_rule:  # A rule may have none.
                made[number] = {}
            for symbol, (name, start) in slots.items():
                made[number][symbol] = self.add_variable(
                    shape=(),
                    initializer=_filled_with(start),
                    dtype=dtype,
                    aggregation="only_first_replica",
                    name=name,
                )
        return made

    def owners(self) -> list[Any]:
        """The objects that own hyperparameters; this optimizer is the first."""
        return [self, *self.stages(), *self.groups]

    def stages(self) -> list[Stage]:
        """The stages that were passed, in the order in which they run."""
        return [*self.transforms, *self.averaging]

    def part(self, path: str, shape: tuple[int, ...]) -> Part:
        """The rule and the slots of one variable.

        Override it where variables are trained by different rules. Return the
        same object for those that are trained alike.

        Args:
            path: of the variable.
            shape: its shape.
        """
        if self._part is None:
            self._part = Part(self.rule, self.slots)
        return self._part

    def parts(self, variables: list[tuple[str, tuple[int, ...]]]) -> list[Part]:
        """The `part` of each variable, given the path and shape of all of them.

        Override it where one can't be told from another by its path alone.
        """
        return [self.part(path, shape) for path, shape in variables]

    def _add_slot(self, weight: Any, slot: Slot, scope: str = REPLICATED) -> Any:
        shape = shape_of(weight)
        has_meaning = slot.name in ("average", "compensation")  # of another one there
        is_usual = slot.shape is None and scope == REPLICATED
        if is_usual and not slot.starts_at_weight and not has_meaning:
            start = slot.start
            return self.add_variable_from_reference(
                weight,
                name=slot.name,
                initializer=start if callable(start) else _filled_with(start),
            )
        return self._add_beside(
            weight,
            slot.name,
            compute_dtype(dtype_name(weight)),
            shape if slot.shape is None else slot.shape(shape),
            slot.starts_at_weight,
            slot.start if callable(slot.start) else _filled_with(slot.start),
            scope,
        )

    def add_variable_from_reference(
        self, reference_variable: Any, name: str | None = None, initializer="zeros"
    ) -> Any:
        """Makes one slot for a variable, of its shape and beside it.

        As Keras's, but the slots of bfloat16 and float16 weights are float32,
        and an average starts at the weight.
        """
        dtype = dtype_name(reference_variable)
        if name not in ("average", "compensation"):
            dtype = compute_dtype(dtype)
        return self._add_beside(
            reference_variable,
            name or "var",
            dtype,
            shape_of(reference_variable),
            name == "average",
            initializer,
        )

    def _add_beside(
        self,
        weight: Any,
        name: str,
        dtype: str,
        shape: Any,
        starts_at_weight: bool,
        initializer: Any = "zeros",
        scope: str = REPLICATED,
    ) -> Any:
        # Else it starts there at the variable's first update.
        if starts_at_weight and self._engine.has_value(weight):

            def initializer(shape: Any, dtype: Any) -> Any:
                # A copy: on PyTorch the tensor is the weight's own memory.
                return keras.ops.copy(keras.ops.cast(weight, dtype))

        path = path_of(weight).replace("/", "_").replace(":", "_")
        same_shape = tuple(shape) == shape_of(weight)
        options = {
            "shape": shape,
            "initializer": initializer,
            "dtype": dtype,
            "name": f"{path}_{name}",
            "layout": _layout_of(weight) if same_shape else None,
        }
        with self._engine.colocated(weight):
            if scope == REPLICATED:
                return self.add_variable(**options)
            return self._add_variable_per_replica(**options)

    def _add_variable_per_replica(self, **options: Any) -> Any:
        """A variable of which each replica has another value; files hold their sum."""
        with keras.name_scope(self.name, caller=self):
            variable = keras.Variable(
                **options,
                trainable=False,
                aggregation="sum",
                synchronization="on_read",
            )
        self._track_variable(variable)
        return variable


def _filled_with(value: float) -> Callable:
    """An initializer; Keras's `Constant` goes through float32."""

    def initializer(shape: tuple[int, ...], dtype: str) -> Any:
        return keras.ops.convert_to_tensor(np.full(shape, value, dtype))

    return initializer


def _layout_of(weight: Any) -> Any:
    """How a Keras variable is divided among devices on JAX, or None."""
    if not isinstance(weight, keras.Variable):
        return None
    return private_names.attribute(weight, "_layout")
