"""Weights to train at and weights to evaluate at: in `fit`, on disk, by hand."""

from __future__ import annotations

import warnings
from typing import Any

import cases
import keras
import numpy as np
import oracles
import pytest
import tensorflow as tf
from cases import BY_NAME, X, Y, arrays

import tf_effopt
from tf_effopt.callbacks import EvaluationWeights

TOLERANCE = 2e-6
CASE = BY_NAME["schedule_free_adamw"]
BATCH = 4


def compiled(**settings: Any) -> keras.Model:
    settings = {"learning_rate": 0.05, "weight_decay": 0.1} | settings
    return cases.compiled_model(CASE.make(**settings))


def fit(model: keras.Model, epochs: int = 1, **options: Any) -> keras.callbacks.History:
    return model.fit(
        X, Y, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0, **options
    )


def fit_quietly(model: keras.Model, **options: Any) -> keras.callbacks.History:
    with pytest.warns(UserWarning, match="weights for evaluation are in place now"):
        return fit(model, **options)


def assert_near(values: Any, expected: Any, bound: float = TOLERANCE) -> None:
    for value, other in zip(values, expected, strict=True):
        np.testing.assert_allclose(value, other, rtol=bound, atol=bound)


def assert_identical(values: Any, expected: Any) -> None:
    for value, other in zip(values, expected, strict=True):
        np.testing.assert_array_equal(value, other)


def assert_far(values: Any, others: Any) -> None:
    assert all(
        np.max(np.abs(a - b)) > 1e-3 for a, b in zip(values, others, strict=True)
    )


def test_weights_loaded_before_the_first_batch_go_on(tmp_path):
    """Saved at x: the first gradient is taken at y, as without the interruption."""
    whole = compiled()
    fit(whole, epochs=2, callbacks=[EvaluationWeights()])
    whole.save_weights(tmp_path / "half.weights.h5")
    fit(whole, epochs=2, callbacks=[EvaluationWeights()])
    resumed = compiled()
    resumed.load_weights(tmp_path / "half.weights.h5")
    with pytest.raises(ValueError, match=r"call `optimizer\.build"):
        resumed.optimizer.use_training_weights()
    fit(resumed, epochs=2, callbacks=[EvaluationWeights()])
    assert_identical(arrays(resumed.variables), arrays(whole.variables))


class Remember(keras.callbacks.Callback):
    """Keeps the weights at the start and after each batch."""

    def on_train_begin(self, logs: Any = None) -> None:
        self.weights = [self.model.get_weights()]

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.weights.append(self.model.get_weights())


def gradients_at(weights: list[np.ndarray], batch: int) -> list[np.ndarray]:
    model, rows = cases.small_model(), slice(BATCH * batch, BATCH * (batch + 1))
    model.set_weights(weights)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(X[rows]) - Y[rows]) ** 2)
    return [g.numpy() for g in tape.gradient(loss, model.trainable_variables)]


@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_fit_follows_the_source(warmup_steps):
    """At y after each step, the first among them; at x in the end."""
    model, steps = compiled(warmup_steps=warmup_steps), Remember()
    fit_quietly(model, callbacks=[steps])
    start, *after = steps.weights
    gradients = [gradients_at(w, i) for i, w in enumerate(steps.weights[:-1])]
    moments = oracles.trajectory(
        "ScheduleFreeAdamW",
        {"weight_decay": 0.1, "warmup_steps": warmup_steps},
        start,
        gradients,
        [float(np.float32(0.05))] * len(gradients),
    )
    next(moments)
    for y, (expected, _, _, shared) in zip(after, moments, strict=True):
        assert_near(y, expected)
    assert_near(model.get_weights(), shared["averages"])
    assert_far(model.get_weights(), after[-1])


@pytest.fixture(scope="module")
def plain() -> tuple[keras.Model, Remember, list[float]]:
    """Two epochs in one `fit`, without the callback."""
    model, steps = compiled(), Remember()
    history = fit_quietly(model, epochs=2, callbacks=[steps], validation_data=(X, Y))
    return model, steps, history.history


