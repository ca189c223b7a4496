"""The engine of Keras's TensorFlow backend, under each `tf.distribute` strategy.

Gradients are all-reduced first. Everything after that is one compiled program
per replica and device, over the variables that live there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_effopt.engine import is_sparse, private_names, reduction, stages
from tf_effopt.engine.base import Engine
from tf_effopt.engine.inputs import Inputs
from tf_effopt.engine.matrices import Share
from tf_effopt.engine.plan import OPTIMIZER, Arguments, Plan, Scalars, TrainedVariable
from tf_effopt.engine.sparse import Rows
from tf_effopt.engine.watching import watchers
from tf_effopt.paths import path_of, shape_of

log = logging.getLogger("tf_effopt")

do_not_convert = tf.autograph.experimental.do_not_convert
init_scope = tf.init_scope


class TensorFlowEngine(Engine):
    """Runs the stages as compiled programs, one per replica and device."""

    def __init__(self, optimizer: Any):
        super().__init__(optimizer)
        self.strategy = tf.distribute.get_strategy()
        self._programs: dict[tuple, list[Program]] = {}
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
        with tf.init_scope(), _in_any_trace(self.optimizer):
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

    def has_value(self, variable: Any) -> bool:
        local = _local(variable)
        with tf.init_scope():
            return bool(tf.raw_ops.VarIsInitializedOp(resource=local.handle))

    def build(
        self, state: list[dict | None], model_state: dict[int, dict[str, Any]]
    ) -> None:
        super().build(state, model_state)
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
        gradients = self._all_reduce_gradients(list(received))
        programs = self._programs_for(gradients, indices)
        optimizer, scalars = self.optimizer, self.scalars()
        if len(programs) == 1:
            totals = self._known_totals(gradients, indices)
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
        _assign(_map(_local, self.model_state), scalars.model, outcome.model)
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
        _local(variable).assign(value)

    def _count(self, variable: Any, by: Any) -> None:
        local = _local(variable)
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

    def scalars(self) -> Scalars:
        optimizer = self.optimizer
        return Scalars(
            tf.convert_to_tensor(optimizer._iterations),
            tf.convert_to_tensor(optimizer.learning_rate),
            tf.convert_to_tensor(self._pairs),
            _map(tf.convert_to_tensor, _map(_local, self.model_state)),
            None if self._counts_agree() else tf.convert_to_tensor(self._missed),
        )

    def _counts_agree(self) -> bool:
        """Whether no variable missed an update, now and whenever this trace runs."""
        if self._missed is None:
            return True
        local = _local(self._missed)
        # Elsewhere the read would wait for the device.
        is_near = tf.DeviceSpec.from_string(local.device).device_type == "CPU"
        return tf.executing_eagerly() and is_near and not local.numpy().any()

    def number_now(self, name: str) -> Any:
        row = list(self.plan.numbers).index((OPTIMIZER, name))
        return self._pairs[row, 0]

    def assign_everywhere(self, variable: Any, value: Any) -> None:
        self.strategy.extended.update(
            _tf_variable(variable), lambda v, x: v.assign(x), args=(value,)
        )

    # ------------------------------------------------------------- programs

    def _programs_for(self, gradients: list[Any], indices: list[int]) -> list[Program]:
        """The programs of this replica for gradients of these variables."""
        here = _local(self.state[indices[0]]["weight"]).device
        kinds = tuple(is_sparse(g) for g in gradients)
        # What is watched runs as other operations than what isn't.
        key = (here, tuple(indices), kinds, watchers())
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
        if _compiles_steps(self.strategy):
            return False
        if watchers():
            # Nor is a trial made, whose result would outlast the watching.
            self._warn_of(device, "XLA can't compile the operations of `tf.debugging`")
            return False
        if _is_known_to_compile(device, variables, self.plan):
            return True
        kinds = _smallest_of_each_kind(variables)
        key = device, frozenset(kinds), *_functions_of(self.plan)
        if key not in _update_failures:
            _update_failures[key] = _xla_failure(device) or self._update_failure(
                device, sorted(kinds.values()), variables, state
            )
        failure = _update_failures[key]
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

    def _update_failure(
        self, device: str, chosen: list[int], variables: list, state: list[dict]
    ) -> str | None:
        """Why the update of these variables can't be compiled, or None if it can."""
        plan_variables = [variables[i] for i in chosen]

        def update(state: list[dict], gradients: list[Any]) -> Any:
            scalars = Scalars(
                tf.zeros((), "int64"),
                tf.zeros(()),
                tf.zeros((len(self.plan.numbers), 2), self.scalar_dtype),
                _map(lambda x: tf.zeros(x.shape, x.dtype), self.model_state),
                tf.zeros(len(self.state), "int64") if self.counts_each else None,
            )
            after, outcome = stages.step(
                Inputs(self.plan, plan_variables, state, gradients, scalars)
            )
            return after, outcome.counted, outcome.model

        with tf.init_scope(), tf.device(device):
            zeros = [
                _map(lambda x: tf.zeros(shape_of(x), x.dtype), state[i]) for i in chosen
            ]
            gradients = [tf.zeros(v.shape, v.dtype) for v in plan_variables]
            try:
                compiled = tf.function(update, jit_compile=True, autograph=False)
                compiled.get_concrete_function(zeros, gradients)(zeros, gradients)
            except tf.errors.OpError as error:
                return error.message
        return None


