"""What users of Keras do with an optimizer works: one device, TensorFlow."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import BY_NAME, X, Y, arrays, traces
from keras import ops

import tf_effopt

pytestmark = [pytest.mark.versions, pytest.mark.fresh_programs]

TOLERANCE = 2e-6
schedules = keras.optimizers.schedules


def fit(
    optimizer: Any,
    epochs: int = 2,
    model: Any = None,
    loss: Any = "mse",
    **options: Any,
) -> keras.Model:
    """Fits the small model, four batches an epoch; returns the model."""
    model = cases.compiled_model(optimizer, model, loss)
    model.fit(X, Y, batch_size=4, epochs=epochs, shuffle=False, verbose=0, **options)
    return model


def assert_near(values: Any, expected: Any) -> None:
    assert len(values) == len(expected)
    for value, other in zip(values, expected, strict=True):
        value, other = (np.asarray(ops.convert_to_numpy(x)) for x in (value, other))
        np.testing.assert_allclose(value, other, rtol=TOLERANCE, atol=TOLERANCE)


def assert_identical(values: Any, expected: Any) -> None:
    assert len(values) == len(expected)
    for value, other in zip(values, expected, strict=True):
        np.testing.assert_array_equal(
            ops.convert_to_numpy(value), ops.convert_to_numpy(other)
        )


def ones(*shape: int) -> tf.Tensor:
    return tf.ones(shape)


# ------------------------------------------------- learning rates, callbacks


class Halve(keras.callbacks.Callback):
    """Changes numbers of the optimizer while `fit` runs."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        optimizer = self.model.optimizer
        optimizer.learning_rate = float(optimizer.learning_rate) / 2


HABITS: dict[str, tuple[Any, list[Callable]]] = {
    "plateau": (
        0.1,
        [
            functools.partial(
                keras.callbacks.ReduceLROnPlateau,
                monitor="loss",
                factor=0.5,
                patience=1,
                min_delta=1e9,
            )
        ],
    ),
    "scheduler": (
        0.1,
        [
            functools.partial(
                keras.callbacks.LearningRateScheduler, lambda epoch, rate: rate * 0.5
            )
        ],
    ),
    "every batch": (0.1, [Halve]),
    "schedule": (schedules.CosineDecay(0.1, 10), []),
}


@pytest.mark.parametrize("habit", HABITS)
def test_changing_learning_rate_works_as_in_keras(habit):
    learning_rate, make_callbacks = HABITS[habit]
    weights = []
    for module in (tf_effopt, keras.optimizers):
        optimizer = module.SGD(learning_rate, momentum=0.9)
        callbacks = [make() for make in make_callbacks]
        model = fit(optimizer, epochs=3, callbacks=callbacks)
        weights.append(model.get_weights())
        assert float(optimizer.learning_rate) < 0.06
    assert_near(*weights)


def test_callable_learning_rate():
    rate = tf.Variable(0.5)
    optimizer = tf_effopt.SGD(lambda: rate)
    variable = keras.Variable([1.0])
    for value, expected in [(0.5, 0.5), (0.25, 0.25)]:
        rate.assign(value)
        optimizer.apply([ones(1)], [variable])
        assert variable.numpy()[0] == expected
    assert traces(optimizer) == [1]


class Loss:
    """The mean squared error, with the number of times it was traced."""

    def __init__(self):
        self.traces = 0

    def __call__(self, y: Any, predicted: Any) -> Any:
        self.traces += 1
        return ops.mean(ops.square(y - predicted))


class ChangeNumbers(keras.callbacks.Callback):
    """Sets numbers of the optimizer after the first epoch."""

    def __init__(self, **numbers: float):
        super().__init__()
        self.numbers = numbers
        self.traces = 0

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if epoch == 0:
            self.traces = self.model.loss.traces
            for name, value in self.numbers.items():
                setattr(self.model.optimizer, name, value)


def adam_with_everything() -> tf_effopt.Adam:
    return tf_effopt.Adam(0.01, weight_decay=0.1, clipnorm=1.0, use_ema=True)


