"""Other optimizers made of one: for other variables, and copies."""

from __future__ import annotations

from typing import Any, Self

import keras
import numpy as np

from tf_effopt.base import copies
from tf_effopt.base.checkpoint import BUILT_ON, EXCLUSIONS
from tf_effopt.base.groups import Group
from tf_effopt.engine import counts
from tf_effopt.state.variables import paths_and_shapes


class CarryingOver(keras.optimizers.Optimizer):
    """The part of `Optimizer` that hands its state to another one."""

    def carry_over(
        self,
        variables: list[Any],
        groups: list[Group] | None = None,
        **settings: Any,
    ) -> Self:
        """Returns this optimizer for other variables, with the state it has.

        For after layers were frozen, unfrozen or added: the state of variables
        that both know goes on, that of the others starts anew.

        Bias correction counts the updates of each variable. Counts that differ are an
        extra record, `missed_updates`, in `.keras` and `.weights.h5` files and in
        `tf.train.Checkpoint`; Keras's optimizers can't load such a file.

        Args:
            variables: those that the new optimizer is to train.
            groups: None for this one's groups, or others, as in the constructor.
            **settings: arguments of the constructor that are to be others, such as
                `roles=tf_effopt.roles(model)` after a layer was added.

        Returns:
            An optimizer with this one's settings, built on `variables`.
        """
        other = self._unbuilt_copy(groups=groups, settings=settings)
        if other._built_on and self.built:
            own = {
                self._var_key(v): known
                for v, known in zip(
                    self._trainable_variables, self._built_on, strict=True
                )
            }
            other._built_on = [
                own.get(self._var_key(v), known)
                for v, known in zip(variables, paths_and_shapes(variables), strict=True)
            ]
        other.build(variables)
        if not self.built:
            return other
        indices = self._trainable_variables_indices
        other._take_state(self, [indices.get(self._var_key(v)) for v in variables])
        other._iterations.assign(keras.ops.copy(self._iterations.value))
        return other

    def _take_state(self, other: Self, places: list[int | None]) -> None:
        """Takes that of another optimizer, given where it has each variable."""
        mine, its = self._engine, other._engine
        taken: list[int | None] = [None] * len(places)
        for i, place in enumerate(places):
            if place is None or its.state[place] is None:
                continue
            if its.variables[place].part == mine.variables[i].part:
                _copy_state(its.state[place], mine.state[i])
                taken[i] = None if place in other._frozen else place
        _copy_state(its.model_state, mine.model_state)
        steps = int(keras.ops.convert_to_numpy(other._iterations))
        missed = its.missed()
        missed = counts.missed_updates(
            steps // (self.gradient_accumulation_steps or 1),
            steps // (other.gradient_accumulation_steps or 1),
            np.zeros(len(its.state), "int64") if missed is None else missed,
            taken,
        )
        # Where no rule has anything to do, there is nothing to count.
        missed[[tensors is None for tensors in mine.state]] = 0
        mine.set_missed(missed)

    def _unbuilt_copy(
        self, groups: Any = None, memo: dict | None = None, settings: dict | None = None
    ) -> Self:
        config, memo = self.get_config(), memo or {}
        for name in (EXCLUSIONS, BUILT_ON):
            config.pop(name, None)
        if not isinstance(self._learning_rate, keras.Variable):
            config["learning_rate"] = self._learning_rate
        for name in ("transforms", "averaging"):
            stages = getattr(self, name)
            config[name] = [x.from_config(x.get_config()) for x in stages]
        groups_are_kept = groups is None
        if groups_are_kept:
            groups = [group.copy(memo) for group in self.groups]
        config["groups"] = groups
        config |= settings or {}
        with self._engine.building():  # under this one's strategy
            other = type(self)(**config)
        other._decay_exclusions = self._decay_exclusions.copy(memo)
        if groups_are_kept and not settings:  # Else the user goes by paths as they are.
            other._built_on = self._built_on
        if self._state_to_load is not None:
            other._state_to_load = self._state_to_load
            other._numbers_before = self._numbers_before
            other._may_skip_state = self._may_skip_state
            other._missed_to_load = self._missed_to_load
            other._iterations.assign(keras.ops.copy(self._iterations.value))
        return other

    def __deepcopy__(self, memo: dict) -> Self:
        """A second optimizer with the same state, for the same variables.

        In a deep copy of a whole model, for the copies of its variables.
        """
        other = self._unbuilt_copy(memo=memo)
        memo[id(self)] = other
        other._unpickled_from = self._unpickled_from
        if self.built:
            copied = copies.copied_variables(memo)
            other.build([copied.get(id(v), v) for v in self._trainable_variables])
            for mine, copied in zip(self.variables, other.variables, strict=True):
                copied.assign(keras.ops.copy(mine.value))
            other._engine.set_missed(self._engine.missed())
        return other

    def __reduce__(self) -> tuple:
        """`pickle`'s: with the state, which waits for `build`."""
        return copies.reduced(super().__reduce__(), self)

    def __sklearn_clone__(self) -> Self:
        """scikit-learn's `clone`, whose copies are to be fitted anew."""
        return copies.fresh(self)


def _copy_state(source: dict, target: dict) -> None:
    for name, variable in target.items():
        if name not in source or name == "weight":
            continue
        if isinstance(variable, dict):
            _copy_state(source[name], variable)
        else:
            variable.assign(keras.ops.copy(source[name].value))