# At which `tf.function` has its say in how variables are made; all others have 100.
PRIORITY_OF_FUNCTIONS = 50


@contextlib.contextmanager
def _in_any_trace(optimizer: Any) -> Iterator[None]:
    """Variables are made as outside of each `tf.function` that is being traced.

    It refuses to make them in any but its first trace, also under `tf.init_scope`,
    where they outlive the trace; and traces once more if they were made in its first.
    What strategies and users have to say stays in force.
    """
    graph = tf.compat.v1.get_default_graph()
    creators = private_names.attribute(graph, "_variable_creator_stack")
    is_scaled = optimizer.__dict__.get("_scaled_in_a_graph", False)
    stack = []
    for priority, creator in creators:
        if priority != PRIORITY_OF_FUNCTIONS:
            stack.append((priority, creator))
        elif is_scaled:  # The trace has the scale of now, so another one is needed.
            stack.append((priority, _first_trace_only(creator, optimizer)))
    graph._variable_creator_stack = stack
    try:
        yield
    finally:
        graph._variable_creator_stack = creators


def _first_trace_only(creator: Callable, optimizer: Any) -> Callable:
    def create(next_creator: Callable, **kwargs: Any) -> Any:
        try:
            return creator(next_creator, **kwargs)
        except ValueError as error:
            raise ValueError(
                f"{optimizer.name}: `scale_loss` was called in a `tf.function` "
                "before the optimizer was built, so that the function would keep the "
                "scale of now. TensorFlow traces it anew for what is built in its "
                "first trace, but not for what is built in a later one: call "
                "`optimizer.build(model.trainable_variables)` before the function."
            ) from error

    return create


def _compiles_steps(strategy: tf.distribute.Strategy) -> bool:
    """Whether a strategy compiles whole steps, for TPU; see also `tf_effopt.tpu`."""
    is_tpu = isinstance(strategy, tf.distribute.TPUStrategy)
    return is_tpu or getattr(strategy, "compiles_steps", False)


# What can't be compiled, and why; None for what can. All optimizers with the same
# functions share one trial.
_update_failures: dict[tuple, str | None] = {}


def _is_known_to_compile(
    device: str, variables: list[TrainedVariable], plan: Plan
) -> bool:
    """Whether no trial is needed: the tests compile all of this package's on a CPU."""
    if tf.DeviceSpec.from_string(device).device_type != "CPU" or _xla_failure(device):
        return False
    functions = [v.rule.function for v in variables] + _functions_of(plan)
    constraints = [v.constraint for v in variables]
    return all(x is None or _is_of(x.__module__, "tf_effopt") for x in functions) and (
        all(x is None or _is_of(type(x).__module__, "keras") for x in constraints)
    )