@pytest.fixture(scope="module")
def unchanged() -> list[np.ndarray]:
    return fit(adam_with_everything()).get_weights()


@pytest.mark.parametrize("numbers", [{"learning_rate": 0.1}, {"beta_1": 0.1}], ids=str)
def test_number_changed_in_fit_has_effect_and_traces_nothing(numbers, unchanged):
    change = ChangeNumbers(**numbers)
    model = fit(adam_with_everything(), loss=Loss(), callbacks=[change])
    differences = [
        np.max(np.abs(a - b))
        for a, b in zip(model.get_weights(), unchanged, strict=True)
    ]
    assert max(differences) > 1e-4
    assert traces(model.optimizer) == [1]
    assert model.loss.traces == change.traces > 0


@pytest.fixture(scope="module")
def optimizer_with_everything() -> tf_effopt.Adam:
    optimizer = adam_with_everything()
    optimizer.build([keras.Variable([1.0, -2.0])])
    return optimizer


@pytest.mark.parametrize(
    "name, value",
    [("learning_rate", 0.1), ("beta_1", 0.5), ("beta_2", 0.5), ("epsilon", 1.0)]
    + [("weight_decay", 1.0), ("clipnorm", 1e-6), ("ema_momentum", 0.1)],
)
def test_every_number_can_change_without_tracing(
    optimizer_with_everything, name, value
):
    optimizer = optimizer_with_everything
    (tensors,) = optimizer._engine.state
    initial = arrays(optimizer.variables)

    def two_steps() -> list[np.ndarray]:
        tensors["weight"].assign([1.0, -2.0])
        for gradient in ([1.0, 2.0], [3.0, -1.0]):
            optimizer.apply([tf.constant(gradient)])
        result = arrays([tensors["weight"], tensors["ema"]["average"]])
        for variable, start in zip(optimizer.variables, initial, strict=True):
            variable.assign(start)
        return result

    before, old = two_steps(), float(getattr(optimizer, name))
    setattr(optimizer, name, value)
    after = two_steps()
    setattr(optimizer, name, old)
    assert any(np.max(np.abs(a - b)) > 1e-4 for a, b in zip(after, before, strict=True))
    assert_identical(two_steps(), before)
    assert traces(optimizer) == [1]


def test_number_changed_between_steps_acts_as_in_a_new_optimizer():
    changed, fresh = tf_effopt.Adam(0.1, beta_1=0.9), tf_effopt.Adam(0.1, beta_1=0.5)
    one, other = keras.Variable([1.0]), keras.Variable([1.0])
    changed.build([one])
    changed.beta_1 = 0.5
    for step in range(3):
        changed.apply([ones(1) * (step - 1.0)], [one])
        fresh.apply([ones(1) * (step - 1.0)], [other])
    assert_identical([one], [other])


# ---------------------------------------------------------------- fit again


@pytest.fixture(scope="module")
def fitted_twice() -> keras.Model:
    return fit(BY_NAME["adam"].make(), epochs=2)


def test_second_fit_goes_on(fitted_twice):
    model = fit(BY_NAME["adam"].make(), epochs=1)
    model.fit(X, Y, batch_size=4, shuffle=False, verbose=0)
    assert_identical(model.get_weights(), fitted_twice.get_weights())
    assert traces(model.optimizer) == [1]
    assert int(model.optimizer.iterations) == 8


def test_second_fit_after_compiling_anew_goes_on(fitted_twice):
    model = fit(BY_NAME["adam"].make(), epochs=1)
    fit(model.optimizer, epochs=1, model=model)
    assert_identical(model.get_weights(), fitted_twice.get_weights())
    assert int(model.optimizer.iterations) == 8


def test_functions_run_eagerly(fitted_twice):
    tf.config.run_functions_eagerly(True)
    try:
        model = fit(BY_NAME["adam"].make())
    finally:
        tf.config.run_functions_eagerly(False)
    assert_near(model.get_weights(), fitted_twice.get_weights())


