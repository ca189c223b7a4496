"""What the functions of one step receive by name."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from keras import ops

from tf_effopt.engine.counts import Counts, follows_variables, numbers_of_each
from tf_effopt.engine.plan import OPTIMIZER, Pairs, Plan, Scalars, TrainedVariable
from tf_effopt.hyperparameters import Decay


class Arguments:
    """What rules may ask for by name in one step, or one branch of it."""

    def __init__(self, plan: Plan, scalars: Scalars):
        self.plan = plan
        self.scalars = scalars
        self._pairs = Pairs.of(scalars.pairs)
        self.t = t = plan.update_number(scalars.iterations)
        self.numbers: dict[int, dict[str, Any]] = {}  # owner -> name -> number
        self._cached: dict[tuple[int, str], dict[str, Any]] = {}
        self._zeros: dict[str, Any] = {}
        self._rates: dict[tuple, Any] = {}
        self._numbers_of_each: dict[str, dict[str, list[Any]]] = {}
        self.counts: Counts | None = None
        if scalars.missed is not None:
            self.counts = Counts(t, scalars.missed)

    def anew(self) -> Arguments:
        """The same, of which no tensor has been made yet, and without counts."""
        scalars = dataclasses.replace(self.scalars, missed=None, of_each=None)
        other = Arguments(self.plan, scalars)
        other.numbers = self.numbers
        return other

    def in_branch(self, v: TrainedVariable) -> Arguments:
        """The same for a branch in which `v` is updated.

        What it may ask for is made now, outside of the branch; what is made in it can't
        be used outside.
        """
        self.for_variable(v)
        for stage in self.plan.stages:
            if stage.key in v.stages:
                self.for_stage(v, stage.owner)
        other = copy.copy(self)
        other._cached = {
            key: {name: _unused(x) for name, x in numbers.items()}
            for key, numbers in self._cached.items()
        }
        other._zeros, other._rates = dict(self._zeros), dict(self._rates)
        return other

    def of(self, owner: int, dtype: str) -> dict[str, Any]:
        """Name -> what a function of `owner` on tensors of `dtype` receives."""
        key = owner, dtype
        if key not in self._cached:
            numbers = zip(self.plan.numbers.items(), self._pairs.each, strict=True)
            self._cached[key] = {
                name: kind.as_rule_argument(*(ops.cast(x, dtype) for x in pair))
                for ((whose, name), kind), pair in numbers
                if whose == owner
            }
            if owner == OPTIMIZER and self.follows_variables:
                each = self.counts.each(dtype)
                self._cached[key] |= {
                    name: Decay(x.value, x.complement, each)
                    for name, x in self._cached[key].items()
                    if isinstance(x, Decay)
                }
            self._cached[key] |= {
                "learning_rate": ops.cast(self.scalars.learning_rate, dtype),
                "t": ops.cast(self.t, dtype),
            }
        return self._cached[key] | {
            name: ops.cast(x, dtype) for name, x in self.numbers.get(owner, {}).items()
        }

    def number(self, owner: int, name: str, dtype: str) -> Any:
        return self.of(owner, dtype)[name]

    def _zero(self, dtype: str) -> Any:
        if dtype not in self._zeros:  # One for all variables of a model.
            self._zeros[dtype] = ops.zeros((), dtype)
        return self._zeros[dtype]

    def _learning_rate(self, v: TrainedVariable) -> Any:
        key = v.learning_rate_multipliers, v.compute_dtype
        if key not in self._rates:  # One for all variables of the same groups.
            rate = self.number(OPTIMIZER, "learning_rate", v.compute_dtype)
            for owner, name in v.learning_rate_multipliers:
                rate = rate * self.number(owner, name, v.compute_dtype)
            self._rates[key] = rate
        return self._rates[key]

    @property
    def follows_variables(self) -> bool:
        """Whether what follows from a count is that of each variable."""
        return self.counts is not None and follows_variables(self.plan)

    def counted(self, v: TrainedVariable, index: int) -> dict[str, Any]:
        """What `v`'s rule receives that follows from the count of one variable."""
        if not self.follows_variables:
            return {}
        dtype, names = v.compute_dtype, v.rule.names
        found = {k: x[index] for k, x in self.of_each(dtype).items() if k in names}
        if "t" in names:
            found["t"] = self.counts.each(dtype).scalars[index]
        return found

    def of_each(self, dtype: str) -> dict[str, list[Any]]:
        """Name -> for each variable a number that follows from its count."""
        if self.scalars.of_each is not None:
            return self.scalars.of_each[dtype]
        if dtype not in self._numbers_of_each:
            model, made = self.plan.model, {}
            if model is not None:
                each = self.counts.each(dtype)
                made = numbers_of_each(model, self.of(OPTIMIZER, dtype), each)
            self._numbers_of_each[dtype] = made
        return self._numbers_of_each[dtype]

    def for_variable(self, v: TrainedVariable) -> dict:
        """What its rule receives: learning rate, decay and count are the variable's."""
        return self.for_stage(v, OPTIMIZER) | self.counted(v, v.index)

    def for_stage(self, v: TrainedVariable, owner: int) -> dict:
        """What a stage of `owner` receives: learning rate and decay are the variable's.

        The count is that of the model.
        """
        dtype = v.compute_dtype
        decay = self._zero(dtype) if v.decay is None else self.number(*v.decay, dtype)
        return self.of(owner, dtype) | {
            "learning_rate": self._learning_rate(v),
            "weight_decay": decay,
        }


def _unused(number: Any) -> Any:
    """A decay rate of which no power has been made yet; other numbers as they are."""
    return number.unused() if isinstance(number, Decay) else number
