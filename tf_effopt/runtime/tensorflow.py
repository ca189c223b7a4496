"""The engine of Keras's TensorFlow backend, under each `tf.distribute` strategy.

Gradients are all-reduced first. Everything after that is one compiled program
per replica and device, over the variables that live there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from typing import Any

import numpy as np
import tensorflow as tf

from tf_effopt.engine import stages
from tf_effopt.engine.plan import OPTIMIZER, Plan, Scalars, TrainedVariable
from tf_effopt.runtime import reduction, xla
from tf_effopt.runtime.base import Engine
from tf_effopt.runtime.missing_gradients import MissingGradients
from tf_effopt.runtime.programs import Program, assign, shared_update
from tf_effopt.runtime.tracing import in_any_trace
from tf_effopt.runtime.variables import local_component, mapped, tf_variable
from tf_effopt.runtime.watching import watchers
from tf_effopt.state.tensors import is_sparse
from tf_effopt.state.variables import path_of

log = logging.getLogger("tf_effopt")

ANY_SET = "any set"  # a key of programs that are told which gradients there are

do_not_convert = tf.autograph.experimental.do_not_convert


class TensorFlowEngine(Engine):
    """Runs the stages as compiled programs, one per replica and device."""

    def __init__(self, optimizer: Any):
        super().__init__(optimizer)
        self.strategy = tf.distribute.get_strategy()
        self._programs: dict[tuple, list[Program]] = {}
        self._usual_sets: dict[tuple, tuple] = {}  # the first set of each place
        self._pairs: tf.Variable | None = None
        self._skipped: tf.Variable | None = None
        self._missed: tf.Variable | None = None
        self._warned_of: set[tuple[str, str]] = set()

    # ------------------------------------------------------------- building

    @contextlib.contextmanager
    def building(self):
        # Variables made while a function is traced, be it for the first time or not,
        # must outlive the trace, and those made in a replica's thread must be the
        # strategy's.
        with tf.init_scope(), in_any_trace(self.optimizer):
            if tf.distribute.get_strategy() is self.strategy:
                yield
            else:
                with self.strategy.scope():
                    yield

    def colocated(self, variable: Any) -> contextlib.AbstractContextManager:
        return self.strategy.extended.colocate_vars_with(tf_variable(variable))

    def check_variable(self, variable: Any) -> None:
        replicas = self.strategy.num_replicas_in_sync
        owner = getattr(tf_variable(variable), "distribute_strategy", None)
        if owner is not self.strategy and (owner is not None or replicas > 1):
            raise ValueError(
                f"{path_of(variable)} and this optimizer were made under different "
                "strategies: make the model and the optimizer both inside "
                "`with strategy.scope():`. Received: an optimizer made under "
                f"{type(self.strategy).__name__} with {replicas} replica(s)."
            )

    def has_value(self, variable: Any) -> bool:
        local = local_component(variable)
        with tf.init_scope():
            return bool(tf.raw_ops.VarIsInitializedOp(resource=local.handle))

    def build(
        self,
        plan: Plan,
        variables: list[TrainedVariable | None],
        state: list[dict | None],
        model_state: dict[int, dict[str, Any]],
    ) -> None:
        super().build(plan, variables, state, model_state)
        self._missing_gradients = MissingGradients(self.variables)
        is_for_tpu = _compiles_steps(self.strategy)
        self.plan = dataclasses.replace(self.plan, is_for_tpu=is_for_tpu)
        only_first = tf.VariableAggregation.ONLY_FIRST_REPLICA
        # Outside of what Keras and `tf.train.Checkpoint` track: their number
        # and order of variables stays Keras's.
        self._pairs = tf.Variable(
            self.hyperparameters(), trainable=False, aggregation=only_first
        )
        self._skipped = tf.Variable(
            0, dtype="int64", trainable=False, aggregation=only_first
        )
        if self.counts_each:
            self._missed = tf.Variable(
                np.zeros(len(state), "int64"), trainable=False, aggregation=only_first
            )

    def set_hyperparameter(self, owner: Any, name: str, value: Any) -> None:
        key = self.number_of(owner), name
        if key in self.plan.numbers:
            pairs = self._pairs.numpy()
            row = list(self.plan.numbers).index(key)
            pairs[row] = np.array([value, 1.0 - value], "float64")
            self._pairs.assign(pairs)

    # -------------------------------------------------------------- running

    def apply(self, gradients: list[Any], indices: list[int]) -> Any:
        self._check_context()
        received = map(self._received, gradients, indices)
        received = self._all_reduce_gradients(list(received))
        programs, gradients, present = self._programs_for(received, indices)
        optimizer, scalars = self.optimizer, self.scalars(present)
        if len(programs) == 1:
            totals = self._known_totals(received, indices)
        else:
            # Clipping by a global norm, for one, looks at all devices.
            totals = {}
            for phase in stages.phases(self.plan):
                sums = [p.measure(phase, gradients, scalars, totals) for p in programs]
                totals[phase] = {
                    name: tf.add_n([s[name] for s in sums if name in s])
                    for name in dict.fromkeys(name for s in sums for name in s)
                }
        shares = [None] * len(programs)
        if self.divides_matrices and self.strategy.num_replicas_in_sync > 1:
            # No branch may hold this sum: it comes before the finite check's.
            shares = self._all_reduce_each(
                [p.matrix_share(gradients, scalars, totals) for p in programs]
            )
        outcomes = [
            p.run(gradients, scalars, totals, share)
            for p, share in zip(programs, shares, strict=True)
        ]
        outcome = outcomes[0]  # that of all devices is the same
        assign(mapped(local_component, self.model_state), scalars.model, outcome.model)
        absent = self.without_gradient(indices)
        if absent:
            before = scalars.iterations
            after = before + tf.cast(outcome.counted, before.dtype)
            self.count_missed(absent, self.updates_between(before, after))
        self._count(optimizer._iterations, outcome.counted)
        self._count(self._skipped, tf.logical_not(outcome.finite))
        return outcome.finite

    def _check_context(self) -> None:
        current = tf.distribute.get_strategy()
        if tf.distribute.in_cross_replica_context():
            raise RuntimeError(
                "`apply` was called in the cross-replica context of "
                f"{type(current).__name__}. Call it where a replica runs: inside "
                "the function passed to `strategy.run`."
            )
        if current is not self.strategy and self.strategy.num_replicas_in_sync > 1:
            raise RuntimeError(
                "This optimizer was made under "
                f"{type(self.strategy).__name__} with "
                f"{self.strategy.num_replicas_in_sync} replicas; its `apply` was "
                "called outside of it. Call it inside the function passed to "
                "`strategy.run`."
            )

    def _received(self, gradient: Any, index: int) -> Any:
        """A gradient as it is to be reduced: dense, or rows if asked for."""
        shape = self.variables[index].shape  # that of the slots
        if not is_sparse(gradient):
            gradient = tf.convert_to_tensor(gradient)
            is_known = gradient.shape.is_fully_defined()
            return gradient if is_known else tf.ensure_shape(gradient, shape)
        if self.optimizer.lazy:
            values = tf.convert_to_tensor(gradient.values)
            return tf.IndexedSlices(values, tf.cast(gradient.indices, "int32"))
        # This sums rows that occur twice, before anything non-linear.
        rows = tf.IndexedSlices(gradient.values, gradient.indices, tf.constant(shape))
        return tf.convert_to_tensor(rows)

    def _all_reduce_gradients(self, gradients: list[Any]) -> list[Any]:
        for_tpu = _compiles_steps(self.strategy)
        reduce = reduction.all_reduce_rows if for_tpu else reduction.all_reduce
        if self.gradient_dtype is None or self.strategy.num_replicas_in_sync == 1:
            return reduce(gradients)
        sent = [reduction.cast(g, self.gradient_dtype) for g in gradients]
        pairs = zip(reduce(sent), gradients, strict=True)
        return [reduction.cast(total, g.dtype) for total, g in pairs]

    def _known_totals(self, gradients: list[Any], indices: list[int]) -> dict | None:
        """What of all replicas is known before their programs run."""
        dtypes = {self.variables[i].compute_dtype for i in indices}
        if (
            not reduction.share_memory(self.strategy)
            or not self.plan.measures_received
            or any(is_sparse(g) for g in gradients)
            or {g.dtype.name for g in gradients} | dtypes != {self.scalar_dtype}
        ):
            return None
        return {stages.GRADIENT: {"total": reduction.squared_norm(gradients)}}

    def _all_reduce_each(self, nested: Any) -> Any:
        """The sums over replicas of nested tensors."""
        flat = tf.nest.flatten(nested)
        sums = reduction.all_reduce(flat) if flat else []
        return tf.nest.pack_sequence_as(nested, sums)

    def finite_everywhere(self, finite: Any) -> Any:
        count = reduction.all_reduce([tf.cast(finite, "float32")])[0]
        return count >= self.strategy.num_replicas_in_sync

    def assign_alike(self, variable: Any, value: Any) -> None:
        local_component(variable).assign(value)

    def _count(self, variable: Any, by: Any) -> None:
        local = local_component(variable)
        local.assign_add(tf.cast(by, local.dtype))

    def untracked_variables(self) -> dict[str, tf.Variable]:
        """What this engine keeps that neither Keras nor a checkpoint knows."""
        return {k: v for k, v in vars(self).items() if isinstance(v, tf.Variable)}

    def count_missed(self, indices: list[int], updates: Any) -> None:
        # At run time, not when it is traced: a trace of before must know it as well.
        absent = np.zeros(len(self.state), "int64")
        absent[indices] = 1
        self._count(self._missed, absent * tf.cast(updates, "int64"))

    @property
    def missed_record(self) -> tf.Variable | None:
        """What checkpoints hold of it; None where nothing depends on it."""
        return self._missed

    def missed(self) -> np.ndarray | None:
        missed = None if self._missed is None else self._missed.numpy()
        return missed if missed is not None and missed.any() else None

    def set_missed(self, missed: np.ndarray | None) -> None:
        if self._missed is not None:
            missed = np.zeros(len(self.state), "int64") if missed is None else missed
            self._missed.assign(missed)

    def skipped_steps(self) -> int | None:
        return 0 if self._skipped is None else int(self._skipped.numpy())

    def scalars(self, present: Any = None) -> Scalars:
        optimizer = self.optimizer
        agree = present is None and self._counts_agree()
        return Scalars(
            tf.convert_to_tensor(optimizer._iterations),
            tf.convert_to_tensor(optimizer.learning_rate),
            self.with_schedules(tf.convert_to_tensor(self._pairs)),
            mapped(tf.convert_to_tensor, mapped(local_component, self.model_state)),
            None
            if agree or not self.counts_each
            else tf.convert_to_tensor(self._missed),
            present=present,
        )

    def _counts_agree(self) -> bool:
        """Whether no variable missed an update, now and whenever this trace runs."""
        if self._missed is None:
            return True
        local = local_component(self._missed)
        # Elsewhere the read would wait for the device.
        is_near = tf.DeviceSpec.from_string(local.device).device_type == "CPU"
        return tf.executing_eagerly() and is_near and not local.numpy().any()

    def number_now(self, name: str) -> Any:
        row = list(self.plan.numbers).index((OPTIMIZER, name))
        return self.with_schedules(tf.convert_to_tensor(self._pairs))[row, 0]

    def assign_everywhere(self, variable: Any, value: Any) -> None:
        self.strategy.extended.update(
            tf_variable(variable), lambda v, x: v.assign(x), args=(value,)
        )

    # ------------------------------------------------------------- programs

    def _programs_for(
        self, gradients: list[Any], indices: list[int]
    ) -> tuple[list[Program], list[Any], Any]:
        """The programs of this replica for gradients of these variables.

        The first set of variables gets dedicated programs. All other sets, such as those
        of stochastic depth, share programs that are told which gradients there are.

        Returns:
            The programs; the gradients that they take; a boolean for each variable,
            whether it has a gradient, or None for programs of this set.
        """
        here = self._device_of(indices[0])
        kinds = tuple(is_sparse(g) for g in gradients)
        # What is watched runs as other operations than what isn't.
        place = here, watchers()
        key = (*place, tuple(indices), kinds)
        usual = self._usual_sets.setdefault(place, key)
        any_set = (*place, ANY_SET)
        if not _shares_programs(self) or (
            # A set that comes back isn't compiled anew for counts that differ by now.
            key == usual and (any_set not in self._programs or self._counts_agree())
        ):
            if key not in self._programs:
                self._programs[key] = self._make_programs(indices)
            return self._programs[key], gradients, None
        trained = self.trained_indices()
        if any_set not in self._programs:
            self._programs[any_set] = self._make_programs(trained)
        given = dict(zip(indices, gradients, strict=True))
        filled = [
            self._missing_gradients.filled(
                given.get(i), self.variables[i], self._device_of(i)
            )
            for i in trained
        ]
        present = np.zeros(len(self.state), bool)
        present[indices] = True
        return self._programs[any_set], filled, tf.constant(present)

    def _device_of(self, index: int) -> str:
        """Where a variable is, on this replica."""
        return local_component(self.state[index]["weight"]).device

    def _make_programs(self, indices: list[int]) -> list[Program]:
        positions = {index: position for position, index in enumerate(indices)}
        devices: dict[str, list[int]] = {}
        for i in self.involved(indices):
            devices.setdefault(self._device_of(i), []).append(i)
        is_inlined = _compiles_steps(self.strategy)
        programs = []
        for device, members in devices.items():
            variables = [self.variables[i] for i in members]
            state = [mapped(local_component, self.state[i]) for i in members]
            is_cpu = tf.DeviceSpec.from_string(device).device_type == "CPU"
            update = shared_update(
                device,
                self.plan,
                variables,
                state,
                is_compiled=not is_inlined
                and self.compiles_on(device, variables, state),
                is_inlined=is_inlined,
                stacks_matrices=not is_cpu or is_inlined,
                replicas=self.strategy.num_replicas_in_sync,
            )
            positions_here = [positions.get(i) for i in members]
            programs.append(Program(update, state, positions_here))
        return programs

    def compiles_on(self, device: str, variables: list, state: list[dict]) -> bool:
        """Whether XLA can run this optimizer's update on `device`."""
        if watchers():
            # Nor is a trial made, whose result would outlast the watching.
            self._warn_of(device, "XLA can't compile the operations of `tf.debugging`")
            return False
        failure = xla.update_failure(
            device, self.plan, variables, state, self.model_state
        )
        if failure is not None:
            self._warn_of(device, failure.splitlines()[0])
        return failure is None

    def _warn_of(self, device: str, failure: str) -> None:
        if (device, failure) in self._warned_of:
            return
        self._warned_of.add((device, failure))
        log.warning(
            "%s updates without XLA on %s: %s",
            type(self.optimizer).__name__,
            device,
            failure,
        )


def _shares_programs(engine: TensorFlowEngine) -> bool:
    """Whether all sets of variables with a gradient, but for the first, share programs."""
    # A step that is compiled as a whole is traced for its set; lazy rows are to stay rows.
    return not (_compiles_steps(engine.strategy) or engine.optimizer.lazy)


def _compiles_steps(strategy: tf.distribute.Strategy) -> bool:
    """Whether a strategy compiles whole steps, for TPU; see also `tf_effopt.tpu`."""
    is_tpu = isinstance(strategy, tf.distribute.TPUStrategy)
    return is_tpu or getattr(strategy, "compiles_steps", False)
