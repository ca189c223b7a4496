"""A state that was saved by other settings, for another model, or in a `.h5` file."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import cases
import keras
import numpy as np
import pytest
from cases import BY_NAME

import tf_effopt

SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.25, 10, 0.5)
RATES = {"schedule over a number": (0.125, SCHEDULE), "reverse": (SCHEDULE, 0.125)}
ONES = np.ones((2, 3), "float32")


def saved(optimizer: Any) -> dict[str, np.ndarray]:
    store: dict[str, np.ndarray] = {}
    optimizer.save_own_variables(store)
    return store


# ---------------------------------------------------------- the learning rate


@functools.cache
def trained_on(name: str, shape: tuple, rates: str) -> tf_effopt.Optimizer:
    """An optimizer that made one step."""
    optimizer = BY_NAME[name].make(learning_rate=RATES[rates][0])
    ones = np.ones(shape, "float32")
    optimizer.apply([ones], [keras.Variable(ones)])
    return optimizer


@pytest.mark.representatives("sgd-*", "adafactor-*")
@pytest.mark.parametrize("built", [False, True], ids=["", "built"])
@pytest.mark.parametrize("shape", [(2, 3), ()], ids=["matrix", "scalar"])
@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("name", ["nesterov", "sgd", "amsgrad", "adafactor", "prodigy"])
def test_the_rate_that_was_asked_for_and_the_moments_of_the_file(
    name, rates, shape, built
):
    mine = RATES[rates][1]
    trained = trained_on(name, shape, rates)
    ones, store = np.ones(shape, "float32"), saved(trained)
    optimizer, weight = BY_NAME[name].make(learning_rate=mine), keras.Variable(ones)
    if built:
        optimizer.build([weight])
    optimizer.load_own_variables(store)
    assert int(optimizer.iterations) == 1
    optimizer.build([weight])
    rate = 0.125 if mine == 0.125 else 0.25 * 0.5**0.1
    assert float(optimizer.learning_rate) == pytest.approx(rate, rel=1e-6)
    numbers = len(trained._numbers()), len(optimizer._numbers())
    expected = [v.numpy() for v in trained.variables[numbers[0] :]]
    found = [v.numpy() for v in optimizer.variables[numbers[1] :]]
    assert len(found) == len(expected)
    for value, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(value, other)


@pytest.mark.parametrize("built", [False, True], ids=["", "built"])
def test_a_file_of_keras_with_a_number_under_a_schedule(built):
    trained = keras.optimizers.Adam(0.125)
    trained.apply([ONES], [keras.Variable(ONES)])
    optimizer, weight = tf_effopt.Adam(SCHEDULE), keras.Variable(ONES)
    if built:
        optimizer.build([weight])
    optimizer.load_own_variables(saved(trained))
    optimizer.build([weight])
    for mine, other in zip(optimizer.variables[1:], trained.variables[2:], strict=True):
        np.testing.assert_array_equal(mine.numpy(), other.numpy())


@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("built", [False, True], ids=["", "built"])
def test_a_file_from_before_the_first_step_keeps_the_rate(rates, built):
    theirs, mine = RATES[rates]
    optimizer, weight = tf_effopt.Adam(mine), keras.Variable(ONES)
    if built:
        optimizer.build([weight])
    optimizer.load_own_variables(saved(tf_effopt.Adam(theirs)))
    optimizer.apply([ONES], [weight])
    rate = 0.125 if mine == 0.125 else 0.25 * 0.5**0.1
    assert float(optimizer.learning_rate) == pytest.approx(rate, rel=1e-6)


def test_a_rate_set_while_the_state_waits_holds():
    trained = tf_effopt.SGD(SCHEDULE, momentum=0.5)
    trained.apply([np.ones((), "float32")], [keras.Variable(1.0)])
    optimizer = tf_effopt.SGD(0.125, momentum=0.5)
    optimizer.load_own_variables(saved(trained))
    optimizer.learning_rate = 0.0625
    optimizer.build([keras.Variable(1.0)])
    assert float(optimizer.learning_rate) == 0.0625
    assert float(optimizer.variables[-1]) == float(trained.variables[-1]) == -0.25


# ------------------------------------------------------------- skip_mismatch


def with_head(units: int, optimizer: Any) -> keras.Model:
    model = cases.small_model()
    layers = [*model.layers[:-1], cases._dense(units, seed=3, name="second")]
    model = keras.Sequential([keras.Input((4,)), *layers], name="small")
    return cases.compiled_model(optimizer, model)


@pytest.fixture(scope="module")
def file_of_adam(tmp_path_factory):
    path = tmp_path_factory.mktemp("adam") / "adam.weights.h5"
    cases.train(cases.compiled_model(tf_effopt.Adam(0.5)), 2).save_weights(path)
    return path


@pytest.mark.parametrize("built", [False, True], ids=["", "built"])
@pytest.mark.parametrize("wrap", [lambda x: x, tf_effopt.LossScaleOptimizer])
def test_another_head_starts_with_no_state(wrap, built, file_of_adam):
    model = with_head(5, wrap(tf_effopt.Adam(0.01, use_ema=True)))
    if built:
        model.optimizer.build(model.trainable_variables)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.load_weights(file_of_adam, skip_mismatch=True)
        model.optimizer.build(model.trainable_variables)
    said = " ".join(str(w.message) for w in caught)
    assert ("starts with no state" in said) == (not built)
    assert "could not be loaded" in said
    inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    assert int(inner.iterations) == 0
    assert float(inner.learning_rate) == pytest.approx(0.01)
    gradients = [np.ones(w.shape, "float32") for w in model.trainable_variables]
    before = model.get_weights()
    inner.apply(gradients, model.trainable_variables)
    for value, old in zip(model.get_weights(), before, strict=True):
        np.testing.assert_allclose(value, old - 0.01, atol=1e-6)


def test_a_rate_set_after_loading_holds_where_the_state_is_left_out(file_of_adam):
    model = with_head(5, tf_effopt.Adam(0.01))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.load_weights(file_of_adam, skip_mismatch=True)
        model.optimizer.learning_rate = 0.125
        model.optimizer.build(model.trainable_variables)
    assert float(model.optimizer.learning_rate) == 0.125


@pytest.mark.parametrize("built", [False, True], ids=["", "built"])
def test_what_fits_is_loaded_with_skip_mismatch_too(built, file_of_adam):
    model = cases.compiled_model(tf_effopt.Adam(0.01))
    if built:
        model.optimizer.build(model.trainable_variables)
    model.load_weights(file_of_adam, skip_mismatch=True)
    model.optimizer.build(model.trainable_variables)
    assert int(model.optimizer.iterations) == 2
    assert np.any(model.optimizer.variables[2].numpy() != 0)


def test_without_skip_mismatch_a_state_that_does_not_fit_is_an_error(file_of_adam):
    model = cases.compiled_model(tf_effopt.Adam(0.01, use_ema=True))
    model.load_weights(file_of_adam)
    with pytest.raises(ValueError, match="use_ema"):
        model.optimizer.build(model.trainable_variables)


# ------------------------------------------------------------- a model's `.h5`


IN_H5 = {
    "nesterov": lambda: tf_effopt.SGD(0.05, momentum=0.9, nesterov=True),
    "schedule": lambda: tf_effopt.Adam(SCHEDULE),
    "groups": lambda: tf_effopt.AdamW(
        0.02, use_ema=True, groups=[tf_effopt.Group("first", frozen=True)]
    ),
    "loss_scale": lambda: tf_effopt.LossScaleOptimizer(tf_effopt.Adam(0.02)),
}


@pytest.mark.representatives("schedule", "loss_scale")
@pytest.mark.parametrize("name", IN_H5)
def test_a_model_in_one_h5_file_trains_on(name, tmp_path):
    """Keras builds its optimizer on an empty list."""
    loss = keras.losses.MeanSquaredError()  # Keras reads no name of one from it.
    model = cases.train(cases.compiled_model(IN_H5[name](), loss=loss), 2)
    model.save(tmp_path / "model.h5")
    loaded = keras.models.load_model(tmp_path / "model.h5")
    cases.train(model, 2)
    cases.compiled_model(loaded.optimizer, loaded)
    cases.train(loaded, 2)
    assert int(loaded.optimizer.iterations) == int(model.optimizer.iterations)
    for value, other in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(value, other)


def test_set_weights_waits_for_build():
    trained, weight = tf_effopt.SGD(0.5, momentum=0.5), keras.Variable(ONES)
    trained.apply([ONES], [weight])
    for built in (False, True):
        optimizer, other = tf_effopt.SGD(0.5, momentum=0.5), keras.Variable(ONES)
        if built:
            optimizer.build([other])
        optimizer.set_weights(trained.variables)
        optimizer.apply([ONES], [other])
        np.testing.assert_array_equal(other.numpy(), ONES - 0.75)  # 0.25 + 0.5


def test_set_weights_of_another_state_is_refused():
    optimizer = tf_effopt.SGD(0.5, momentum=0.5)
    optimizer.build([keras.Variable(ONES)])
    with pytest.raises(ValueError, match="doesn't fit"):
        optimizer.set_weights([np.int64(3), np.float32(1.0)])


# ------------------------------------------------------------------- to Keras


@pytest.mark.parametrize("name", ["soap", "adam"])
def test_a_state_of_ours_in_an_optimizer_of_keras(name, tmp_path):
    """What fits goes on; of the rest Keras says that it is left out."""
    model = cases.compiled_model(BY_NAME[name].make())
    model.optimizer.build(model.trainable_variables)
    model.optimizer.iterations.assign(7)
    other = keras.optimizers.Adam(0.01)
    other.build(model.trainable_variables)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other.load_own_variables(saved(model.optimizer))
    said = any("Skipping variable loading" in str(w.message) for w in caught)
    assert said == (name == "soap")
    assert int(other.iterations) == (0 if said else 7)
