"""Compares `fit` on 2 mirrored replicas with `fit` on one device.

    python tests/mirrored.py tf_effopt OUTPUT.json
    python tests/mirrored.py keras.optimizers OUTPUT.json

A separate process: the devices are split at its start, and a collective
that fails poisons the process; what may fail that way comes last.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from cases import STAGES, SentMomentum, programs_of, traces

import tf_effopt
from tf_effopt.optimizers import muon
from tf_effopt.runtime import programs as shared

optimizers = importlib.import_module(sys.argv[1])

rng = np.random.default_rng(0)
X = rng.normal(size=(64, 8)).astype("float32")
Y = (X @ rng.normal(size=(8, 1)) + 1.0).astype("float32")
# Each batch of 16 has ids that repeat in a replica and ids that both have.
IDS = rng.integers(0, 6, size=(64, 3)).astype("int32")
BATCH = 16


def dense_model() -> keras.Model:
    init = keras.initializers.GlorotUniform(seed=1)
    return keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(
                16, activation="tanh", kernel_initializer=init, name="first"
            ),
            keras.layers.Dense(1, kernel_initializer=init, name="second"),
        ]
    )


def table_model(one_hot: bool) -> keras.Model:
    """An embedding, or the same as a product with one-hot rows."""
    init = keras.initializers.RandomNormal(seed=2)
    table = (
        keras.layers.Dense(4, use_bias=False, kernel_initializer=init)
        if one_hot
        else keras.layers.Embedding(9, 4, embeddings_initializer=init)
    )
    shape = (3, 9) if one_hot else (3,)
    return keras.Sequential(
        [
            keras.Input(shape, dtype="float32" if one_hot else "int32"),
            table,
            keras.layers.Flatten(),
            keras.layers.Dense(1, kernel_initializer=keras.initializers.Ones()),
        ]
    )


def fit(
    replicas: int,
    make_optimizer,
    make_model=dense_model,
    x=X,
    y=Y,
    strategy=None,
    **compile_options,
) -> keras.Model:
    if replicas == 2:
        scope = (strategy or tf.distribute.MirroredStrategy()).scope()
    else:
        scope = tf.distribute.get_strategy().scope()
    with scope:
        model = make_model()
        optimizer = make_optimizer()
        model.compile(optimizer, "mse", jit_compile=False, **compile_options)
    model.fit(x, y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0)
    return model


def values(model: keras.Model) -> list[np.ndarray]:
    """Weights, state, and each replica's own copy of the weights."""
    variables = model.weights + model.optimizer.variables
    return [keras.ops.convert_to_numpy(v) for v in variables]


def difference(a: list, b: list) -> float:
    return max(
        float(np.max(np.abs(np.subtract(x, y, dtype="float64")), initial=0.0))
        if np.all(np.isfinite(x))
        else float("inf")
        for x, y in zip(a, b, strict=True)
    )


def replicas_differ(model: keras.Model) -> float:
    return max(
        float(np.max(np.abs(v.value.values[0].numpy() - v.value.values[1].numpy())))
        for v in model.trainable_variables
    )


def compare(make_optimizer, two_options=None, **options) -> dict:
    two = fit(2, make_optimizer, **options, **(two_options or {}))
    return comparison(two, make_optimizer, **options)


def comparison(two: keras.Model, make_optimizer, **options) -> dict:
    one = fit(1, make_optimizer, **options)
    return {
        "difference": difference(values(two), values(one)),
        "replicas": replicas_differ(two),
    }


def adam(**options):
    return lambda: optimizers.Adam(learning_rate=0.01, **options)


def plain():
    return compare(adam())


def clipnorm():
    return compare(adam(clipnorm=0.1))


def clipvalue():
    return compare(adam(clipvalue=0.05))


def global_clipnorm():
    # Momentum, not Adam: Adam's step hardly depends on the gradient's scale.
    make = lambda: optimizers.SGD(0.05, momentum=0.9, global_clipnorm=0.1)
    return compare(make)


def accumulation():
    return compare(adam(gradient_accumulation_steps=2))


def accumulation_and_clipping():
    return compare(adam(gradient_accumulation_steps=2, global_clipnorm=0.1))


def ema_overwrite():
    return compare(adam(use_ema=True, ema_momentum=0.8, ema_overwrite_frequency=3))


