"""Which copies of an optimizer have its state, and for which variables."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import cases
import keras
import numpy as np
import pytest
from cases import CASES, X, Y, by_name

import tf_effopt

every_case = pytest.mark.parametrize("case", CASES, ids=by_name)
SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)


def fitted(optimizer: Any, epochs: int = 1) -> keras.Model:
    model = cases.compiled_model(optimizer)
    model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0)
    return model


@pytest.fixture(scope="module")
def trained() -> tf_effopt.Optimizer:
    return fitted(tf_effopt.Adam(0.01)).optimizer


# -------------------------------------------------------------- a new model


def through_pickle(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


COPIES: dict[str, Callable] = {
    "itself": lambda x: x,
    "deepcopy": copy.deepcopy,
    "pickle": through_pickle,
    "deepcopy_of_pickle": lambda x: copy.deepcopy(through_pickle(x)),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_trained_optimizer_refuses_a_new_model(how, trained):
    copied = COPIES[how](trained)
    model = cases.compiled_model(copied)
    before = model.get_weights()
    for _ in range(2):
        with pytest.raises(ValueError, match="make a new optimizer") as error:
            model.fit(X, Y, verbose=0)
    assert "type(o).from_config(o.get_config())" in str(error.value)
    assert "carry_over" not in str(error.value)
    for found, value in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(found, value)


def test_a_loss_scale_around_a_trained_optimizer_refuses_a_new_model():
    optimizer = tf_effopt.LossScaleOptimizer(tf_effopt.Adam(0.01))
    fitted(optimizer)
    for copied in (optimizer, copy.deepcopy(optimizer), through_pickle(optimizer)):
        with pytest.raises(ValueError, match="make a new optimizer"):
            cases.compiled_model(copied).fit(X, Y, verbose=0)


def test_variables_that_were_unfrozen_are_advised_to_be_carried_over():
    one, two = keras.Variable([1.0]), keras.Variable([1.0])
    ones = np.ones(1, "float32")
    optimizer = tf_effopt.SGD(0.5)
    optimizer.apply([ones], [one])
    with pytest.raises(ValueError, match=r"carry_over\(model.trainable_variables\)"):
        optimizer.apply([ones, ones], [one, two])
    with pytest.raises(ValueError, match="make a new optimizer"):
        optimizer.apply([ones], [two])


def test_what_has_not_trained_is_pickled_for_any_model():
    optimizer = tf_effopt.Adam(0.01, use_ema=True)
    optimizer.build(cases.small_model().trainable_variables)
    found = fitted(through_pickle(optimizer))
    expected = fitted(tf_effopt.Adam(0.01, use_ema=True))
    assert_same(found, expected)


def assert_same(model: keras.Model, expected: keras.Model) -> None:
    for found, value in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(found, value)


# ------------------------------------------------------------ a model's copy


def step(model: Any, optimizer: Any) -> None:
    weights = model.trainable_variables
    optimizer.apply([np.ones(w.shape, "float32") for w in weights], weights)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_model_and_its_optimizer_copied_together_stay_in_step(how):
    """As an object that holds both is."""
    model, optimizer = cases.small_model(), tf_effopt.Adam(0.1)
    step(model, optimizer)
    both = {"model": model, "optimizer": optimizer}
    copied = COPIES[how](both)
    before = model.get_weights()
    step(**copied)
    for value, old in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(value, old)
    step(**both)
    assert_same(copied["model"], model)
    assert int(copied["optimizer"].iterations) == 2


def test_a_pickle_goes_on_in_another_process(monkeypatch):
    """There the variables are known by their paths."""
    ones = np.ones(1, "float32")
    weight = keras.Variable([1.0], name="w")
    optimizer = tf_effopt.SGD(0.5, momentum=0.5)
    optimizer.apply([ones], [weight])
    pickled = pickle.dumps(optimizer)
    monkeypatch.setattr("tf_effopt.base.copies.PROCESS", "another")
    loaded = pickle.loads(pickled)
    weight = keras.Variable([9.0], name="w")
    loaded.apply([ones], [weight])
    assert float(weight[0]) == 8.25  # 9 - (0.25 + 0.5)
    with pytest.raises(ValueError, match="make a new optimizer"):
        pickle.loads(pickled).apply([ones], [keras.Variable([9.0], name="v")])


# ----------------------------------------------------------------- made anew


def from_config(optimizer: Any) -> Any:
    return type(optimizer).from_config(optimizer.get_config())


def by_the_constructor(optimizer: Any) -> Any:
    return type(optimizer)(**optimizer.get_config())


def by_sklearn(optimizer: Any) -> Any:
    return optimizer.__sklearn_clone__()


ANEW = [from_config, by_the_constructor, by_sklearn]


def with_everything(make: Callable = tf_effopt.AdamW) -> tf_effopt.Optimizer:
    optimizer = make(
        learning_rate=SCHEDULE,
        weight_decay=0.1,
        clipnorm=1.0,
        transforms=[tf_effopt.transforms.GradientCentralization()],
        groups=[tf_effopt.Group("first", learning_rate_multiplier=0.5)],
    )
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


@pytest.mark.representatives("by_sklearn", "by_the_constructor")
@pytest.mark.parametrize("anew", ANEW)
def test_what_is_made_of_a_configuration_is_fresh(anew):
    used = with_everything()
    fitted(used)
    other = anew(used)
    assert not other.built and int(other.iterations) == 0
    assert other.get_config() == used.get_config()
    assert_same(fitted(other), fitted(with_everything()))


@every_case
def test_the_constructor_takes_the_configuration(case):
    optimizer = case.make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Muon says which matrices it takes
        optimizer.build(cases.small_model().trainable_variables)
    config = optimizer.get_config()
    assert type(optimizer)(**config).get_config() == config


@pytest.mark.parametrize("anew", ANEW)
def test_a_loss_scale_is_made_anew_with_what_it_wraps(anew):
    used = tf_effopt.LossScaleOptimizer(tf_effopt.Adam(0.01), initial_scale=8.0)
    fitted(used)
    other = anew(used)
    assert type(other.inner_optimizer) is tf_effopt.Adam
    assert other.initial_scale == 8.0
    expected = tf_effopt.LossScaleOptimizer(tf_effopt.Adam(0.01), initial_scale=8.0)
    assert_same(fitted(other), fitted(expected))


def test_a_clone_of_scikit_learn_keeps_a_function_of_the_rate():
    optimizer = tf_effopt.SGD(lambda: 0.25)
    fitted(optimizer)
    assert float(by_sklearn(optimizer).learning_rate) == 0.25


def test_a_cloned_model_has_a_fresh_optimizer():
    model = fitted(with_everything())
    cloned = keras.models.clone_model(model)
    cloned.set_weights(cases.small_model().get_weights())
    assert int(cloned.optimizer.iterations) == 0
    cloned.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    assert_same(cloned, fitted(with_everything()))


def test_estimators_of_scikit_learn_are_cloned_and_fitted_again():
    base = pytest.importorskip("sklearn.base")

    class Estimator(base.BaseEstimator):
        """As wrappers do whose optimizer is a parameter."""

        def __init__(self, optimizer=None, options=None):
            self.optimizer = optimizer
            self.options = options

        def fit(self, x, y):
            self.model_ = cases.compiled_model(self.optimizer or self.options["it"])
            self.model_.fit(x, y, batch_size=8, shuffle=False, verbose=0)
            return self

    for options in (
        {"optimizer": tf_effopt.Adam(0.01)},
        {"options": {"it": tf_effopt.Adam(0.01)}},
    ):
        estimator = Estimator(**options).fit(X, Y)
        again = base.clone(estimator).fit(X, Y)
        assert_same(again.model_, estimator.model_)
        with pytest.raises(ValueError, match="make a new optimizer"):
            estimator.fit(X, Y)


def test_wrapper_of_keras_for_scikit_learn_is_cloned_and_fitted_again():
    base = pytest.importorskip("sklearn.base")
    model = cases.compiled_model(tf_effopt.Adam(0.01))
    options = {"fit_kwargs": {"batch_size": 8, "shuffle": False, "verbose": 0}}
    regressor = keras.wrappers.SKLearnRegressor(model, **options)
    for estimator in (regressor, base.clone(regressor.fit(X, Y[:, 0]))):
        estimator.fit(X, Y[:, 0])
        assert int(estimator.model_.optimizer.iterations) > 0
        assert int(model.optimizer.iterations) == 0
