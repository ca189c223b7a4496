"""Trains small models under a strategy, and saves what came out.

    python tests/workers.py none,mirrored2 OUTPUT.npz
    python -m tf_effopt.distribute.launch --workers 2 tests/workers.py workers OUTPUT.npz

A separate process: devices are split at its start, collectives of several sizes
can't share a process, and one that fails poisons it. Worker i of several writes OUTPUT.npz.i. Further arguments
choose cases.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import keras
import numpy as np
import tensorflow as tf

import tf_effopt
from recipes import image_data, image_models

BATCH, EPOCHS = 16, 2
rng = np.random.default_rng(0)
ROWS = 63  # the last batch has 15: replicas with 8 and 7, or 4, 4, 4 and 3
X = rng.normal(size=(ROWS, 8)).astype("float32")
Y = (X @ rng.normal(size=(8, 1)) + 1.0).astype("float32")
LABELS = rng.integers(0, 3, size=ROWS)
WEIGHTS = rng.uniform(0.0, 2.0, size=ROWS).astype("float32")
IDS = rng.integers(0, 6, size=(ROWS, 3)).astype("int32")  # 0 is masked
IMAGES = rng.integers(0, 255, size=(ROWS, 8, 8, 1)).astype("uint8")
ONE_MORE = 3 * BATCH + 1  # rows whose last batch is one example


def adam(**options):
    return tf_effopt.Adam(0.01, **options)


def dense_model(units: int = 1, **options) -> keras.Model:
    init = keras.initializers.GlorotUniform(seed=1)
    return keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(
                6, activation="tanh", kernel_initializer=init, **options
            ),
            keras.layers.Dense(units, kernel_initializer=init),
        ]
    )


def table_model(mask: bool = False) -> keras.Model:
    init = keras.initializers.RandomNormal(seed=2)
    table = keras.layers.Embedding(9, 4, embeddings_initializer=init, mask_zero=mask)
    head = keras.layers.Dense(1, kernel_initializer=keras.initializers.Ones())
    inputs = keras.Input((3,), dtype="int32")
    x = table(inputs)
    return keras.Model(inputs, head(x if mask else keras.layers.Flatten()(x)))


def recipe_model(strategy: tf.distribute.Strategy) -> keras.Model:
    """The image recipe's CNN, without its dropout, which draws by replica."""
    keras.utils.set_random_seed(0)
    images = np.zeros((1, 8, 8, 1), "uint8")
    data = image_data.ImageData(images, [0], images, [0], 10, "")
    several = strategy.num_replicas_in_sync > 1
    model = image_models.make("cnn", data, synchronized=several)
    for layer in model.layers:
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
    return model


class Case:
    """One training under one strategy; what it saves, by name."""

    def __init__(self, strategy: tf.distribute.Strategy):
        self.strategy = strategy
        self.found: dict[str, np.ndarray] = {}

    def fit(
        self,
        make_optimizer: Callable,
        make_model: Callable = dense_model,
        x=X,
        y=Y,
        loss="mse",
        compile_options=None,
        **options,
    ) -> keras.Model:
        keras.utils.set_random_seed(3)
        with self.strategy.scope():
            model = make_model()
            model.compile(make_optimizer(), loss, **(compile_options or {}))
        tf_effopt.distribute.prepare(model)
        options = {"batch_size": BATCH, "shuffle": False, "verbose": 0} | options
        history = model.fit(x, y, epochs=EPOCHS, **options)
        self.save(model, **history.history)
        return model

    def save(self, model: keras.Model, **numbers) -> None:
        variables = model.weights + model.optimizer.variables
        for i, v in enumerate(variables):
            self.found[f"variables/{i:03d}"] = keras.ops.convert_to_numpy(v)
        for name, values in numbers.items():
            self.found[f"logs/{name}"] = np.asarray(values, "float64")
        apart = 0.0
        for v in variables:
            for part in self.strategy.experimental_local_results(v.value)[1:]:
                same = part.numpy().tobytes() == v.numpy().tobytes()
                apart = max(apart, 0.0 if same else 1.0)
        self.found["replicas"] = np.asarray(apart)


def sgd(case):
    case.fit(lambda: tf_effopt.SGD(0.05))


def adam_in_fit(case):
    case.fit(adam, validation_data=(X[:49], Y[:49]), validation_batch_size=BATCH)


