"""Keras's `fit`, `evaluate` and `predict` under every strategy."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import tree

from tf_effopt.base import legacy_keras
from tf_effopt.distribute.tf_config import named_workers
from tf_effopt.runtime.keras_hooks import sublayers
from tf_effopt.training import (
    added_losses,
    data_sharding,
    keras_patches,
    loss_weighting,
    padding,
)

REPLACED = (  # methods of a model
    "_maybe_symbolic_build",
    "make_train_function",
    "make_test_function",
    "predict_step",
    "predict_on_batch",
    "compute_loss",
)
ITERATORS = (tf.data.Iterator, tf.distribute.DistributedIterator)


def prepare(model: keras.Model) -> keras.Model:
    """Makes `fit`, `evaluate` and `predict` right under the model's strategy.

    `train_on_batch`, `test_on_batch` and `predict_on_batch`, too, of which each replica
    works on the whole batch. One line after `compile`:

    >>> import tf_effopt
    >>> strategy = tf_effopt.distribute.strategy("none")
    >>> with strategy.scope():
    ...     model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    ...     model.compile(tf_effopt.Adam(), "mse")
    >>> model = tf_effopt.distribute.prepare(model)

    On one device, and with Keras's other backends, nothing changes; TensorFlow has to
    be installed. With several replicas, on one host or several:

    - Each replica's loss counts by its number of examples, so that gradients and loss
      of a short last batch, of which a replica may have nothing, are those of one
      device; with sample weights, class weights and masks, too. (Keras takes the mean
      of the replicas' means.) A loss function that returns a scalar, or fewer values
      than there are examples, is taken for a mean over the examples; what layers add
      (`add_loss`, regularizers) counts by the share of examples. A loss called in
      another, in a metric or in a layer counts once. (Keras divides it by the number
      of replicas in a metric, and in a layer twice.) A custom `train_step` gets
      this by calling `self.compute_loss`, which returns this replica's part of the
      loss: log it times `strategy.num_replicas_in_sync`. A custom `compute_loss`
      gets it by calling a loss of Keras; one that calls none is warned of.
    - A replica without examples works on one that counts nothing, of ones, or of zeros
      for integers, also if its loss isn't a number. It has no part in moments of
      `BatchNormalization`. (With Keras, convolutions and moments fail there.) Batches
      of `SparseTensor` have to be at least as large as there are replicas.
    - Under a mask Keras's `BatchNormalization(synchronized=True)` isn't synchronized:
      that stays so.
    - Metrics are those of all examples, if their state adds up, as that of Keras's
      does; a metric function that returns a scalar is taken for a mean. (Keras takes
      the mean of the replicas' results, which is wrong for those that aren't means,
      such as `AUC`.) That is so for what a step logs by the metrics' names; of other
      names the mean is taken.
    - On CPU replicas a generator's arrays stay as they are. (With Keras, results are
      written into them.)
    - `fit` works with `MultiWorkerMirroredStrategy`. (Keras 3.15 fails there,
      keras#20585.) The model is built from the shapes of the data. (Keras builds it
      from the first batches, which a generator doesn't give again.)
    - `steps_per_execution` works with collectives, by a private switch of
      TensorFlow's that is set for its steps.
    - `jit_compile` is turned off, with a warning: Keras's trainer can't compile a
      step of several replicas. An optimizer of this package compiles its update in
      any case.

    Give `fit` the same data in the same order on every worker, that is, set the same
    seed (`keras.utils.set_random_seed`): each takes its part of every batch. (By
    TensorFlow's default each reads some of the files of a `tf.data.Dataset`, and
    batches are other ones. If that is what you want, since it reads less, set
    `auto_shard_policy` to `FILE` in the dataset's options.)

    Args:
        model: compiled; made inside `with strategy.scope():`.

    Returns:
        `model` itself.

    Raises:
        ValueError: the model isn't compiled. Later, `fit` raises it for a metric that
            was made outside of the scope.
    """
    legacy_keras.refuse(model)
    if not model.compiled:
        raise ValueError(
            "`prepare` takes a compiled model: call `model.compile(...)` first. "
            f"Received: {model.name!r}"
        )
    if keras.backend.backend() != "tensorflow":
        return model  # no strategy, then
    strategy = model.distribute_strategy
    if strategy.num_replicas_in_sync == 1:
        workers = len(named_workers())
        if workers > 1:
            warnings.warn(
                f"TF_CONFIG names {workers} workers, but {model.name!r} was made outside "
                "of `with strategy.scope():` of a 'multi_worker' strategy: each worker "
                "will train a separate model.",
                stacklevel=2,
            )
        return model
    keras_patches.check()  # before anything is replaced
    loss_weighting.install()
    data_sharding.shard_by_batch(strategy)
    adapter = _Adapter(model, strategy)
    for name in REPLACED:
        # Past Keras's tracking of attributes.
        object.__setattr__(model, name, getattr(adapter, name))
    adapter.turn_off_jit()
    return model


class _Adapter:
    """What `prepare` puts in the place of methods of a model."""

    def __init__(self, model: keras.Model, strategy: tf.distribute.Strategy):
        self.model = model
        self._predict_step = model.predict_step
        self._predict_on_batch = model.predict_on_batch
        self._compute_loss = model.compute_loss
        self.strategy = strategy
        self.several_hosts = keras_patches.of_several_hosts(strategy)
        devices = strategy.extended.worker_devices
        self.on_cpu = all("CPU" in device for device in devices)
        self._warned_of_loss = False

    def turn_off_jit(self) -> None:
        if self.model.jit_compile:
            self.model.jit_compile = False
            warnings.warn(
                "`jit_compile` was turned off: Keras's trainer can't compile a step "
                f"of {self.strategy.num_replicas_in_sync} replicas. An optimizer of "
                "tf_effopt compiles its update in any case.",
                stacklevel=3,
            )

    def _check_metrics(self) -> None:
        # Those that `compile` was given are inside of one of Keras's own.
        own = [getattr(metric, "metrics", metric) for metric in self.model.metrics]
        for metric in tree.flatten(own):
            owners = [
                getattr(v.value, "distribute_strategy", None) for v in metric.variables
            ]
            if any(owner is not self.strategy for owner in owners):
                raise ValueError(
                    f"The metric {metric.name!r} was made outside of "
                    "`with strategy.scope():`, so that replicas can't add it up: "
                    "make metrics, and call `compile`, inside."
                )

    def make_train_function(self, force: bool = False) -> None:
        model = self.model
        if model.train_function is None or force:
            model.train_function = self._make_function(model.train_step)

    def make_test_function(self, force: bool = False) -> None:
        model = self.model
        if model.test_function is None or force:
            model.test_function = self._make_function(model.test_step)

    def predict_step(self, data: Any) -> Any:
        outputs = self._predict_step(self._examples(data))
        first = _first_tensor(data)
        if not loss_weighting.may_be_empty(first):
            return outputs
        return padding.drop_padding(outputs, tf.shape(first)[0])

    def predict_on_batch(self, x: Any) -> Any:
        """Of the replicas' outputs, each of the whole batch, those of the first."""
        replicas = self.strategy.num_replicas_in_sync
        outputs = self._predict_on_batch(x)
        return tree.map_structure(lambda y: y[: y.shape[0] // replicas], outputs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss, has_part = loss_weighting.has_part(self._compute_loss, *args, **kwargs)
        if not has_part and not self._warned_of_loss:
            self._warned_of_loss = True
            warnings.warn(
                f"`compute_loss` of {self.model.name!r} calls no loss of Keras, so that "
                "its gradients are added up over "
                f"{self.strategy.num_replicas_in_sync} replicas. Let it call one, such "
                "as `keras.losses.MeanSquaredError()(y, y_pred)`, which counts by the "
                "replica's share of the examples; or divide by the replicas yourself.",
                stacklevel=2,
            )
        return loss

    def _examples(self, data: Any) -> Any:
        """What a step works on, of what a replica is given."""
        if self.on_cpu:
            data = tree.map_structure(_own_copy, data)
        return padding.pad_empty(data)

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None):
        """Builds the model for a replica's part of a batch, of which it takes none."""
        if iterator is not None:
            spec = keras_patches.distributed_dataset(iterator).element_spec
            data_batch = tree.map_structure(keras_patches.of_first_replica, spec)
        with self.strategy.scope():
            self.model._symbolic_build(data_batch=data_batch)

    def _make_function(self, step: Callable) -> Callable:
        """Keras's own function of a step that counts its examples."""
        self.turn_off_jit()  # `compile` may have been called again
        self._check_metrics()
        added_losses.keep_apart(self.model)

        @functools.wraps(step)
        def step_of_parts(data: Any) -> Any:
            first = _first_tensor(data)
            with (
                loss_weighting.weighted_by_examples(first),
                self._state_of_examples(first),
            ):
                logs = step(self._examples(data))
            return self._with_metrics_of_all(logs)

        @functools.wraps(step)
        def step_of_whole_batch(data: Any) -> Any:
            with loss_weighting.weighted_by_examples(_first_tensor(data), whole=True):
                return step(self._examples(data))

        make = self._packing_logs if self.several_hosts else self.model._make_function
        of_parts, of_whole_batch = make(step_of_parts), make(step_of_whole_batch)
        one_step = self._reading_in_graph(of_parts)

        def function(iterator: Any) -> Any:
            # `train_on_batch` and `test_on_batch` give each replica all there is.
            if not isinstance(iterator, ITERATORS):
                return of_whole_batch(iterator)
            if self.model.steps_per_execution == 1:
                return one_step(iterator)
            with keras_patches.collectives_in_loops():
                return of_parts(iterator)

        return function

    def _reading_in_graph(self, run: Callable) -> Callable:
        """One step on an iterator's next batch.

        A graph knows of a batch what its dataset says, which is the same on all
        replicas. (Keras 3.16 reads batches eagerly: each replica would know the size
        of its part, and the step be traced again for a short last batch.)
        """

        def one_step(iterator: Any) -> Any:
            return run(iter([iterator.get_next()]))

        if self.model.run_eagerly:
            return one_step
        return tf.function(one_step, reduce_retracing=True, autograph=False)

    @contextlib.contextmanager
    def _state_of_examples(self, batch: Any) -> Iterator[None]:
        """Within, metrics and averages are of examples, not of what stands in."""
        if not loss_weighting.may_be_empty(batch):
            yield
            return
        variables = self.model.metrics_variables + self._own_averages()
        before = [tf.identity(tf.convert_to_tensor(v)) for v in variables]
        yield
        is_empty = tf.equal(tf.shape(batch)[0], 0)
        for v, old in zip(variables, before, strict=True):
            v.assign(tf.where(is_empty, old, tf.convert_to_tensor(v)))

    def _own_averages(self) -> list[keras.Variable]:
        """Averages over a replica's own examples."""
        return [
            v
            for layer in sublayers(self.model)
            if isinstance(layer, keras.layers.BatchNormalization)
            and not layer.synchronized
            for v in (layer.moving_mean, layer.moving_variance)
        ]

    def _packing_logs(self, step: Callable) -> Callable:
        logs = _PackedLogs(step)
        run = self.model._make_function(logs.packed)
        return lambda iterator: logs.unpacked(run(iterator))

    def _with_metrics_of_all(self, logs: Any) -> Any:
        """A step's logs, with metrics of what all replicas have seen."""
        if not isinstance(logs, dict):
            return logs
        dtypes: dict[str, list[keras.Variable]] = {}  # each summed up as one tensor
        for v in self.model.metrics_variables:
            if v.aggregation == "sum":
                dtypes.setdefault(v.dtype, []).append(v)
        sums = []
        for own in dtypes.values():
            total = loss_weighting.summed(
                _joined([tf.convert_to_tensor(v) for v in own])
            )
            sums += zip(own, _parted(total, [v.shape for v in own]), strict=True)
        with keras.StatelessScope(state_mapping=sums):
            # As tensors: a variable is the sum only within.
            results = tree.map_structure(
                tf.convert_to_tensor, self.model.get_metrics_result()
            )
        return logs | {name: x for name, x in results.items() if name in logs}


class _PackedLogs:
    """A step's logs as one tensor, and back.

    Of each number Keras takes the mean over hosts, along an axis that has to exist;
    one by one that would be two collectives for each number.
    """

    def __init__(self, step: Callable):
        self.step = step
        self.structure: Any = None
        self.shapes: list[list[int]] = []

    def packed(self, data: Any) -> tf.Tensor:
        logs = self.step(data)
        self.structure = tree.map_structure(lambda _: 0, logs)
        values = [tf.convert_to_tensor(x) for x in tree.flatten(logs)]
        self.shapes = [x.shape.as_list() for x in values]
        return _joined([tf.cast(x, tf.float32) for x in values])[tf.newaxis]

    def unpacked(self, packed: tf.Tensor) -> Any:
        return tree.pack_sequence_as(self.structure, _parted(packed, self.shapes))


def _own_copy(x: Any) -> Any:
    """A copy: TensorFlow takes parts of a generator's arrays for its own.

    It would write into the user's array where it needs a place for a result.
    """
    is_plain = isinstance(x, tf.Tensor) and x.dtype != tf.string
    return tf.raw_ops.DeepCopy(x=x) if is_plain else x


def _first_tensor(data: Any) -> Any:
    return next(x for x in tree.flatten(data) if x is not None)


def _joined(tensors: list[tf.Tensor]) -> tf.Tensor:
    """The elements of several tensors of one dtype, as one vector."""
    return tf.concat([tf.reshape(x, [-1]) for x in tensors], axis=0)


def _parted(joined: tf.Tensor, shapes: list[Sequence[int]]) -> list[tf.Tensor]:
    """The tensors of these shapes that were joined."""
    parts = tf.split(joined, [math.prod(shape) for shape in shapes])
    return [tf.reshape(*x) for x in zip(parts, shapes, strict=True)]