def _is_of(module: str, package: str) -> bool:
    return module.partition(".")[0] == package


def _smallest_of_each_kind(variables: list[TrainedVariable]) -> dict[tuple, int]:
    """Kind -> the position of its smallest variable: what a trial compiles."""
    smallest: dict[tuple, int] = {}
    for i, v in enumerate(variables):
        rule = v.rule.function, repr(sorted(v.rule.fixed.items()))
        kind = (_by_identity(v.constraint), *rule, v.dtype)
        best = smallest.get(kind)
        if best is None or np.prod(v.shape) < np.prod(variables[best].shape):
            smallest[kind] = i
    return smallest


@dataclasses.dataclass(frozen=True)
class _Identity:
    """An object as a key, kept alive with it: it need not be hashable."""

    thing: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.thing is other.thing

    def __hash__(self) -> int:
        return id(self.thing)


def _by_identity(constraint: Any) -> Any:
    """Keras's own constraints by their class, others by identity."""
    if constraint is None:
        return None
    module = type(constraint).__module__
    return type(constraint) if module.startswith("keras.") else _Identity(constraint)


def _functions_of(plan: Plan) -> list[Callable | None]:
    """What the update of all variables calls that isn't the engine's own."""
    bound = [plan.upkeep]
    bound += [x for t in plan.transforms for x in (t.before, t.after)]
    bound += [x for _, model in plan.models() for x in (model.rule, model.measure)]
    if plan.evaluation is not None:
        bound.append(plan.evaluation.to_training)
    return [None if x is None else x.function for x in bound]


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
    variables: list[TrainedVariable]
    state: list[dict]
    positions: list[int | None]

    def __post_init__(self) -> None:
        compiles = self.engine.compiles_on(self.device, self.variables, self.state)
        options = {"jit_compile": True} if compiles else {}
        self.run_function = tf.function(self._run, autograph=False, **options)
        self.eager_function = tf.function(self._run_eagerly, autograph=False)
        self.measure_function = tf.function(self._measure, autograph=False, **options)
        self.share_function = tf.function(
            self._matrix_share, autograph=False, **options
        )
        for function in (
            self.run_function,
            self.eager_function,
            self.measure_function,
            self.share_function,
        ):
            # Every optimizer traces this code once: that isn't retracing.
            function._omit_frequent_tracing_warning = True

    def run(
        self,
        gradients: list[Any],
        scalars: Scalars,
        totals: dict | None,
        matrix_steps: dict | None,
    ) -> stages.Outcome:
        """Updates the variables."""
        run = self.run_function
        with tf.device(self.device):
            if tf.executing_eagerly() and self._dtypes_of_each(scalars):
                run = self.eager_function
            else:
                scalars = self._with_numbers_of_each(scalars)
            found = run(self._own(gradients), _plain(scalars), totals, matrix_steps)
        return stages.Outcome(*found)

    def _dtypes_of_each(self, scalars: Scalars) -> set[str]:
        """Of the numbers that follow from each variable's count."""
        model = self.engine.plan.model
        if scalars.missed is None or model is None or not model.each_count:
            return set()
        return {v.compute_dtype for v in self.variables}

    def _with_numbers_of_each(self, scalars: Scalars) -> Scalars:
        """With these numbers as scalars, made outside of the compiled program.

        In it they would be slices of vectors, and XLA, which compiles the update of
        variables of one shape once, would compile one for each slice.
        """
        dtypes = self._dtypes_of_each(scalars)
        if not dtypes:
            return scalars
        arguments = Arguments(self.engine.plan, scalars)
        of_each = {dtype: arguments.of_each(dtype) for dtype in sorted(dtypes)}
        return dataclasses.replace(scalars, of_each=of_each)

    def _run_eagerly(self, gradients: list[Any], scalars: tuple, *others: Any) -> tuple:
        # As in a graph: passing so many scalars from Python takes long.
        scalars = self._with_numbers_of_each(Scalars(*scalars))
        return self.run_function(gradients, _plain(scalars), *others)

    def matrix_share(
        self, gradients: list[Any], scalars: Scalars, totals: dict | None
    ) -> dict:
        """This replica's share of the work on matrices."""
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        with tf.device(self.device):
            return self.share_function(
                self._own(gradients),
                _plain(scalars),
                totals,
                tf.convert_to_tensor(replica),
            )

    def measure(
        self, phase: str, gradients: list[Any], scalars: Scalars, totals: dict
    ) -> dict[str, Any]:
        """This device's share of what a phase sums up."""
        with tf.device(self.device):
            return self.measure_function(
                phase, self._own(gradients), _plain(scalars), totals
            )

    def _own(self, gradients: list[Any]) -> list[Any]:
        return [None if p is None else gradients[p] for p in self.positions]

    def _inputs(
        self,
        gradients: list[Any],
        scalars: tuple,
        totals: dict | None,
        matrix_steps: dict | None = None,
    ) -> Inputs:
        return Inputs(
            self.engine.plan,
            self.variables,
            [
                _map(tf.convert_to_tensor, tensors) | _weight_of_shape(tensors, v.shape)
                for v, tensors in zip(self.variables, self.state, strict=True)
            ],
            [_rows(g) for g in gradients],
            Scalars(*scalars),
            totals,
            matrix_steps,
            stacks_matrices=not self._runs_on_cpu(),
        )

    def _runs_on_cpu(self) -> bool:
        is_cpu = tf.DeviceSpec.from_string(self.device).device_type == "CPU"
        return is_cpu and not _compiles_steps(self.engine.strategy)

    def _matrix_share(
        self, gradients: list[Any], scalars: tuple, totals: dict | None, replica: Any
    ) -> dict:
        share = Share(replica, self.engine.strategy.num_replicas_in_sync)
        return stages.matrix_share(self._inputs(gradients, scalars, totals), share)

    def _measure(
        self, phase: str, gradients: list[Any], scalars: tuple, totals: dict
    ) -> dict[str, Any]:
        return stages.partial_sums(self._inputs(gradients, scalars, totals), phase)

    def _run(
        self,
        gradients: list[Any],
        scalars: tuple,
        totals: dict | None,
        matrix_steps: dict | None,
    ) -> tuple:
        inputs = self._inputs(gradients, scalars, totals, matrix_steps)
        after, outcome = stages.step(inputs)
        for tensors, old, new in zip(self.state, inputs.state, after, strict=True):
            _assign(tensors, old, new)
        return outcome.finite, outcome.counted, outcome.model