def adamw_and_clipping(case):
    make = lambda: tf_effopt.AdamW(0.01, weight_decay=0.1, global_clipnorm=0.1)
    case.fit(make)


def accumulation(case):
    case.fit(lambda: adam(gradient_accumulation_steps=2, global_clipnorm=0.1))


def ema(case):
    case.fit(lambda: adam(use_ema=True, ema_momentum=0.8, ema_overwrite_frequency=3))


def steps_per_execution(case):
    """With batches left over, too: 4 and 3 are no divisor of one another."""
    for steps in (4, 3):
        case.fit(adam, compile_options={"steps_per_execution": steps})


def an_empty_replica(case):
    case.fit(
        adam,
        x=X[:ONE_MORE],
        y=Y[:ONE_MORE],
        validation_data=(X[:ONE_MORE], Y[:ONE_MORE]),
        compile_options={"metrics": ["mae"]},
    )


def an_empty_replica_in_a_loop(case):
    options = {"metrics": ["mae"], "steps_per_execution": 4}
    case.fit(adam, x=X[:ONE_MORE], y=Y[:ONE_MORE], compile_options=options)


def an_empty_replica_of_losses_and_means(case):
    """Neither a loss for each example nor a metric that is a mean has a number there."""
    case.fit(
        adam,
        x=X[:ONE_MORE],
        y=Y[:ONE_MORE],
        loss=keras.losses.MeanSquaredError(reduction=None),
        compile_options={"metrics": [mean_of_ones]},
    )


def an_empty_replica_of_each_kind_of_loss(case):
    losses = [
        keras.losses.MeanSquaredError(reduction="sum"),
        keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"),
        lambda y, p: keras.ops.mean(keras.ops.square(y - p)),
    ]
    found = {}
    for i, loss in enumerate(losses):
        case.fit(
            lambda: tf_effopt.SGD(0.002),
            added_loss_model,
            x=X[:ONE_MORE],
            y=Y[:ONE_MORE],
            loss=loss,
            sample_weight=WEIGHTS[:ONE_MORE] if i < 2 else None,
            compile_options={"weighted_metrics": ["mae"]},
        )
        found |= {f"{i}/{k}": x for k, x in case.found.items() if k != "replicas"}
    case.fit(
        lambda: tf_effopt.SGD(0.05),
        lambda: table_model(mask=True),
        x=IDS[:ONE_MORE],
        y=np.repeat(Y[:ONE_MORE, None], 3, axis=1),
    )
    case.found |= found


def an_empty_replica_whose_loss_is_no_number(case):
    """Zeros stand in for integers: all masked, their mean is 0/0, and so is the loss."""
    several = case.strategy.num_replicas_in_sync > 1

    def make():
        table = table_model(mask=True).layers[1]
        inputs = keras.Input((3,), dtype="int32")
        x = keras.layers.GlobalAveragePooling1D()(table(inputs))
        x = keras.layers.BatchNormalization(synchronized=several)(x)
        return keras.Model(inputs, keras.layers.Dense(1, kernel_initializer="ones")(x))

    def of_labels(y, p):
        counted = keras.ops.cast(y != 0, p.dtype)
        total = keras.ops.sum(counted * keras.ops.square(p - 1.0))
        return total / keras.ops.sum(counted)

    rows, found = slice(0, ONE_MORE), {}
    ids, labels = IDS[rows] % 5 + 1, LABELS[rows, None] + 1
    for i, (make_optimizer, loss) in enumerate(
        [
            (lambda: tf_effopt.SGD(0.05, momentum=0.5), "mse"),
            (lambda: keras.optimizers.SGD(0.05), "mse"),
            (lambda: keras.optimizers.Adam(0.01), of_labels),
            (lambda: tf_effopt.LossScaleOptimizer(adam()), of_labels),
        ]
    ):
        case.fit(make_optimizer, make, ids, labels, loss)
        found |= {f"{i}/{k}": x for k, x in case.found.items() if k != "replicas"}
    case.found = found


def added_loss_model() -> keras.Model:
    class Penalty(keras.layers.Layer):
        """A trained weight times a mean, which is none of no examples."""

        def build(self, shape):
            self.scale = self.add_weight(initializer="ones")

        def call(self, x):
            self.add_loss(0.1 * keras.ops.square(self.scale) * keras.ops.mean(x**2))
            return x

    model = dense_model()
    model.add(Penalty())
    return model