def test_eager_model(fitted_twice):
    model = cases.small_model()
    model.compile(BY_NAME["adam"].make(), loss="mse", run_eagerly=True)
    model.fit(X, Y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    assert_near(model.get_weights(), fitted_twice.get_weights())


def test_optimizer_of_one_model_on_another_is_refused():
    optimizer = BY_NAME["adam"].make()
    optimizer.build(cases.small_model().trainable_variables)
    other = cases.compiled_model(optimizer)
    before = other.get_weights()
    with pytest.raises(ValueError, match="variables of another model.*first/kernel"):
        other.train_on_batch(X, Y)
    assert_identical(other.get_weights(), before)


@pytest.mark.parametrize("how", ["export", "saved_model"])
def test_model_can_be_exported(fitted_twice, how, tmp_path):
    expected = fitted_twice(X)
    if how == "export":
        fitted_twice.export(tmp_path / "model", verbose=False)
        loaded = tf.saved_model.load(str(tmp_path / "model"))
        served = loaded.serve(X)
    else:
        signature = tf.TensorSpec((None, 4))
        call = tf.function(fitted_twice.call, input_signature=[signature])
        tf.saved_model.save(fitted_twice, str(tmp_path / "model"), signatures=call)
        loaded = tf.saved_model.load(str(tmp_path / "model"))
        (served,) = loaded.signatures["serving_default"](tf.constant(X)).values()
    assert_near([served], [expected])


# ------------------------------------------------------ training loops of all


class Adversaries(keras.Model):
    """Two parts with an optimizer each, in a `train_step` of its own."""

    def __init__(self, module: Any):
        super().__init__()
        self.generator, self.critic = cases.small_model(), cases.small_model()
        self.generator_optimizer = module.Adam(0.01, beta_1=0.5)
        self.critic_optimizer = module.RMSprop(0.01)

    def train_step(self, data: Any) -> dict:
        x, _ = data
        for part, optimizer, sign in (
            (self.critic, self.critic_optimizer, 1.0),
            (self.generator, self.generator_optimizer, -1.0),
        ):
            with tf.GradientTape() as tape:
                made = self.generator(x)
                judged = self.critic(ops.concatenate([made, made * 2], axis=1))
                loss = sign * ops.mean(ops.square(judged))
            gradients = tape.gradient(loss, part.trainable_variables)
            optimizer.apply(gradients, part.trainable_variables)
        return {"loss": loss}


@pytest.mark.parametrize(
    "jit_compile", [False, pytest.param(True, marks=pytest.mark.xla)]
)
def test_two_optimizers_in_a_train_step(jit_compile):
    weights = []
    for module in (tf_effopt, keras.optimizers):
        model = Adversaries(module)
        model.compile(jit_compile=jit_compile)
        model.fit(X, Y, batch_size=4, epochs=3, shuffle=False, verbose=0)
        weights.append(model.generator.get_weights() + model.critic.get_weights())
    assert_near(*weights)
    assert np.max(np.abs(weights[0][0] - cases.small_model().get_weights()[0])) > 0.01


def raw_loop(optimizer: Any, compiled: bool) -> list[tf.Variable]:
    """Trains TensorFlow's own variables, the optimizer not built before."""
    w, b = tf.Variable(tf.ones((4, 2)), name="w"), tf.Variable(tf.zeros(2), name="b")

    @tf.function
    def in_graph() -> None:
        step()

    def step() -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((X @ w + b - Y) ** 2)
        gradients = tape.gradient(loss, [w, b])
        optimizer.apply_gradients(zip(gradients, [w, b], strict=True))

    for _ in range(5):
        in_graph() if compiled else step()
    return [w, b]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "function"])
def test_own_loop_over_tensorflow_variables(compiled):
    expected = raw_loop(keras.optimizers.SGD(0.1, momentum=0.9), compiled=False)
    optimizer = tf_effopt.SGD(0.1, momentum=0.9)
    assert_near(raw_loop(optimizer, compiled), expected)
    assert int(optimizer.iterations) == 5
    assert traces(optimizer) == [1]


