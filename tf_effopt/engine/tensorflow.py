"""The engine of Keras's TensorFlow backend, under each `tf.distribute` strategy.

Gradients are all-reduced first. Everything after that is one compiled program
per replica and device, over the variables that live there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from tf_effopt.engine import is_sparse, stages
from tf_effopt.engine.base import Engine, path_of
from tf_effopt.engine.sparse import Rows

log = logging.getLogger("tf_effopt")

do_not_convert = tf.autograph.experimental.do_not_convert


class TensorFlowEngine(Engine):
    """Runs the stages as compiled programs, one per replica and device."""

    def __init__(self, optimizer: Any):
        super().__init__(optimizer)
        self.strategy = tf.distribute.get_strategy()
        self._programs: dict[tuple, list[Program]] = {}
        self._pairs: tf.Variable | None = None
        self._skipped: tf.Variable | None = None
        self._compiles: dict[str, bool] = {}

    # ------------------------------------------------------------- building

    @contextlib.contextmanager
    def building(self):
        # Variables made while a function is traced must outlive the trace, and
        # those made in a replica's thread must be the strategy's.
        with tf.init_scope():
            if tf.distribute.get_strategy() is self.strategy:
                yield
            else:
                with self.strategy.scope():
                    yield

    def colocated(self, variable: Any) -> contextlib.AbstractContextManager:
        return self.strategy.extended.colocate_vars_with(_tf_variable(variable))

    def check_variable(self, variable: Any) -> None:
        replicas = self.strategy.num_replicas_in_sync
        owner = getattr(_tf_variable(variable), "distribute_strategy", None)
        if owner is not self.strategy and (owner is not None or replicas > 1):
            raise ValueError(
                f"{path_of(variable)} and this optimizer were made under different "
                "strategies: make the model and the optimizer both inside "
                "`with strategy.scope():`. Received: an optimizer made under "
                f"{type(self.strategy).__name__} with {replicas} replica(s)."
            )

    def build(self, state: list[dict | None]) -> None:
        super().build(state)
        only_first = tf.VariableAggregation.ONLY_FIRST_REPLICA
        # Outside of what Keras and `tf.train.Checkpoint` track: their number
        # and order of variables stays Keras's.
        self._pairs = tf.Variable(
            self.hyperparameters(), trainable=False, aggregation=only_first
        )
        self._skipped = tf.Variable(
            0, dtype="int64", trainable=False, aggregation=only_first
        )

    def set_hyperparameter(self, name: str, value: Any) -> None:
        if name in self.plan.scalars:
            pairs = self._pairs.numpy()
            row = list(self.plan.scalars).index(name)
            pairs[row] = np.array([value, 1.0 - value], "float64")
            self._pairs.assign(pairs)

    # -------------------------------------------------------------- running

    def apply(self, gradients: list[Any], indices: list[int]) -> Any:
        self._check_context()
        gradients = self._all_reduce([self._received(g) for g in gradients])
        programs = self._programs_for(gradients, indices)
        optimizer = self.optimizer
        scalars = (
            tf.convert_to_tensor(optimizer._iterations),
            tf.convert_to_tensor(optimizer._get_current_learning_rate()),
            tf.convert_to_tensor(self._pairs),
        )
        if len(programs) == 1:
            finite = programs[0].run(gradients, scalars)
        else:
            # The finite check and the global norm look at all devices.
            measured = [p.measure(gradients, scalars) for p in programs]
            total = tf.add_n([tf.add_n(m) for m in measured if m])
            for program, own in zip(programs, measured, strict=True):
                finite = program.run(gradients, scalars, own, total)
        self._count(optimizer._iterations, finite)
        self._count(self._skipped, tf.logical_not(finite))
        return finite

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

    def _received(self, gradient: Any) -> Any:
        """A gradient as it is to be reduced: dense, or rows if asked for."""
        if not is_sparse(gradient):
            return tf.convert_to_tensor(gradient)
        if self.optimizer.lazy:
            values = tf.convert_to_tensor(gradient.values)
            return tf.IndexedSlices(values, tf.cast(gradient.indices, "int32"))
        # This sums rows that occur twice, before anything non-linear.
        return tf.convert_to_tensor(gradient)

    def _all_reduce(self, gradients: list[Any]) -> list[Any]:
        """Stage 1: the sum over replicas, the same bits on each."""
        context = tf.distribute.get_replica_context()
        if context is None or context.num_replicas_in_sync == 1:
            return gradients
        one_host = isinstance(context.strategy, tf.distribute.MirroredStrategy)
        if (
            one_host
            and not tf.__internal__.distribute.strategy_supports_no_merge_call()
        ):
            return context.merge_call(_reduce_on_this_host, args=(gradients,))
        return context.all_reduce(tf.distribute.ReduceOp.SUM, gradients)

    def finite_everywhere(self, finite: Any) -> Any:
        count = self._all_reduce([tf.cast(finite, "float32")])[0]
        return count >= self.strategy.num_replicas_in_sync

    def assign_alike(self, variable: Any, value: Any) -> None:
        _local(variable).assign(value)

    def _count(self, variable: Any, occurred: Any) -> None:
        local = _local(variable)
        local.assign_add(tf.cast(occurred, local.dtype))

    def skipped_steps(self) -> int | None:
        return 0 if self._skipped is None else int(self._skipped.numpy())

    def overwrite_with_averages(self) -> None:
        for tensors in self.state:
            if tensors is not None:
                self.strategy.extended.update(
                    _tf_variable(tensors["weight"]),
                    lambda w, average: w.assign(average),
                    args=(_tf_variable(tensors["average"]),),
                )

    # ------------------------------------------------------------- programs

    def _programs_for(self, gradients: list[Any], indices: list[int]) -> list[Program]:
        """The programs of this replica for gradients of these variables."""
        here = _local(self.state[indices[0]]["weight"]).device
        key = (here, tuple(indices), tuple(is_sparse(g) for g in gradients))
        if key not in self._programs:
            self._programs[key] = self._make_programs(indices)
        return self._programs[key]

    def _make_programs(self, indices: list[int]) -> list[Program]:
        positions = {index: position for position, index in enumerate(indices)}
        devices: dict[str, list[int]] = {}
        for i in self.involved(indices):
            devices.setdefault(_local(self.state[i]["weight"]).device, []).append(i)
        programs = []
        for device, members in devices.items():
            variables = [self.variables[i] for i in members]
            state = [_map(_local, self.state[i]) for i in members]
            program = Program(
                self,
                device,
                variables,
                state,
                [positions.get(i) for i in members],
            )
            programs.append(program)
        return programs

    def compiles_on(self, device: str, variables: list, state: list[dict]) -> bool:
        """Whether XLA can run this optimizer's update on `device`."""
        if isinstance(self.strategy, tf.distribute.TPUStrategy):
            return False  # The whole step is compiled already.
        if device not in self._compiles:
            failure = _xla_failure(device) or self._update_failure(
                device, variables, state
            )
            self._compiles[device] = failure is None
            if failure is not None:
                log.warning(
                    "%s updates without XLA on %s: %s",
                    type(self.optimizer).__name__,
                    device,
                    failure.splitlines()[0],
                )
        return self._compiles[device]

    def _update_failure(
        self, device: str, variables: list, state: list[dict]
    ) -> str | None:
        """Why the smallest update can't be compiled, or None if it can."""
        smallest: dict[Any, int] = {}
        for i, v in enumerate(variables):
            kind = (v.constraint, v.dtype)
            best = smallest.get(kind)
            if best is None or np.prod(v.shape) < np.prod(variables[best].shape):
                smallest[kind] = i
        chosen = sorted(smallest.values())
        plan_variables = [variables[i] for i in chosen]

        def update(state: list[dict], gradients: list[Any]) -> Any:
            scalars = self.make_scalars(
                tf.zeros((), "int64"),
                tf.zeros(()),
                tf.zeros((len(self.plan.scalars), 2), self.scalar_dtype),
            )
            return _measure_and_step(self, plan_variables, state, gradients, scalars)

        with tf.init_scope(), tf.device(device):
            zeros = [
                _map(lambda x: tf.zeros(x.shape, x.dtype), state[i]) for i in chosen
            ]
            gradients = [tf.zeros(v.shape, v.dtype) for v in plan_variables]
            try:
                compiled = tf.function(update, jit_compile=True, autograph=False)
                compiled.get_concrete_function(zeros, gradients)(zeros, gradients)
            except tf.errors.OpError as error:
                return error.message
        return None


