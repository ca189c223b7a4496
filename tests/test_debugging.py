"""TensorFlow's tools for debugging, on or off before or after an optimizer was used."""

from __future__ import annotations

import contextlib
import itertools
import logging
from typing import Any

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import CASES, X, Y, by_name

import tf_effopt

WITHOUT_XLA = "XLA can't compile the operations of `tf.debugging`"


@contextlib.contextmanager
def check_numerics(folder):
    tf.debugging.enable_check_numerics()
    try:
        yield
    finally:
        tf.debugging.disable_check_numerics()


@contextlib.contextmanager
def dump(folder):
    tf.debugging.experimental.enable_dump_debug_info(
        str(folder), tensor_debug_mode="FULL_HEALTH"
    )
    try:
        yield
    finally:
        tf.debugging.experimental.disable_dump_debug_info()


@contextlib.contextmanager
def eagerly(folder):
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(False)


@contextlib.contextmanager
def profiler(folder):
    tf.profiler.experimental.start(str(folder))
    try:
        yield
    finally:
        tf.profiler.experimental.stop()


TOOLS = {
    "check_numerics": check_numerics,
    "dump": dump,
    "eagerly": eagerly,
    "profiler": profiler,
}


def optimizer() -> tf_effopt.Optimizer:
    return tf_effopt.Adam(0.01, global_clipnorm=0.5, use_ema=True)


def fit(model: keras.Model) -> keras.Model:
    model.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    return model


def steps(model: keras.Model) -> keras.Model:
    """As a loop does that runs eagerly, on what `fit` gives, alike each time."""
    weights = model.trainable_variables
    for _ in range(2):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(X) - Y) ** 2)
        model.optimizer.apply(tape.gradient(loss, weights), weights)
    return model


def function(model: keras.Model) -> keras.Model:
    tf.function(lambda: steps(model) and None, autograph=False)()
    return model


WAYS = {"fit": fit, "eager": steps, "function": function}


@pytest.fixture(scope="module")
def expected():
    """The weights of `n` times two steps, where nothing is debugged."""
    found = {}
    for name, way in WAYS.items():
        model = cases.compiled_model(optimizer())
        found[name] = [way(model).get_weights() for _ in range(3)]
    return found


def assert_near(model: keras.Model, expected: list[np.ndarray]) -> None:
    for found, value in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-6)


@pytest.mark.representatives(
    "check_numerics-fit", "dump-eager", "eagerly-function", "profiler-fit"
)
@pytest.mark.parametrize(("tool", "way"), itertools.product(TOOLS, WAYS))
def test_a_tool_changes_no_training(tool, way, expected, tmp_path, caplog):
    """On before the first step, off, then on again after it."""
    model = cases.compiled_model(optimizer())
    run, context = WAYS[way], TOOLS[tool]
    with caplog.at_level(logging.WARNING, logger="tf_effopt"):
        with context(tmp_path / "before"):
            assert_near(run(model), expected[way][0])
        said = [r for r in caplog.records if WITHOUT_XLA in r.getMessage()]
        assert len(said) == (tool in ("check_numerics", "dump"))
        model.compile(model.optimizer, "mse", jit_compile=False)
        assert_near(run(model), expected[way][1])
        with context(tmp_path / "after"):
            model.compile(model.optimizer, "mse", jit_compile=False)
            assert_near(run(model), expected[way][2])
        said = [r for r in caplog.records if WITHOUT_XLA in r.getMessage()]
        assert len(said) == (tool in ("check_numerics", "dump"))
    assert model.optimizer.skipped_steps == 0


def compiled(model: keras.Model) -> list[bool]:
    """Whether each program is compiled by XLA."""
    return [p.update.is_compiled for p in cases.programs_of(model.optimizer)]


def test_what_ran_compiled_is_compiled_again_when_the_tool_is_off(tmp_path):
    model = steps(cases.compiled_model(tf_effopt.SGD(0.01)))
    with check_numerics(tmp_path):
        steps(model)
    assert compiled(model) == [True, False]
    assert compiled(steps(model)) == [True, False]
    other = steps(cases.compiled_model(tf_effopt.SGD(0.01)))
    assert compiled(other) == [True]


def test_a_number_that_is_not_finite_is_found_by_the_tool(tmp_path):
    weight = keras.Variable([1.0])
    optimizer = tf_effopt.SGD(0.5)
    with check_numerics(tmp_path), pytest.raises(tf.errors.InvalidArgumentError):
        optimizer.apply([tf.constant([np.nan])], [weight])
    optimizer.apply([tf.constant([np.nan])], [weight])
    assert optimizer.skipped_steps == 1 and float(weight[0]) == 1.0


CHECKED = [case for case in CASES if case.name in ("sgd", "lamb", "muon", "prodigy")]


@pytest.mark.parametrize("case", CHECKED, ids=by_name)
def test_no_false_alarm_where_a_gradient_is_zero(case, tmp_path):
    weights = [keras.Variable(np.zeros((4, 3))), keras.Variable(np.ones(3))]
    optimizer = case.make(clipnorm=1.0)
    gradients = [np.zeros((4, 3), "float32"), np.zeros(3, "float32")]
    with check_numerics(tmp_path):
        optimizer.apply(gradients, weights)
    assert optimizer.skipped_steps == 0


def test_tensorboard_profiles_a_training(expected, tmp_path):
    pytest.importorskip("tensorboard")
    model = cases.compiled_model(optimizer())
    board = keras.callbacks.TensorBoard(tmp_path, profile_batch=1)
    model.fit(X, Y, batch_size=8, shuffle=False, verbose=0, callbacks=[board])
    assert_near(model, expected["fit"][0])


def test_whether_xla_is_there_is_not_asked_of_a_function_that_runs_eagerly(tmp_path):
    from tf_effopt.runtime import xla

    xla.device_failure.cache_clear()
    with eagerly(tmp_path):
        assert xla.device_failure("/device:CPU:0") is None
    assert xla.device_failure.cache_info().currsize == 1


def make_dataset() -> Any:
    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)


def test_debug_mode_of_datasets(expected):
    from tensorflow.python.data.ops import debug_mode

    tf.data.experimental.enable_debug_mode()
    try:
        model = cases.compiled_model(optimizer())
        model.fit(make_dataset(), verbose=0)
    finally:
        debug_mode.toggle_debug_mode(False)
    assert_near(model, expected["fit"][0])