def test_apply_on_a_subset():
    variables = [keras.Variable([1.0]), keras.Variable([1.0])]
    optimizer = tf_effopt.SGD(0.25, momentum=0.5, use_ema=True, ema_momentum=0.5)
    optimizer.build(variables)
    optimizer.apply([ones(1), ones(1)], variables)  # Both go to 0.75.
    optimizer.apply([ones(1)], variables[1:])  # 0.75 - (0.125 + 0.25)
    assert [v.numpy()[0] for v in variables] == [0.75, 0.375]
    optimizer.apply([ones(1)], variables[:1])  # 0.75 - (0.125 + 0.25)
    assert [v.numpy()[0] for v in variables] == [0.375, 0.375]
    assert int(optimizer.iterations) == 3
    # The averages of all move with each update.
    averages = [t["ema"]["average"].numpy()[0] for t in optimizer._engine.state]
    assert averages == [0.5625, 0.46875]


def test_missing_gradient_leaves_its_variable_alone():
    variables = [keras.Variable([1.0], name="one"), keras.Variable([1.0], name="two")]
    optimizer = tf_effopt.SGD(0.25, momentum=0.5, weight_decay=0.5)
    optimizer.apply([ones(1), ones(1)], variables)
    state = arrays(optimizer.variables)
    weights = arrays(variables)
    with pytest.warns(UserWarning, match=r"do not exist for variables \['two'\]"):
        optimizer.apply([ones(1), None], variables)
    assert variables[0].numpy()[0] < weights[0][0]
    assert_identical([variables[1]], [weights[1]])
    slots = [i for i, v in enumerate(optimizer.variables) if "two" in v.path]
    assert len(slots) == 1
    assert_identical([optimizer.variables[slots[0]]], [state[slots[0]]])


def test_frozen_layer_stays_as_it_is():
    model = cases.small_model()
    model.layers[0].trainable = False
    before = model.get_weights()
    fit(BY_NAME["adamw"].make(), epochs=1, model=model)
    assert_identical(model.get_weights()[:2], before[:2])
    assert all(
        np.any(a != b) for a, b in zip(model.get_weights()[2:], before[2:], strict=True)
    )


def test_variables_of_equal_paths_have_a_state_each():
    variables = [keras.Variable([1.0], name="w"), keras.Variable([1.0], name="w")]
    assert variables[0].path == variables[1].path
    optimizer = tf_effopt.SGD(0.25, momentum=0.5)
    optimizer.apply([ones(1), ones(1) * 0], variables)
    optimizer.apply([ones(1) * 0, ones(1)], variables)
    # 1 - 0.25 - 0.125 and 1 - 0.25
    assert [v.numpy()[0] for v in variables] == [0.625, 0.75]


def test_multi_optimizer_equals_separate_optimizers():
    kernels, biases = BY_NAME["adam"].make(), BY_NAME["nesterov"].make()
    choice = keras.optimizers.OptimizerMap(kernels, {".*bias": biases})
    model = fit(keras.optimizers.MultiOptimizer(choice))
    assert int(kernels.iterations) == int(biases.iterations) == 8
    expected = cases.small_model()
    parts = [(BY_NAME["adam"].make(), "kernel"), (BY_NAME["nesterov"].make(), "bias")]
    variables = expected.trainable_variables
    for i in range(8):
        rows = slice(4 * (i % 4), 4 * (i % 4) + 4)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((expected(X[rows]) - Y[rows]) ** 2)
        gradients = tape.gradient(loss, variables)
        for optimizer, name in parts:
            chosen = [i for i, v in enumerate(variables) if v.name == name]
            optimizer.apply(
                [gradients[i] for i in chosen], [variables[i] for i in chosen]
            )
    assert_near(model.get_weights(), expected.get_weights())


# --------------------------------------------------------------- constraints


def fit_with_constraint(constraint: Any, optimizer: Any) -> np.ndarray:
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(2, kernel_constraint=constraint)]
    )
    model.layers[0].kernel.assign(np.linspace(-1, 1, 8).reshape(4, 2))
    fit(optimizer, model=model)
    return model.layers[0].kernel.numpy()  # It started with negative numbers.