@dataclasses.dataclass
class Program:
    """The compiled update of the variables on one device of one replica.

    Attributes:
        variables, state: what the stages need, and the `tf.Variable`s of this
            device and replica.
        positions: for each variable the position of its gradient in the list
            that `apply` received, or None.
    """

    engine: TensorFlowEngine
    device: str
    variables: list[stages.TrainedVariable]
    state: list[dict]
    positions: list[int | None]

    def __post_init__(self) -> None:
        compiles = self.engine.compiles_on(self.device, self.variables, self.state)
        options = {"jit_compile": True} if compiles else {}
        self.run_function = tf.function(self._run, autograph=False, **options)
        self.measure_function = tf.function(self._measure, autograph=False, **options)
        for function in (self.run_function, self.measure_function):
            # Every optimizer traces this code once: that isn't retracing.
            function._omit_frequent_tracing_warning = True

    def run(
        self,
        gradients: list[Any],
        scalars: tuple,
        measured: list[Any] | None = None,
        total: Any = None,
    ) -> Any:
        """Updates the variables; returns whether the gradient was finite."""
        with tf.device(self.device):
            return self.run_function(self._own(gradients), scalars, measured, total)

    def measure(self, gradients: list[Any], scalars: tuple) -> list[Any]:
        with tf.device(self.device):
            return self.measure_function(self._own(gradients), scalars)

    def _own(self, gradients: list[Any]) -> list[Any]:
        return [None if p is None else gradients[p] for p in self.positions]

    def _measure(self, gradients: list[Any], scalars: tuple) -> list[Any]:
        gradients = [_rows(g) for g in gradients]
        state = [_map(tf.convert_to_tensor, tensors) for tensors in self.state]
        measured = stages.measure(
            self.engine.plan,
            self.variables,
            state,
            gradients,
            self.engine.make_scalars(*scalars),
        )
        return [ops.cast(x, self.engine.scalar_dtype) for x in measured]

    def _run(
        self, gradients: list[Any], scalars: tuple, measured: Any, total: Any
    ) -> Any:
        gradients = [_rows(g) for g in gradients]
        before = [_map(tf.convert_to_tensor, tensors) for tensors in self.state]
        after, finite = _measure_and_step(
            self.engine,
            self.variables,
            before,
            gradients,
            self.engine.make_scalars(*scalars),
            measured,
            total,
        )
        for tensors, old, new in zip(self.state, before, after, strict=True):
            _assign(tensors, old, new)
        return finite