def an_empty_replica_of_convolutions(case):
    """Of synchronized moments, and in evaluation and prediction, too."""
    images, labels = IMAGES[:ONE_MORE], np.arange(ONE_MORE) % 10
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = case.fit(
        lambda: tf_effopt.SGD(0.05, momentum=0.9),
        lambda: recipe_model(case.strategy),
        x=images,
        y=labels,
        loss=loss,
        validation_data=(images, labels),
        compile_options={"metrics": ["accuracy"]},
    )
    # First of one image: eagerly read, a batch's sizes are known, that of nothing, too.
    case.found["logs/predict_one"] = model.predict(images[:1], verbose=0)
    case.found["logs/predict"] = model.predict(images, batch_size=BATCH, verbose=0)


def an_empty_replica_of_own_moments(case):
    """What isn't synchronized differs by replica; without examples it stays."""

    def make():
        layers = [keras.Input((8,)), keras.layers.BatchNormalization()]
        return keras.Sequential([*layers, keras.layers.Dense(1)])

    averages = []
    for rows in (ONE_MORE - 1, ONE_MORE):
        make_optimizer = lambda: tf_effopt.SGD(0.0)
        model = case.fit(make_optimizer, make, x=X[:rows], y=Y[:rows])
        parts = case.strategy.experimental_local_results
        moving = (model.layers[0].moving_mean, model.layers[0].moving_variance)
        averages.append([x.numpy() for v in moving for x in parts(v.value)[1:]])
        assert model.optimizer.skipped_steps == 0
    for before, after in zip(*averages, strict=True):
        np.testing.assert_array_equal(before, after)
    case.found = {"compared": np.asarray(len(averages))}


def losses_that_layers_add(case):
    """Replicas take turns at synchronized moments: none may find another's loss."""
    several = case.strategy.num_replicas_in_sync > 1

    def make():
        layers = [
            keras.Input((8,)),
            keras.layers.Dense(6, activity_regularizer=keras.regularizers.L2(0.1)),
            keras.layers.BatchNormalization(synchronized=several),
            keras.layers.Dense(1),
        ]
        return keras.Sequential(layers)

    case.fit(lambda: tf_effopt.SGD(0.05), make, x=X[:ONE_MORE], y=Y[:ONE_MORE])


def mean_of_ones(y, predicted):
    return keras.ops.mean(keras.ops.ones_like(predicted))


def class_weights(case):
    case.fit(
        adam,
        lambda: dense_model(3),
        y=LABELS,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        class_weight={0: 1.0, 1: 0.3, 2: 5.0},
        compile_options={"metrics": ["accuracy"], "weighted_metrics": ["accuracy"]},
    )


def sample_weights(case):
    case.fit(adam, sample_weight=WEIGHTS, compile_options={"weighted_metrics": ["mae"]})


def means_by_sample_weight(case):
    loss = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
    case.fit(lambda: tf_effopt.SGD(0.05), loss=loss, sample_weight=WEIGHTS)


def no_reduction(case):
    loss = keras.losses.MeanSquaredError(reduction="none")
    case.fit(lambda: tf_effopt.SGD(0.002), loss=loss)


def even_batches(case):
    """Replicas have equal numbers of examples, but not equal weights and masks."""
    even = slice(0, 3 * BATCH)
    by_weight = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
    case.fit(
        lambda: tf_effopt.SGD(0.05),
        x=X[even],
        y=Y[even],
        loss=by_weight,
        sample_weight=WEIGHTS[even],
    )
    weighted = {f"weighted/{k}": x for k, x in case.found.items() if k != "replicas"}
    y = np.repeat(Y[even, None], 3, axis=1)
    make_model = lambda: table_model(mask=True)
    case.fit(lambda: tf_effopt.SGD(0.05), make_model, x=IDS[even], y=y)
    case.found |= weighted


def eagerly(case):
    options = {"run_eagerly": True, "metrics": ["mae"]}
    rows = {"x": X[:ONE_MORE], "y": Y[:ONE_MORE], "compile_options": options}
    # A replica that has nothing takes part in the sum of the weights.
    by_weight = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
    case.fit(adam, loss=by_weight, sample_weight=WEIGHTS[:ONE_MORE], **rows)
    weighted = {f"weighted/{k}": x for k, x in case.found.items() if k != "replicas"}
    case.fit(adam, **rows)
    case.found |= weighted


def sums(case):
    loss = keras.losses.MeanSquaredError(reduction="sum")
    case.fit(lambda: tf_effopt.SGD(0.002), loss=loss)