def _plain(scalars: Scalars) -> tuple:
    """As `tf.function` can take them."""
    return (
        scalars.iterations,
        scalars.learning_rate,
        scalars.pairs,
        scalars.model,
        scalars.missed,
        scalars.of_each,
    )


@functools.cache
def _xla_failure(device: str) -> str | None:
    """Why XLA can't run on `device`, or None if it can."""
    with tf.init_scope(), tf.device(device):
        try:
            function = tf.function(lambda x: x + 1, jit_compile=True)
            # The function itself may be told to run eagerly, without XLA.
            function.get_concrete_function(tf.zeros(()))(tf.zeros(()))
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


def _weight_of_shape(tensors: dict, shape: tuple[int, ...]) -> dict[str, tf.Tensor]:
    """The weight, where its variable doesn't say which shape it has."""
    if tensors["weight"].shape.is_fully_defined():
        return {}
    return {"weight": tf.ensure_shape(tf.convert_to_tensor(tensors["weight"]), shape)}


def shape_now(variable: Any) -> tuple[int, ...]:
    """The shape of a variable's value, whose own shape isn't fully known."""
    local = _local(variable)
    with tf.init_scope():
        if not tf.raw_ops.VarIsInitializedOp(resource=local.handle):
            raise ValueError(
                f"{path_of(variable)} has the shape {variable.shape}, which isn't fully "
                "known, and no value yet. Give it a value before the optimizer is "
                "built, or make it with its full `shape`."
            )
        # `VariableShape` of TensorFlow 2.20 answers -1 for an unknown dimension.
        return tuple(local.read_value().shape)


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