def _measure_and_step(
    engine: TensorFlowEngine,
    variables: list,
    state: list[dict],
    gradients: list[Any],
    scalars: stages.Scalars,
    measured: list[Any] | None = None,
    total: Any = None,
) -> tuple[list[dict], Any]:
    if total is None:
        measured = stages.measure(engine.plan, variables, state, gradients, scalars)
        total = sum(ops.cast(x, engine.scalar_dtype) for x in measured)
    return stages.step(
        engine.plan, variables, state, gradients, scalars, measured, total
    )


def _reduce_on_this_host(strategy: Any, gradients: list[Any]) -> list[Any]:
    """Sums per-replica gradients without a collective.

    TensorFlow's collectives can't stand in the loop that
    `steps_per_execution` makes, so this moves the tensors itself: with NCCL
    between GPUs, by copies between CPUs.
    """
    reducer = strategy.extended._cross_device_ops
    if not isinstance(
        reducer,
        (
            tf.distribute.ReductionToOneDevice,
            tf.distribute.HierarchicalCopyAllReduce,
            tf.distribute.NcclAllReduce,
        ),
    ):
        gpus = all("GPU" in d for d in strategy.extended.worker_devices)
        kind = (
            tf.distribute.NcclAllReduce
            if gpus
            else tf.distribute.HierarchicalCopyAllReduce
        )
        reducer = kind()
    # What is packed into one transfer has to have one dtype.
    reduced: list[Any] = [None] * len(gradients)
    groups: dict[Any, list[int]] = {}
    for i, g in enumerate(gradients):
        first = strategy.experimental_local_results(g)[0]
        groups.setdefault((is_sparse(first), first.dtype), []).append(i)
    for members in groups.values():
        pairs = [(gradients[i], gradients[i]) for i in members]
        results = reducer.batch_reduce(tf.distribute.ReduceOp.SUM, pairs)
        for i, result in zip(members, results, strict=True):
            reduced[i] = result
    return reduced


@functools.cache
def _xla_failure(device: str) -> str | None:
    """Why XLA can't run on `device`, or None if it can."""
    with tf.init_scope(), tf.device(device):
        try:
            tf.function(lambda x: x + 1, jit_compile=True)(tf.zeros(()))
        except (tf.errors.OpError, ValueError) as error:
            return str(error)
    return None


def _rows(gradient: Any) -> Any:
    """Stage 2 for a sparse gradient: repeated rows are summed."""
    if not is_sparse(gradient):
        return gradient
    return Rows.sum_repeated(gradient.indices, gradient.values)


def _tf_variable(variable: Any) -> tf.Variable:
    """The TensorFlow variable in a Keras variable."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def _local(variable: Any) -> tf.Variable:
    """This replica's own component of a variable."""
    variable = _tf_variable(variable)
    if hasattr(variable, "_get_on_device_or_primary"):
        return variable._get_on_device_or_primary()
    return variable


def _map(function: Callable, tensors: dict) -> dict:
    return {
        k: _map(function, x) if isinstance(x, dict) else function(x)
        for k, x in tensors.items()
    }


def _assign(variables: dict, before: dict, after: dict) -> None:
    for k, variable in variables.items():
        if isinstance(variable, dict):
            _assign(variable, before[k], after[k])
        elif after[k] is not before[k]:
            variable.assign(after[k])