def repeated_ids():
    """A table whose ids repeat moves as it does by its dense gradient."""
    two = fit(2, adam(), lambda: table_model(one_hot=False), x=IDS)
    rows = np.eye(9, dtype="float32")[IDS]
    one = fit(1, adam(), lambda: table_model(one_hot=True), x=rows)
    return {
        "difference": difference(values(two), values(one)),
        "replicas": replicas_differ(two),
    }


def bad_batch() -> np.ndarray:
    """The second replica's half of one batch has an infinite gradient."""
    x = X.copy()
    x[2 * BATCH - 2, 0] = np.inf
    return x


def infinite_in_keras_wrapper():
    """Weights and slots as on one device; Keras's scale isn't compared."""
    make = lambda: keras.optimizers.LossScaleOptimizer(adam()())
    two, one = fit(2, make, x=bad_batch()), fit(1, make, x=bad_batch())

    def inner(model):
        variables = model.weights + model.optimizer.inner_optimizer.variables
        return [keras.ops.convert_to_numpy(v) for v in variables]

    return {
        "difference": difference(inner(two), inner(one)),
        "replicas": replicas_differ(two),
    }


def steps_per_execution():
    return compare(adam(), {"steps_per_execution": 2})


# What only this package has.


def infinite_in_our_wrapper():
    """The scale falls, too: 8 steps, one of them bad in each of 2 epochs."""
    make = lambda: tf_effopt.LossScaleOptimizer(adam()(), initial_scale=8.0)
    model = fit(2, make, x=bad_batch())
    result = comparison(model, make, x=bad_batch())
    result["scale"] = float(model.optimizer.dynamic_scale.numpy())
    result["iterations"] = int(model.optimizer.iterations.numpy())
    result["skipped"] = model.optimizer.inner_optimizer.skipped_steps
    return result


def everything_in_our_wrapper_and_a_loop():
    make = lambda: tf_effopt.LossScaleOptimizer(
        adam(global_clipnorm=0.1, gradient_accumulation_steps=2, use_ema=True)()
    )
    return compare(make, {"steps_per_execution": 2}, x=bad_batch())


def our_wrapper_around_keras():
    make = lambda: tf_effopt.LossScaleOptimizer(
        keras.optimizers.Adam(0.01), initial_scale=8.0
    )
    return compare(make, x=bad_batch())


def lazy_rows():
    return compare(
        adam(lazy=True, global_clipnorm=0.1),
        make_model=lambda: table_model(one_hot=False),
        x=IDS,
    )


def lazy_rows_as_on_a_tpu():
    return as_on_a_tpu(lazy_rows)


def bfloat16_replicas_stay_equal():
    def model():
        return keras.Sequential(
            [keras.Input((8,)), keras.layers.Dense(1, dtype="bfloat16")]
        )

    two = fit(2, adam(), model)
    return {"difference": 0.0, "replicas": replicas_differ(two)}


def numbers_of_the_model():
    """Sums over all tensors, of the reduced gradient, are the same on each."""
    return compare(lambda: optimizers.Prodigy(0.5, initial_estimate=0.05))


def groups():
    """Multiplied, decayed and frozen; a number is changed before the first step."""

    def make():
        bias = tf_effopt.Group("bias", weight_decay=0.5)
        kernels = tf_effopt.Group("kernel", learning_rate_multiplier=9.0)
        frozen = tf_effopt.Group("second/bias", frozen=True)
        optimizer = adam(global_clipnorm=0.1, groups=[bias, kernels, frozen])()
        kernels.learning_rate_multiplier = 0.5
        return optimizer

    return compare(make)


def divided_matrices_as_on_a_tpu():
    """Where small tensors are stacked, too."""
    return as_on_a_tpu(divided_matrices)


def as_on_a_tpu(scenario):
    """The scenario, with two replicas that answer as a TPU's strategy does."""
    mirrored = tf.distribute.MirroredStrategy
    mirrored.compiles_steps = property(lambda self: self.num_replicas_in_sync == 2)
    try:
        return scenario()
    finally:
        del mirrored.compiles_steps