@pytest.mark.xla
@pytest.mark.parametrize("name", ["NonNeg", "UnitNorm"])
def test_constraint_of_keras(name, caplog):
    constraint = getattr(keras.constraints, name)()
    case = BY_NAME["adam"]
    kernel = fit_with_constraint(constraint, case.make())
    assert_near([kernel], [fit_with_constraint(constraint, case.keras())])
    if name == "NonNeg":
        assert np.all(kernel >= 0)
    else:
        np.testing.assert_allclose(np.linalg.norm(kernel, axis=0), 1, rtol=1e-5)
    assert "without XLA" not in caplog.text


class InPython(keras.constraints.Constraint):
    """Rounds to thirds, by a call into Python that XLA can't compile."""

    def __call__(self, w: Any) -> Any:
        rounded = tf.py_function(lambda x: tf.round(x * 3) / 3, [w], w.dtype)
        return tf.ensure_shape(rounded, w.shape)


def test_constraint_that_xla_cannot_compile_runs_uncompiled(caplog):
    case = BY_NAME["adam"]
    with caplog.at_level(logging.WARNING, logger="tf_effopt"):
        kernel = fit_with_constraint(InPython(), case.make(learning_rate=0.3))
    messages = [r.message for r in caplog.records if r.name == "tf_effopt"]
    assert len(messages) == 1
    assert "Adam updates without XLA on" in messages[0]
    np.testing.assert_allclose(kernel * 3, np.round(kernel * 3), atol=1e-6)
    expected = fit_with_constraint(InPython(), case.keras(learning_rate=0.3))
    assert_near([kernel], [expected])


# ------------------------------------------------------------------ averages

EMA = {"learning_rate": 0.1, "use_ema": True, "ema_momentum": 0.5}


class Remember(keras.callbacks.Callback):
    """Keeps the weights after each step."""

    def __init__(self):
        super().__init__()
        self.weights: list[list[np.ndarray]] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.weights.append(self.model.get_weights())


def test_fit_ends_with_the_average():
    steps = Remember()
    model = fit(tf_effopt.SGD(**EMA), epochs=1, callbacks=[steps])
    average = steps.weights[0]
    for weights in steps.weights[1:]:
        average = [0.5 * a + 0.5 * w for a, w in zip(average, weights, strict=True)]
    assert_near(model.get_weights(), average)
    assert np.max(np.abs(average[0] - steps.weights[-1][0])) > 1e-3


def test_swap_ema_weights():
    options = {"validation_data": (X, Y), "epochs": 2}
    plain = fit(tf_effopt.SGD(**EMA), **options)
    swapping = fit(
        tf_effopt.SGD(**EMA), callbacks=[keras.callbacks.SwapEMAWeights()], **options
    )
    # Training goes on with the weights themselves, validation sees the average.
    losses = swapping.history.history["loss"]
    assert losses == pytest.approx(plain.history.history["loss"], rel=1e-6)
    # `fit` left the last average in the plain model, too.
    last = plain.evaluate(X, Y, batch_size=4, verbose=0)
    assert swapping.history.history["val_loss"][-1] == pytest.approx(last, rel=1e-6)
    assert plain.history.history["val_loss"][-1] != pytest.approx(last, rel=1e-3)
    assert_near(swapping.get_weights(), plain.get_weights())


def test_swap_ema_weights_on_epochs():
    callback = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    swapping = fit(tf_effopt.SGD(**EMA), callbacks=[callback])
    plain = fit(tf_effopt.SGD(**EMA))
    assert_near(swapping.get_weights(), plain.get_weights())


def test_average_before_the_first_update_leaves_the_weights_alone():
    before = cases.small_model().get_weights()
    model = fit(tf_effopt.SGD(**EMA, gradient_accumulation_steps=8), epochs=1)
    assert int(model.optimizer._iterations) == 4
    assert_identical(model.get_weights(), before)


def test_average_overwrites_the_weights():
    variable = keras.Variable([1.0])
    optimizer = tf_effopt.SGD(
        0.25, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2
    )
    values = []
    for _ in range(3):
        optimizer.apply([ones(1)], [variable])
        values.append(variable.numpy()[0])
    # 0.75; then (0.75 + 0.5) / 2; then on from there.
    assert values == [0.75, 0.625, 0.375]