def scalar_loss(case):
    loss = lambda y, p: keras.ops.mean(keras.ops.square(y - p))
    case.fit(lambda: tf_effopt.SGD(0.05), loss=loss)


def losses_inside_of_others(case):
    """In a loss, a metric and a layer each counts once, by its share of the examples."""
    mse, huber = keras.losses.MeanSquaredError(), keras.losses.Huber()

    class Penalty(keras.layers.Layer):
        def call(self, x):
            self.add_loss(0.1 * mse(keras.ops.ones_like(x), x))
            return x

    def make_model():
        model = dense_model()
        model.add(Penalty())
        return model

    def scalar(y, p):
        return keras.ops.mean(keras.ops.abs(y - p))

    case.fit(
        lambda: tf_effopt.SGD(0.05),
        make_model,
        loss=lambda y, p: 0.5 * mse(y, p) + 0.5 * huber(y, p),
        validation_data=(X[:7], Y[:7]),
        compile_options={
            "metrics": [
                scalar,
                keras.losses.MeanAbsoluteError(),
                lambda y, p: mse(y, p),
            ]
        },
    )


def regularizer(case):
    make_model = lambda: dense_model(kernel_regularizer="l2")
    case.fit(lambda: tf_effopt.SGD(0.05), make_model)


def masks(case):
    case.fit(
        lambda: tf_effopt.SGD(0.05),
        lambda: table_model(mask=True),
        x=IDS,
        y=np.repeat(Y[:, None], 3, axis=1),
    )


def two_outputs(case):
    def make():
        inputs = keras.Input((8,))
        init = keras.initializers.GlorotUniform(seed=1)
        heads = [
            keras.layers.Dense(1, kernel_initializer=init, name=name)(inputs)
            for name in "ab"
        ]
        return keras.Model(inputs, heads)

    case.fit(adam, make, y=[Y, 2 * Y], loss=["mse", "mae"])


def repeated_ids(case):
    case.fit(adam, table_model, x=IDS)


def lazy_rows(case):
    case.fit(lambda: adam(lazy=True, global_clipnorm=0.1), table_model, x=IDS)


def numbers_of_the_model(case):
    case.fit(lambda: tf_effopt.Prodigy(0.5, initial_estimate=0.05))


def hidden_matrices(case):
    case.fit(lambda: tf_effopt.Muon(0.01))


def weights_for_evaluation(case):
    case.fit(
        lambda: tf_effopt.ScheduleFreeAdamW(0.01),
        validation_data=(X, Y),
        callbacks=[tf_effopt.callbacks.EvaluationWeights()],
    )


def shuffled(case):
    case.fit(adam, shuffle=True)


def datasets(case):
    """Batches of a known size, as the recipe's; validation, callbacks, bar."""
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(BATCH)
    seen = []
    each = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(logs["loss"])
    )
    stop = keras.callbacks.EarlyStopping("val_loss", patience=9)
    model = case.fit(
        adam,
        x=data,
        y=None,
        batch_size=None,
        verbose=1,
        validation_data=data,
        callbacks=[each, stop],
    )
    assert len(seen) == 8
    case.found["logs/evaluate"] = np.asarray(model.evaluate(data, verbose=0))


def generator(case):
    """It gives no batch again: none may be used up to build the model."""
    starts = range(0, ROWS, BATCH)
    batches = (
        (X[i : i + BATCH], Y[i : i + BATCH]) for _ in range(EPOCHS) for i in starts
    )
    data = {"x": batches, "y": None, "batch_size": None}
    case.fit(adam, **data, steps_per_epoch=len(starts))


def parts_of_arrays(case):
    """Nothing may be written into the arrays that a dataset gives parts of."""
    x, y = (_aligned(array[: 3 * BATCH]) for array in (X, Y))

    class Parts(keras.utils.PyDataset):
        def __len__(self):
            return len(x) // BATCH

        def __getitem__(self, i):
            return x[i * BATCH :][:BATCH], y[i * BATCH :][:BATCH]

    data = {"x": Parts(), "y": None, "batch_size": None}
    model = case.fit(adam, **data, validation_data=Parts())
    model.predict(Parts(), verbose=0)
    np.testing.assert_array_equal(x, X[: len(x)])
    np.testing.assert_array_equal(y, Y[: len(y)])