def divided_matrices():
    """Three of one shape: each replica has two of them, one of these for nothing."""
    seen = []
    original = muon.orthogonalized

    def spy(x, *arguments):
        seen.append(tuple(x.shape))
        return original(x, *arguments)

    def layer(units, seed, **kwargs):
        init = keras.initializers.GlorotUniform(seed=seed)
        return keras.layers.Dense(units, kernel_initializer=init, **kwargs)

    def model():
        layers = [layer(16, seed, activation="tanh") for seed in range(4)]
        head = layer(8, seed=4, name="head")
        return keras.Sequential([keras.Input((8,)), *layers, head])

    def make():
        optimizer = optimizers.Muon(0.01, exclude_layers=["head"])
        tf_effopt.distribute.divide_matrix_work(optimizer)
        return optimizer

    targets = np.random.default_rng(1).normal(size=(64, 8)).astype("float32")
    muon.orthogonalized = spy
    try:
        two = fit(2, make, make_model=model, y=targets)
        of_two, seen[:] = list(seen), []
        result = comparison(two, make, make_model=model, y=targets)
    finally:
        muon.orthogonalized = original
    return result | {"of_two": of_two[-2:], "of_one": seen[-2:]}


def a_gradient_from_outside():
    """Each replica's is the same tensor: it counts as often as there are replicas."""
    strategy = tf.distribute.MirroredStrategy()
    with strategy.scope():
        variable = keras.Variable(np.zeros(3, "float32"))
        optimizer = optimizers.SGD(1.0)
        optimizer.build([variable])
    gradient = tf.constant([1.0, 2.0, 3.0])

    @tf.function
    def in_a_graph():
        strategy.run(lambda: optimizer.apply([gradient]))

    in_a_graph()
    strategy.run(lambda: optimizer.apply([gradient]))
    return {"weights": variable.numpy().tolist()}


def compressed_gradients():
    """Those of two replicas, as SGD's first step leaves them in weights of 0."""
    strategy = tf.distribute.MirroredStrategy()
    with strategy.scope():
        table = keras.Variable(np.zeros((4, 2), "float32"))
        dense = keras.Variable(np.zeros(3, "float32"))
        optimizer = optimizers.SGD(1.0)
        tf_effopt.distribute.compress_gradients(optimizer)
        optimizer.build([table, dense])

    def replica():
        rows = tf.constant([[1.003, 2.0], [3.0, 4.0]])
        sparse = tf.IndexedSlices(rows, tf.constant([1, 3]), tf.constant([4, 2]))
        optimizer.apply([sparse, tf.constant([1.0, 1.003, 1 / 3])])

    tf.function(lambda: strategy.run(replica))()
    return {
        "dense": (-dense.value.values[1].numpy()).tolist(),
        "table": (-table.value.values[1].numpy()).tolist(),
    }


def weights_for_evaluation():
    """They are in place after `fit`; so are those to train at, when put back."""
    models = []

    def make():
        models.append(optimizers.ScheduleFreeAdamW(0.01, weight_decay=0.1))
        return models[-1]

    two, one = fit(2, make), fit(1, make)
    at_x = difference(values(two), values(one))
    for optimizer in models:
        assert optimizer.is_evaluating
        optimizer.use_training_weights()
    at_y = difference(values(two), values(one))
    return {"difference": max(at_x, at_y), "replicas": replicas_differ(two)}


def stage(name: str):
    """Before the rule and after it, what they see is equal on each replica."""
    return lambda: compare(lambda: adam(**STAGES[name]())())


def other_reductions():
    strategy = tf.distribute.MirroredStrategy(
        cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    return compare(adam(), {"strategy": strategy, "steps_per_execution": 2})


def training_loop_without_build():
    """A custom training loop, whose first step builds the optimizer."""
    strategy = tf.distribute.MirroredStrategy()
    with strategy.scope():
        model = dense_model()
        optimizer = adam(global_clipnorm=0.1)()

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((model(x) - y) ** 2) / BATCH
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)

    @tf.function
    def train(x, y):
        strategy.run(step, args=(x, y))

    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(BATCH)
    for _ in range(2):
        for x, y in strategy.experimental_distribute_dataset(data):
            train(x, y)
    one = fit(1, adam(global_clipnorm=0.1))
    mine = [v.numpy() for v in model.weights]
    return {
        "difference": difference(mine, [v.numpy() for v in one.weights]),
        "replicas": replicas_differ(model),
    }