# ------------------------------------------------------ accumulation, scaling


@pytest.mark.parametrize("extra", [{}, {"global_clipnorm": 0.1}], ids=str)
def test_accumulated_micro_batches_equal_one_large_batch(extra):
    micro = tf_effopt.Adam(0.01, gradient_accumulation_steps=4, **extra)
    small = fit(micro, epochs=3)
    large = cases.train(cases.compiled_model(tf_effopt.Adam(0.01, **extra)), 3)
    assert_near(small.get_weights(), large.get_weights())
    assert int(micro.iterations) == 3


def test_schedule_counts_micro_steps():
    schedule = schedules.PiecewiseConstantDecay([0], [0.5, 0.25])
    optimizer = tf_effopt.SGD(schedule, gradient_accumulation_steps=2)
    variable = keras.Variable([1.0])
    for _ in range(2):
        optimizer.apply([ones(1)], [variable])
    assert variable.numpy()[0] == 0.75  # The rate of micro-step number 1.


class Looked(keras.Sequential):
    """An embedding, of which a batch sees some rows twice."""

    def __init__(self):
        init = keras.initializers.RandomUniform(seed=4)
        super().__init__(
            [
                keras.Input((3,), dtype="int32"),
                keras.layers.Embedding(10, 4, embeddings_initializer=init),
                keras.layers.Flatten(),
                keras.layers.Dense(
                    2, kernel_initializer=keras.initializers.GlorotUniform(seed=5)
                ),
            ]
        )


IDS = np.array([[1, 2, 1], [3, 1, 4], [1, 5, 9], [2, 6, 5]])


def train_embedding(optimizer: Any) -> list[np.ndarray]:
    model = cases.compiled_model(optimizer, Looked())
    for _ in range(5):
        model.train_on_batch(IDS, Y[:4])
    return model.get_weights()


@pytest.mark.parametrize("lazy", [False, True])
def test_loss_scale_factor_with_an_embedding(lazy):
    # A power of 2, so that scaling costs no rounding.
    scaled = tf_effopt.Adam(0.01, loss_scale_factor=1024.0, lazy=lazy)
    plain = tf_effopt.Adam(0.01, lazy=lazy)
    weights = train_embedding(scaled)
    assert_near(weights, train_embedding(plain))
    start = Looked().get_weights()[0]
    assert np.all(weights[0][[0, 7, 8]] == start[[0, 7, 8]])
    assert np.all(weights[0][[1, 2, 3, 4, 5, 6, 9]] != start[[1, 2, 3, 4, 5, 6, 9]])


def test_not_finite_gradient_is_skipped_and_reported():
    model = cases.compiled_model(tf_effopt.Adam(0.01, use_ema=True))
    clean = X[:4], Y[:4]
    poisoned = X[:4], Y[:4] * np.nan
    model.train_on_batch(*clean)
    before = arrays(model.weights + model.optimizer.variables)
    model.train_on_batch(*poisoned)
    assert_identical(model.weights + model.optimizer.variables, before)
    assert model.optimizer.skipped_steps == 1
    y = np.concatenate([clean[1], poisoned[1]])
    with pytest.warns(UserWarning, match="2 steps changed nothing: .* wasn't finite"):
        model.fit(X[:8], y, batch_size=4, shuffle=False, verbose=0)
    assert int(model.optimizer.iterations) == 2
    assert all(np.all(np.isfinite(w)) for w in model.get_weights())


def test_fit_without_skipped_steps_warns_of_none(fitted_twice, recwarn):
    fitted_twice.optimizer.finalize_variable_values(fitted_twice.trainable_variables)
    assert not [w for w in recwarn if "wasn't finite" in str(w.message)]