def _aligned(array: np.ndarray) -> np.ndarray:
    """A copy where TensorFlow takes it as it is: at a multiple of 64 bytes."""
    memory = np.empty(array.size + 16, array.dtype)
    first = -memory.ctypes.data % 64 // array.itemsize
    copied = memory[first : first + array.size].reshape(array.shape)
    copied[...] = array
    return copied


def prediction(case):
    model = case.fit(adam)
    case.found["logs/predict"] = model.predict(X, batch_size=BATCH, verbose=0)


def on_batch(case):
    """Each replica has all of the batch: sums count it once."""
    binary = (Y > 1).astype("float32")
    summed = keras.losses.BinaryCrossentropy(from_logits=True, reduction="sum")
    for loss in (keras.losses.BinaryCrossentropy(from_logits=True), summed):
        with case.strategy.scope():
            model = dense_model()
            metrics = [keras.metrics.TruePositives(0.0), "mae"]
            model.compile(tf_effopt.SGD(0.01), loss, metrics=metrics)
        tf_effopt.distribute.prepare(model)
        found = [model.train_on_batch(X[:n], binary[:n]) for n in (16, 15, 1)]
        found.append(model.test_on_batch(X[:15], binary[:15]))
        case.save(model, **{loss.reduction: found})
        case.found[f"logs/{loss.reduction}/predicted"] = model.predict_on_batch(X[:15])


def files(case):
    """Each worker takes its part of a batch, not some of the files."""
    folder = tempfile.TemporaryDirectory()
    paths = [os.path.join(folder.name, name) for name in "ab"]
    for path, rows in zip(paths, (range(40), range(40, ROWS)), strict=True):
        Path(path).write_text("\n".join(map(str, rows)))

    def row(line):
        number = tf.strings.to_number(line, tf.int32)
        return tf.gather(X, number), tf.gather(Y, number)

    data = tf.data.TextLineDataset(paths).map(row).batch(BATCH)
    model = case.fit(adam, x=data, y=None, batch_size=None, validation_data=data)
    case.found["logs/predict"] = model.predict(data, verbose=0)


def metrics_of_a_step_of_ones_own(case):
    """By its own names, and one whose result is its variable."""

    class Count(keras.metrics.Metric):
        def __init__(self):
            super().__init__(name="count")
            self.total = self.add_weight(name="total", initializer="zeros")

        def update_state(self, y):
            self.total.assign_add(keras.ops.cast(keras.ops.shape(y)[0], "float32"))

        def result(self):
            return self.total

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = dense_model()
            self.count = Count()
            self.unused = keras.metrics.Mean(name="unused")

        def call(self, x):
            return self.inner(x)

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
            self.count.update_state(y)
            replicas = self.distribute_strategy.num_replicas_in_sync
            return {"count": self.count.result(), "my_loss": loss * replicas}

    seen = []
    each = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(float(logs["count"]))
    )
    case.fit(adam, Model, callbacks=[each])
    case.found["logs/seen"] = np.asarray(seen)


def compute_loss_of_ones_own(case):
    """A loss of Keras's in it counts by the share; if there is none, that is said."""
    of_keras = keras.losses.MeanSquaredError()

    def made_with(loss):
        class Model(keras.Sequential):
            def compute_loss(self, x=None, y=None, y_pred=None, weight=None):
                return loss(y, y_pred)

        return lambda: Model(dense_model().layers)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = lambda y, p: keras.ops.mean(keras.ops.square(y - p))
        case.fit(adam, made_with(loss))
        several = case.strategy.num_replicas_in_sync > 1
        told = [w for w in caught if "calls no loss of Keras" in str(w.message)]
        assert len(told) == int(several)
        caught.clear()
        case.fit(adam, made_with(of_keras), validation_data=(X, Y))
        assert not any("calls no loss" in str(w.message) for w in caught)


def fixed_size(case):
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(BATCH, drop_remainder=True)
    case.fit(adam, x=data, y=None, batch_size=None)


def recipe(case, make_optimizer=None, **compile_options):
    """The recipe's CNN with synchronized batch norm, whose statistics count, too."""
    case.fit(
        make_optimizer or (lambda: tf_effopt.SGD(0.05, momentum=0.9)),
        lambda: recipe_model(case.strategy),
        x=IMAGES,
        y=np.arange(ROWS) % 10,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        compile_options=compile_options,
    )


def recipe_adam(case):
    recipe(case, lambda: tf_effopt.Adam(1e-3))