def optimizers_by_a_flag():
    """Two optimizers in one function: the second is built in its second trace."""
    strategy = tf.distribute.MirroredStrategy()
    with strategy.scope():
        w = tf.Variable(np.ones((3, 2), "float32"))
        rates = {True: 0.1, False: 0.01}
        chosen = {flag: tf_effopt.SGD(r, momentum=0.9) for flag, r in rates.items()}

    def step(flag):
        # Of each replica half the gradient of the square of a row.
        rows = tf.IndexedSlices([w[1]], (1,), (3, 2))
        chosen[flag].apply([rows], [w])

    @tf.function
    def train(flag):
        strategy.run(step, args=(flag,))

    right, momenta = 1.0, dict.fromkeys(rates, 0.0)
    for flag in (True, False, True, True, False):
        train(flag)
        momenta[flag] = 0.9 * momenta[flag] - rates[flag] * 2.0 * right
        right += momenta[flag]
    parts = [v.numpy() for v in strategy.experimental_local_results(w)]
    return {
        "difference": difference(
            [parts[0]], [np.array([[1.0] * 2, [right] * 2, [1.0] * 2])]
        ),
        "replicas": float(np.abs(parts[0] - parts[1]).max()),
    }


def programs_per_replica():
    """Two programs for two replicas, each traced once in 8 steps."""
    shared._shared.clear()  # those of other scenarios
    model = fit(2, adam(global_clipnorm=0.1, use_ema=True))
    programs = programs_of(model.optimizer)
    return {
        "difference": 0.0,
        "replicas": replicas_differ(model),
        "programs": len(programs),
        "devices": len({p.device for p in programs}),
        "traces": traces(model.optimizer),
        "compiled": [p.update.is_compiled for p in programs],
    }


def measured_gradients():
    """How often squares are summed outside of the replicas' programs."""

    def measured(make_optimizer, dtype="float32", sparse=False):
        strategy = tf.distribute.MirroredStrategy()
        with strategy.scope():
            values = [np.zeros((4, 2)), np.zeros(3), np.zeros(2)]
            weights = [keras.Variable(x, dtype=dtype) for x in values]
            optimizer = make_optimizer()
            optimizer.build(weights)

        def replica():
            gradients = [tf.ones(w.shape, w.dtype) for w in weights]
            if sparse:
                rows = tf.ones((2, 2), dtype)
                indices = tf.constant([0, 3])
                shape = tf.constant([4, 2])
                gradients[0] = tf.IndexedSlices(rows, indices, shape)
            optimizer.apply(gradients)

        step = tf.function(lambda: strategy.run(replica))
        operations = step.get_concrete_function().graph.get_operations()
        return sum(operation.type == "L2Loss" for operation in operations)

    return {
        "once": {
            "plain": measured(adam()),
            "float64": measured(adam(), "float64"),
            "clipped": measured(adam(global_clipnorm=1.0)),
            "accumulated": measured(adam(gradient_accumulation_steps=2)),
            "sparse": measured(adam(), sparse=True),
            "wrapped": measured(lambda: tf_effopt.LossScaleOptimizer(adam()())),
        },
        "by each": {
            "bfloat16": measured(adam(), "bfloat16"),
            "clipped mean": measured(
                adam(gradient_accumulation_steps=2, global_clipnorm=1.0)
            ),
            "loss scaled": measured(adam(loss_scale_factor=8.0)),
            "lazy": measured(adam(lazy=True), sparse=True),
        },
    }