@pytest.mark.parametrize("module", [tf_effopt, keras.optimizers], ids=["ours", "keras"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "function"])
def test_loss_scale_halves_and_doubles(module, compiled):
    inner = tf_effopt.SGD(0.25, momentum=0.5)
    optimizer = module.LossScaleOptimizer(
        inner, initial_scale=8.0, dynamic_growth_steps=2
    )
    variable = keras.Variable([1.0])
    optimizer.build([variable])
    # `LossScaleOptimizer.build` leaves it to the caller to say so.
    optimizer.built = True

    def apply(gradient: Any) -> None:
        optimizer.apply([gradient], [variable])

    if compiled:
        apply = tf.function(apply)

    def step(gradient: float) -> tuple[float, float, int]:
        apply(tf.constant([gradient]) * optimizer.dynamic_scale)
        scale = float(optimizer.dynamic_scale)
        return float(variable.numpy()[0]), scale, int(inner.iterations)

    assert step(np.inf) == (1.0, 4.0, 0)
    assert step(1.0) == (0.75, 4.0, 1)
    assert step(np.nan) == (0.75, 2.0, 1)
    assert step(0.0) == (0.625, 2.0, 2)
    assert step(0.0) == (0.5625, 4.0, 3)
    assert step(0.0) == (0.53125, 4.0, 4)
    assert step(0.0) == (0.515625, 8.0, 5)
    assert float(optimizer.scale_loss(1.0)) == 8.0


@pytest.mark.parametrize("wrap", [lambda o: o, tf_effopt.LossScaleOptimizer])
def test_mixed_float16_trains(wrap):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = cases.small_model()
        cases.compiled_model(wrap(BY_NAME["adam"].make()), model)
    finally:
        keras.config.set_dtype_policy("float32")
    optimizer = model.optimizer
    assert isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    assert type(optimizer.inner_optimizer) is tf_effopt.Adam
    history = model.fit(X, Y, batch_size=16, epochs=40, verbose=0).history["loss"]
    assert history[-1] < 0.8 * history[0]
    assert int(optimizer.iterations) == 40


def test_mixed_float16_leaves_our_loss_scale_optimizer_as_it_is():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = cases.small_model()
        model.compile(tf_effopt.LossScaleOptimizer(tf_effopt.Adam()), loss="mse")
    finally:
        keras.config.set_dtype_policy("float32")
    assert type(model.optimizer) is tf_effopt.LossScaleOptimizer


# -------------------------------- variables whose gradient is their new value


def scale_and_weight() -> tuple[keras.Variable, keras.Variable]:
    """A float8 layer's scale, and a weight."""
    scale = keras.Variable([3.0], name="scale")
    scale.overwrite_with_gradient = True
    return scale, keras.Variable([1.0], name="weight")


@pytest.mark.parametrize(
    "extra",
    [{}, {"use_ema": True}, {"rounding": "compensated"}, {"clipnorm": 10.0}],
    ids=str,
)
def test_variable_that_its_gradient_overwrites(extra):
    scale, weight = scale_and_weight()
    optimizer = tf_effopt.SGD(0.25, momentum=0.5, **extra)
    for value, expected in [(7.0, 0.75), (5.0, 0.375)]:
        optimizer.apply([ones(1) * value, ones(1)], [scale, weight])
        assert (scale.numpy()[0], weight.numpy()[0]) == (value, expected)
    optimizer.finalize_variable_values([scale, weight])
    assert scale.numpy()[0] == 5.0


def test_variable_that_its_gradient_overwrites_alone():
    scale, weight = scale_and_weight()
    optimizer = tf_effopt.SGD(0.25)
    optimizer.build([scale, weight])
    optimizer.apply([ones(1) * 7], [scale])
    assert (scale.numpy()[0], weight.numpy()[0]) == (7.0, 1.0)
    assert int(optimizer.iterations) == 1


def test_variable_that_its_gradient_overwrites_under_accumulation():
    results = []
    for module in (tf_effopt, keras.optimizers):
        scale, weight = scale_and_weight()
        optimizer = module.SGD(0.25, gradient_accumulation_steps=2)
        for value in (7.0, 5.0, 2.0, 3.0):
            optimizer.apply([ones(1) * value, ones(1)], [scale, weight])
            results.append((scale.numpy()[0], weight.numpy()[0]))
    assert results[:4] == results[4:]
    assert results[1] == (7.0, 0.75) and results[3] == (3.0, 0.5)