def recipe_adamw_and_clipping(case):
    recipe(case, lambda: tf_effopt.AdamW(1e-3, weight_decay=0.1, global_clipnorm=1.0))


def recipe_accumulation(case):
    recipe(case, lambda: tf_effopt.Adam(1e-3, gradient_accumulation_steps=2))


def recipe_ema(case):
    options = {"use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 3}
    recipe(case, lambda: tf_effopt.Adam(1e-3, **options))


def recipe_steps_per_execution(case):
    recipe(case, lambda: tf_effopt.Adam(1e-3), steps_per_execution=4)


def infinite(case):
    """The last replica's part of one batch has an infinite gradient."""
    x = X.copy()
    x[2 * BATCH - 2, 0] = np.inf
    make = lambda: tf_effopt.LossScaleOptimizer(adam(), initial_scale=8.0)
    model = case.fit(make, x=x)
    optimizer = model.optimizer
    case.found["scale"] = optimizer.dynamic_scale.numpy()
    case.found["skipped"] = np.asarray(optimizer.inner_optimizer.skipped_steps)


def jit(case):
    """Turned off with a warning, where there are several replicas."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        case.fit(adam, compile_options={"jit_compile": True})
    told = any("`jit_compile` was turned off" in str(w.message) for w in caught)
    assert told == (case.strategy.num_replicas_in_sync > 1)


def training_loop(case):
    """As the README's."""
    strategy = case.strategy
    with strategy.scope():
        model = dense_model()
        model.optimizer = optimizer = adam(global_clipnorm=0.1)

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((model(x) - y) ** 2) / BATCH
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    @tf.function
    def train(x, y):
        losses = strategy.run(step, args=(x, y))
        return strategy.reduce("SUM", losses, axis=None)

    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(BATCH)
    losses = []
    for _ in range(EPOCHS):
        for x, y in strategy.experimental_distribute_dataset(data):
            losses.append(float(train(x, y)))
    case.save(model, loss=losses)


CASES = [
    sgd,
    adam_in_fit,
    adamw_and_clipping,
    accumulation,
    ema,
    steps_per_execution,
    an_empty_replica,
    an_empty_replica_in_a_loop,
    an_empty_replica_of_losses_and_means,
    an_empty_replica_of_each_kind_of_loss,
    an_empty_replica_of_convolutions,
    an_empty_replica_of_own_moments,
    an_empty_replica_whose_loss_is_no_number,
    losses_that_layers_add,
    class_weights,
    sample_weights,
    means_by_sample_weight,
    no_reduction,
    even_batches,
    eagerly,
    sums,
    scalar_loss,
    losses_inside_of_others,
    regularizer,
    masks,
    two_outputs,
    repeated_ids,
    lazy_rows,
    numbers_of_the_model,
    hidden_matrices,
    weights_for_evaluation,
    shuffled,
    datasets,
    generator,
    parts_of_arrays,
    prediction,
    on_batch,
    files,
    metrics_of_a_step_of_ones_own,
    compute_loss_of_ones_own,
    fixed_size,
    recipe,
    recipe_adam,
    recipe_adamw_and_clipping,
    recipe_accumulation,
    recipe_ema,
    recipe_steps_per_execution,
    infinite,
    jit,
    training_loop,
]


def make_strategy(name: str) -> tf.distribute.Strategy:
    make = tf_effopt.distribute.strategy
    if name == "workers":
        return make("multi_worker")
    if name == "none":
        return make("none")
    return make("mirrored", replicas=int(name.removeprefix("mirrored")))


def main() -> None:
    names, output, *wanted = sys.argv[1:]
    # `none` last: devices can't be split once TensorFlow has started.
    strategies = {x: make_strategy(x) for x in sorted(names.split(","))}
    if names == "workers":
        output += f".{json.loads(os.environ['TF_CONFIG'])['task']['index']}"
    saved = {}
    for name, strategy in strategies.items():
        for function in CASES:
            if wanted and function.__name__ not in wanted:
                continue
            case = Case(strategy)
            try:
                function(case)
            except Exception:  # noqa: BLE001 - the test that reads this reports it
                case.found = {"error": np.asarray(traceback.format_exc()[-3000:])}
            for what, value in case.found.items():
                saved[f"{name}|{function.__name__}|{what}"] = value
    with open(output, "wb") as file:
        np.savez(file, **saved)


if __name__ == "__main__":
    main()