def test_callback_evaluates_at_x_and_trains_at_y(plain):
    model, steps = compiled(), Remember()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*weights for evaluation")
        history = fit(
            model,
            epochs=2,
            callbacks=[EvaluationWeights(), steps],
            validation_data=(X, Y),
        ).history
    assert model.optimizer.is_evaluating
    # The way there and back costs a rounding.
    assert_near(steps.weights[-1], plain[1].weights[-1])
    assert_near(model.get_weights(), plain[0].get_weights())
    assert history["loss"] == pytest.approx(plain[2]["loss"], rel=1e-5)
    at_x = plain[0].evaluate(X, Y, verbose=0)
    assert history["val_loss"][-1] == pytest.approx(at_x, rel=1e-5)
    assert plain[2]["val_loss"][-1] != pytest.approx(at_x, rel=1e-3)


def test_second_fit_with_the_callback_goes_on_from_y(plain):
    model, steps = compiled(), Remember()
    fit(model, callbacks=[EvaluationWeights()])
    fit(model, callbacks=[EvaluationWeights(), steps])
    assert_near(steps.weights[-1], plain[1].weights[-1])
    assert_near(model.get_weights(), plain[0].get_weights())
    assert int(model.optimizer.iterations) == 8


@pytest.mark.parametrize("switched_back", [True, False])
def test_step_while_x_is_in_place_starts_at_y(switched_back):
    """As the first one of a second `fit` without the callback does."""
    settings = {"learning_rate": 0.25, "beta_1": 0.5, "epsilon": 1e-30}
    variable, optimizer = keras.Variable([8.0]), CASE.make(**settings)
    for _ in range(2):
        optimizer.apply([tf.ones(1)], [variable])
    optimizer.use_evaluation_weights()
    if switched_back:
        optimizer.use_training_weights()
    optimizer.apply([tf.ones(1)], [variable])
    assert not optimizer.is_evaluating
    # z falls by 0.25 a step, to 7.25; x is the mean of 7.75, 7.5 and 7.25.
    assert variable.numpy()[0] == pytest.approx((7.25 + 7.5) / 2, rel=1e-6)
    optimizer.use_evaluation_weights()
    assert variable.numpy()[0] == pytest.approx(7.5, rel=1e-6)


def test_by_hand():
    model = cases.train(compiled(), 3)
    optimizer = model.optimizer
    y, state = model.get_weights(), arrays(optimizer.variables)
    assert not optimizer.is_evaluating
    optimizer.use_training_weights()  # They are in place.
    assert_identical(model.get_weights(), y)
    for _ in range(2):  # The second time nothing happens.
        optimizer.use_evaluation_weights()
        assert optimizer.is_evaluating
        x = model.get_weights()
    assert_far(x, y)
    optimizer.use_training_weights()
    assert_near(model.get_weights(), y)
    assert_identical(arrays(optimizer.variables), state)


@pytest.mark.parametrize("name", ["adam", "prodigy"])
def test_for_other_rules_nothing_happens(name):
    model = cases.compiled_model(BY_NAME[name].make())
    fit(model, callbacks=[EvaluationWeights()])
    weights = model.get_weights()
    model.optimizer.use_evaluation_weights()
    assert not model.optimizer.is_evaluating
    assert_identical(model.get_weights(), weights)


def test_before_the_first_step_nothing_happens():
    model = compiled()
    model.optimizer.build(model.trainable_variables)
    weights = model.get_weights()
    model.optimizer.use_evaluation_weights()
    assert_identical(model.get_weights(), weights)