def what_each_replica_sends():
    """Rounded on each, with what was lost fed back; see test_sent.py."""

    class ErrorFeedback(tf_effopt.Stage):
        where = "sent"
        slots = tf_effopt.rules.Slots(error="error")

        @staticmethod
        def function(g, slots):
            total = g + slots["error"]
            x = keras.ops.round(total)
            return x, {"error": total - x}

    def make(strategy):
        with strategy.scope():
            variable = keras.Variable([0.0])
            optimizer = tf_effopt.SGD(1.0, transforms=[ErrorFeedback()])
            optimizer.build([variable])
        return variable, optimizer

    def run(own_gradients, in_graph):
        strategy = tf.distribute.MirroredStrategy()
        variable, optimizer = make(strategy)

        def replica():
            i = tf.distribute.get_replica_context().replica_id_in_sync_group
            optimizer.apply([tf.gather(tf.constant(own_gradients), [i])])

        def step():
            strategy.run(replica)

        step = tf.function(step) if in_graph else step
        for _ in range(2):
            step()
        error = optimizer.variables[-1]
        return {
            "weights": [float(x.numpy()[0]) for x in variable.value.values],
            "errors": [float(x.numpy()[0]) for x in error.value.values],
            "saved": float(error.numpy()[0]),
            "skipped": optimizer.skipped_steps,
        }, optimizer

    found = {}
    for name, in_graph in (("eager", False), ("graph", True)):
        found[name], optimizer = run([0.4, 1.3], in_graph)
        found[f"{name}, not finite"], _ = run([0.4, float("nan")], in_graph)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = tf.train.Checkpoint(optimizer=optimizer)
        path = checkpoint.write(f"{folder}/checkpoint")
        for name, strategy in (
            ("two", tf.distribute.MirroredStrategy()),
            ("one", tf.distribute.get_strategy()),
        ):
            _, other = make(strategy)
            tf.train.Checkpoint(optimizer=other).read(path).assert_consumed()
            error = other.variables[-1]
            local = strategy.experimental_local_results(error.value)
            found[f"restored on {name}"] = [float(x.numpy()[0]) for x in local]
    return found


def what_each_replica_sends_in_fit():
    """A linear stage: the sum over replicas is that of one device."""

    return compare(lambda: adam(global_clipnorm=0.1, transforms=[SentMomentum()])())


def infinite_sum():
    """Of gradients that are finite on each replica."""
    strategy = tf.distribute.MirroredStrategy()
    with strategy.scope():
        variable = keras.Variable(np.zeros((2, 2), "float32"))
        optimizer = adam()()
        optimizer.build([variable])
    strategy.run(lambda: optimizer.apply([tf.fill((2, 2), 2e38)]))
    changed = [
        v.path for v in [variable, *optimizer.variables[2:]] if np.any(v.numpy())
    ]
    return {"changed": changed, "skipped": optimizer.skipped_steps}


def mixed_strategies():
    """Clear errors instead of TensorFlow's."""
    found = []

    def attempt(call):
        try:
            call()
        except (ValueError, RuntimeError) as error:
            found.append(str(error))

    strategy = tf.distribute.MirroredStrategy()
    outside = adam()()
    with strategy.scope():
        variable = keras.Variable([1.0])
        inside = adam()()
        inside.build([variable])
    attempt(lambda: outside.build([variable]))
    with strategy.scope():
        attempt(lambda: inside.apply([tf.constant([1.0])], [variable]))
    attempt(lambda: inside.apply([tf.constant([1.0])], [variable]))
    return {"difference": 0.0, "replicas": 0.0, "errors": found}


SHARED = [
    plain,
    clipnorm,
    clipvalue,
    global_clipnorm,
    accumulation,
    accumulation_and_clipping,
    ema_overwrite,
    repeated_ids,
    infinite_in_keras_wrapper,
    steps_per_execution,
]
OURS = [
    infinite_in_our_wrapper,
    everything_in_our_wrapper_and_a_loop,
    our_wrapper_around_keras,
    lazy_rows,
    lazy_rows_as_on_a_tpu,
    bfloat16_replicas_stay_equal,
    numbers_of_the_model,
    groups,
    divided_matrices,
    divided_matrices_as_on_a_tpu,
    a_gradient_from_outside,
    compressed_gradients,
    weights_for_evaluation,
    other_reductions,
    training_loop_without_build,
    optimizers_by_a_flag,
    programs_per_replica,
    measured_gradients,
    what_each_replica_sends,
    what_each_replica_sends_in_fit,
    infinite_sum,
    mixed_strategies,
]
SCENARIOS = {scenario.__name__: scenario for scenario in SHARED}
if optimizers is tf_effopt:
    SCENARIOS |= {scenario.__name__: scenario for scenario in OURS}
    SCENARIOS |= {f"stage_{name}": stage(name) for name in STAGES}


def main() -> None:
    cpu = tf.config.list_physical_devices("CPU")[0]
    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, two)
    results = {}
    wanted = sys.argv[3:]
    for name, scenario in SCENARIOS.items():
        if wanted and name not in wanted:
            continue
        try:
            results[name] = scenario()
        except Exception as error:  # noqa: BLE001 - the test that reads this reports it
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    with open(sys.argv[2], "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main()
