"""Compiled updates: what XLA runs, shared by all optimizers of one structure."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import keras
import tensorflow as tf

from tf_effopt.engine import stages
from tf_effopt.engine.arguments import Arguments
from tf_effopt.engine.inputs import Inputs
from tf_effopt.engine.matrices import Share
from tf_effopt.engine.plan import Plan, Scalars, TrainedVariable
from tf_effopt.engine.sent import sent
from tf_effopt.engine.sparse import SparseRows
from tf_effopt.runtime.flat_function import FlatFunction, function_of
from tf_effopt.runtime.sparse_input import is_sparse
from tf_effopt.runtime.structure import is_own, structure
from tf_effopt.runtime.watching import watchers

MOST_SHARED = 64  # structures, the latest ones

_shared: collections.OrderedDict[Hashable, Update] = collections.OrderedDict()


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is fixed about a tensor."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, variable: tf.Variable) -> Kind:
        return cls(tuple(variable.shape), variable.dtype.name)


@dataclasses.dataclass(eq=False)
class Update:
    """The update of the variables on one device of one replica.

    It gets the variables' handles as arguments, so that all optimizers of one structure
    share what is traced and compiled. (TensorFlow would trace with the variables of
    the first one, and then miss them.)

    Attributes:
        device: where it runs.
        plan, variables: what is fixed.
        kinds: for each variable a dict as its state: shape and dtype of each tensor.
        is_compiled: whether XLA compiles it.
        is_inlined: whether it is a part of a step that is compiled as a whole.
        stacks_matrices: see `Inputs`.
        replicas: how many there are.
    """

    device: str
    plan: Plan
    variables: list[TrainedVariable]
    kinds: list[dict]
    is_compiled: bool
    is_inlined: bool
    stacks_matrices: bool
    replicas: int

    def __post_init__(self) -> None:
        self.run = self._function(self._run)
        self.measure = self._function(self._measure)
        self.matrix_share = self._function(self._matrix_share)
        self.sent = self._function(self._sent)
        self.keep = self._function(self._keep)

    def _function(self, python_function: Callable) -> Callable:
        if self.is_inlined:
            return python_function
        options = {"jit_compile": True} if self.is_compiled else {}
        return FlatFunction(python_function, **options)

    def _inputs(
        self,
        flat_state: list[Any],
        gradients: list[Any],
        scalars: tuple,
        totals: dict | None,
        matrix_steps: dict | None = None,
    ) -> Inputs:
        return Inputs(
            self.plan,
            self.variables,
            tf.nest.map_structure(_read, self._nested(flat_state), self.kinds),
            [_rows(g) for g in gradients],
            Scalars(*scalars),
            totals,
            matrix_steps,
            stacks_matrices=self.stacks_matrices,
        )

    def _nested(self, flat_state: list[Any]) -> list[dict]:
        return tf.nest.pack_sequence_as(self.kinds, flat_state)

    def _run(
        self,
        flat_state: list[Any],
        gradients: list[Any],
        scalars: tuple,
        totals: dict | None,
        matrix_steps: dict | None,
    ) -> tuple:
        inputs = self._inputs(flat_state, gradients, scalars, totals, matrix_steps)
        after, outcome = stages.step(inputs)
        variables = self._nested(flat_state)
        for own, old, new in zip(variables, inputs.state, after, strict=True):
            assign(own, old, new)
        return outcome.finite, outcome.counted, outcome.model

    def _measure(
        self,
        flat_state: list[Any],
        phase: str,
        gradients: list[Any],
        scalars: tuple,
        totals: dict,
    ) -> dict[str, Any]:
        inputs = self._inputs(flat_state, gradients, scalars, totals)
        return stages.partial_sums(inputs, phase)

    def _matrix_share(
        self,
        flat_state: list[Any],
        gradients: list[Any],
        scalars: tuple,
        totals: dict | None,
        replica: Any,
    ) -> dict:
        share = Share(replica, self.replicas)
        return stages.matrix_share(
            self._inputs(flat_state, gradients, scalars, totals), share
        )

    def _sent(
        self, flat_state: list[Any], gradients: list[Any], scalars: tuple
    ) -> tuple[list[Any], list[dict]]:
        return sent(self._inputs(flat_state, gradients, scalars, None))

    def _keep(self, flat_state: list[Any], after: list[dict], is_due: Any) -> None:
        state = self._nested(flat_state)
        before = tf.nest.map_structure(_read, state, self.kinds)
        for own, old, new in zip(state, before, after, strict=True):
            now = stages.where(is_due, new, {key: old[key] for key in new})
            assign(own, old, old | now)


def shared_update(
    device: str,
    plan: Plan,
    variables: list[TrainedVariable],
    state: list[dict],
    **options: Any,
) -> Update:
    """The `Update` of this structure, which is made for the first that has it.

    One that calls a user's function, such as a rule or a constraint, isn't shared: what
    the function looks at may have changed since, and is to be freed with the optimizer.
    """
    kinds = [
        # A weight's variable may leave its shape open.
        {"weight": Kind(v.shape, v.dtype)}
        | {k: tf.nest.map_structure(Kind.of, x) for k, x in s.items() if k != "weight"}
        for v, s in zip(variables, state, strict=True)
    ]
    fixed = [device, plan, variables, kinds]
    whole = [*fixed, options, watchers(), keras.config.floatx()]
    key = structure(whole)
    if not is_own(key):
        return Update(*fixed, **options)
    if key not in _shared:
        _shared[key] = Update(*fixed, **options)
    _shared.move_to_end(key)
    while len(_shared) > MOST_SHARED:
        _shared.popitem(last=False)
    return _shared[key]


class Program:
    """An `Update` of an optimizer's variables on one device of one replica.

    Args:
        update: of a structure that these variables have.
        state: for each variable its `tf.Variable`s on this device and replica.
        positions: for each variable the position of its gradient in the list
            that `apply` received, or None.
    """

    def __init__(self, update: Update, state: list[dict], positions: list[int | None]):
        self.update = update
        self.positions = positions
        self.flat_state = tf.nest.flatten(state)
        if not update.is_inlined:
            self.flat_state = [variable.handle for variable in self.flat_state]
        self._inlined = function_of(self._run)
        self._numbers_of_each = FlatFunction(self._make_numbers_of_each)

    @property
    def device(self) -> str:
        return self.update.device

    def run(
        self,
        gradients: list[Any],
        scalars: Scalars,
        totals: dict | None,
        matrix_steps: dict | None,
    ) -> stages.Outcome:
        """Updates the variables."""
        run = self._inlined if self.update.is_inlined else self._run
        with tf.device(self.device):
            found = run(self._own(gradients), plain(scalars), totals, matrix_steps)
        return stages.Outcome(*found)

    def _run(self, gradients: list[Any], scalars: tuple, *others: Any) -> tuple:
        scalars = self._with_presence(Scalars(*scalars))
        scalars = self._with_numbers_of_each(scalars)
        return self.update.run(self.flat_state, gradients, plain(scalars), *others)

    # In the compiled program the numbers of each variable would be slices of vectors,
    # and XLA, which compiles the update of variables of one shape once, would compile one
    # for each slice. Here they become scalars.

    def _with_presence(self, scalars: Scalars) -> Scalars:
        """With what of these variables has a gradient."""
        if scalars.present is None:
            return scalars
        each = tf.unstack(scalars.present)
        present = [each[v.index] for v in self.update.variables]
        return dataclasses.replace(scalars, present=present)

    def _with_numbers_of_each(self, scalars: Scalars) -> Scalars:
        """With the numbers that follow from each variable's count."""
        model = self.update.plan.model
        if scalars.missed is None or model is None or not model.each_count:
            return scalars
        is_eager = tf.executing_eagerly()
        make = self._numbers_of_each if is_eager else self._make_numbers_of_each
        of_model = dataclasses.replace(scalars, present=None)
        return dataclasses.replace(scalars, of_each=make([], plain(of_model)))

    def _make_numbers_of_each(
        self, _: list[Any], scalars: tuple
    ) -> dict[str, dict[str, list[Any]]]:
        arguments = Arguments(self.update.plan, Scalars(*scalars))
        dtypes = sorted({v.compute_dtype for v in self.update.variables})
        return {dtype: arguments.of_each(dtype) for dtype in dtypes}

    def matrix_share(
        self, gradients: list[Any], scalars: Scalars, totals: dict | None
    ) -> dict:
        """This replica's share of the work on matrices."""
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        with tf.device(self.device):
            return self.update.matrix_share(
                self.flat_state,
                self._own(gradients),
                plain(self._with_presence(scalars)),
                totals,
                tf.convert_to_tensor(replica),
            )

    def sent(self, gradients: list[Any], scalars: Scalars) -> tuple[list, list[dict]]:
        """What this replica sends of these gradients, and its next slots."""
        with tf.device(self.device):
            return self.update.sent(
                self.flat_state, self._own(gradients), plain(scalars)
            )

    def keep(self, after: list[dict], is_due: Any) -> None:
        """Writes what `sent` returned, if `is_due`."""
        with tf.device(self.device):
            self.update.keep(self.flat_state, after, is_due)

    def measure(
        self, phase: str, gradients: list[Any], scalars: Scalars, totals: dict
    ) -> dict[str, Any]:
        """This device's share of what a phase sums up."""
        own, numbers = self._own(gradients), plain(self._with_presence(scalars))
        with tf.device(self.device):
            return self.update.measure(self.flat_state, phase, own, numbers, totals)

    def _own(self, gradients: list[Any]) -> list[Any]:
        return [None if p is None else gradients[p] for p in self.positions]


def plain(scalars: Scalars) -> tuple:
    """As `tf.function` can take them."""
    return tuple(getattr(scalars, field.name) for field in dataclasses.fields(scalars))


def _rows(gradient: Any) -> Any:
    """Stage 2 for a sparse gradient: repeated rows are summed."""
    if not is_sparse(gradient):
        return gradient
    return SparseRows.sum_repeated(gradient.indices, gradient.values)


def _read(handle: Any, kind: Kind) -> tf.Tensor:
    if isinstance(handle, tf.Variable):
        value = tf.convert_to_tensor(handle)
    else:
        value = tf.raw_ops.ReadVariableOp(resource=handle, dtype=kind.dtype)
    if value.shape.is_fully_defined():
        return value
    return tf.ensure_shape(value, kind.shape)


def assign(variables: dict, before: dict, after: dict) -> None:
    """Writes nested tensors to variables or their handles; not what is as it was."""
    for k, variable in variables.items():
        if isinstance(variable, dict):
            assign(variable, before[k], after[k])
        elif after[k] is before[k]:
            continue
        elif isinstance(variable, tf.Variable):
            variable.assign(after[k])
        else:
            tf.raw_ops.AssignVariableOp(resource=variable, value=after[k])
