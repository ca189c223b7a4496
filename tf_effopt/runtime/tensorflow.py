"""The engine of Keras's TensorFlow backend, under each `tf.distribute` strategy.

Gradients are all-reduced first. Everything after that is one compiled program
per replica and device, over the variables that live there.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tf_effopt.engine import stages
from tf_effopt.engine.plan import OPTIMIZER, Scalars
from tf_effopt.engine.sent import SENT
from tf_effopt.runtime import reduction
from tf_effopt.runtime.base import Engine
from tf_effopt.runtime.choice import Programs, compiles_steps
from tf_effopt.runtime.programs import assign
from tf_effopt.runtime.sparse_input import is_sparse
from tf_effopt.runtime.tracing import in_any_trace
from tf_effopt.runtime.variables import local_component, mapped, tf_variable
from tf_effopt.state.variables import path_of

do_not_convert = tf.autograph.experimental.do_not_convert


class TensorFlowEngine(Engine):
    """Runs the stages as compiled programs, one per replica and device."""

    def __init__(self, optimizer: Any):
        super().__init__(optimizer)
        self.strategy = tf.distribute.get_strategy()
        self._pairs: tf.Variable | None = None
        self._skipped: tf.Variable | None = None
        self._missed: tf.Variable | None = None

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

    def finish_build(self) -> None:
        self.is_lazy = self.optimizer.lazy
        self.programs = Programs(self)
        self._changes_sent = any(self.plan.at(SENT))
        is_for_tpu = compiles_steps(self.strategy)
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
                np.zeros(len(self.state), "int64"),
                trainable=False,
                aggregation=only_first,
            )

    def set_hyperparameter(self, owner: Any, name: str, value: Any) -> None:
        key = self.owner_index(owner), name
        if key in self.plan.numbers:
            pairs = self._pairs.numpy()
            row = list(self.plan.numbers).index(key)
            pairs[row] = np.array([value, 1.0 - value], "float64")
            self._pairs.assign(pairs)

    # -------------------------------------------------------------- running

    def apply(self, gradients: list[Any], indices: list[int]) -> Any:
        self._check_context()
        received = map(self._received, gradients, indices)
        sent, remember = self._sent(list(received), indices)
        received = self._all_reduce_gradients(sent)
        programs, gradients, present = self.programs.of(received, indices)
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
        if (
            self.communication.divides_matrices
            and self.strategy.num_replicas_in_sync > 1
        ):
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
        remember(outcome)
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
        if self.is_lazy:
            values = tf.convert_to_tensor(gradient.values)
            return tf.IndexedSlices(values, tf.cast(gradient.indices, "int32"))
        # This sums rows that occur twice, before anything non-linear.
        rows = tf.IndexedSlices(gradient.values, gradient.indices, tf.constant(shape))
        return tf.convert_to_tensor(rows)

    def _sent(
        self, gradients: list[Any], indices: list[int]
    ) -> tuple[list[Any], Callable[[stages.Outcome], None]]:
        """What this replica sends, and what writes its slots if a step is taken."""
        if not self._changes_sent:
            return gradients, lambda outcome: None
        scalars = self.scalars()
        programs = self.programs.of_sent(indices)
        results = [program.sent(gradients, scalars) for program in programs]
        changed = list(gradients)
        for program, (own, _) in zip(programs, results, strict=True):
            for position, g in zip(program.positions, own, strict=True):
                changed[position] = g

        def remember(outcome: stages.Outcome) -> None:
            is_taken = outcome.counted > 0
            for program, (_, slots) in zip(programs, results, strict=True):
                program.keep(slots, is_taken)

        return changed, remember

    def _all_reduce_gradients(self, gradients: list[Any]) -> list[Any]:
        if self.strategy.num_replicas_in_sync == 1:
            return gradients
        for_tpu = compiles_steps(self.strategy)
        reduce = reduction.all_reduce_rows if for_tpu else reduction.all_reduce
        dtype = self.communication.gradient_dtype
        if dtype is None:
            return reduce(gradients)
        sent = [reduction.cast(g, dtype) for g in gradients]
        pairs = zip(reduce(sent), gradients, strict=True)
        return [reduction.cast(total, g.dtype) for total, g in pairs]

    def _known_totals(self, gradients: list[Any], indices: list[int]) -> dict | None:
        """What of all replicas is known before their programs run."""
        if self.strategy.num_replicas_in_sync == 1 or not (
            reduction.share_memory(self.strategy) and self.plan.measures_received
        ):
            return None
        dtypes = {self.variables[i].compute_dtype for i in indices}
        dtypes |= {g.dtype.name for g in gradients}
        if any(is_sparse(g) for g in gradients) or dtypes != {self.scalar_dtype}:
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
        agree = present is None and self.counts_agree()
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

    def counts_agree(self) -> bool:
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