@pytest.mark.representatives("weights.h5-at x", "keras-at y")
@pytest.mark.parametrize("evaluating", [True, False], ids=["at x", "at y"])
@pytest.mark.parametrize("extension", ["keras", "weights.h5"])
def test_saved_in_the_middle_it_goes_on(evaluating, extension, tmp_path):
    model = cases.train(compiled(), 3)
    if evaluating:
        model.optimizer.use_evaluation_weights()
    path = tmp_path / f"model.{extension}"
    if extension == "keras":
        model.save(path)
        loaded = keras.models.load_model(path)
        loaded.compile(loaded.optimizer, loss="mse", jit_compile=False)
    else:
        model.save_weights(path)
        loaded = compiled()
        loaded.optimizer.build(loaded.trainable_variables)
        loaded.load_weights(path)
    assert loaded.optimizer.is_evaluating == evaluating
    assert_identical(loaded.get_weights(), model.get_weights())
    for each in (model, loaded):
        each.optimizer.use_training_weights()
        cases.train(each, 3)
    assert_identical(loaded.get_weights(), model.get_weights())
    assert_identical(
        arrays(loaded.optimizer.variables), arrays(model.optimizer.variables)
    )


def test_checkpoint_after_the_callback_has_x(tmp_path):
    paths = {name: tmp_path / f"{name}.keras" for name in ("before", "after")}
    save = {name: keras.callbacks.ModelCheckpoint(path) for name, path in paths.items()}
    model, steps = compiled(), Remember()
    fit(model, callbacks=[save["before"], EvaluationWeights(), save["after"], steps])
    x = model.get_weights()
    at_x = keras.models.load_model(paths["after"])
    at_y = keras.models.load_model(paths["before"])
    assert_identical(at_x.get_weights(), x)
    assert_identical(at_y.get_weights(), steps.weights[-1])
    assert at_x.optimizer.is_evaluating and not at_y.optimizer.is_evaluating
    # Training goes on from both alike.
    weights = []
    for loaded in (at_x, at_y):
        steps = Remember()
        loaded.compile(loaded.optimizer, loss="mse", jit_compile=False)
        fit(loaded, callbacks=[EvaluationWeights(), steps])
        weights.append(steps.weights[-1])
    assert_near(*weights)


def test_callback_needs_an_optimizer_of_this_package():
    model = cases.compiled_model(keras.optimizers.SGD(0.1))
    with pytest.raises(ValueError, match="needs an optimizer of tf_effopt.*SGD"):
        fit(model, callbacks=[EvaluationWeights()])


def test_callback_looks_inside_a_loss_scale_optimizer():
    inner = CASE.make()
    model = cases.compiled_model(tf_effopt.LossScaleOptimizer(inner))
    fit(model, callbacks=[EvaluationWeights()])
    assert inner.is_evaluating


# ------------------------------------------------------- what stays as it is


@pytest.mark.parametrize("evaluating", [False, True])
def test_the_average_stays_where_it_is_when_beta_1_changes(evaluating):
    model = compiled(beta_1=0.9)
    cases.train(model, 3)
    optimizer = model.optimizer
    optimizer.use_evaluation_weights()
    average = model.get_weights()
    if not evaluating:
        optimizer.use_training_weights()
    optimizer.beta_1 = 0.2
    assert optimizer.is_evaluating == evaluating
    optimizer.use_evaluation_weights()
    assert_near(model.get_weights(), average)


def test_a_frozen_variable_isnt_moved_to_its_average():
    frozen = tf_effopt.Group(["bias"], frozen=True)
    model = compiled(groups=[frozen])
    model.optimizer.build(model.trainable_variables)
    cases.train(model, 2)
    (bias, *_) = [v for v in model.trainable_variables if "bias" in v.path]
    bias.assign(np.full(bias.shape, 7.0))
    model.optimizer.use_evaluation_weights()
    assert np.all(bias.numpy() == 7.0)


def test_the_weights_after_fit_are_the_average_also_with_use_ema():
    plain, averaged = compiled(), compiled(use_ema=True)
    for model in (plain, averaged):
        fit(model, epochs=2, callbacks=[EvaluationWeights()])
    assert_identical(averaged.get_weights(), plain.get_weights())
