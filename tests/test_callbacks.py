"""The learning-rate range test: what it visits, when it stops, what it leaves."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import keras
import numpy as np
import pytest

import tf_effopt
from tf_effopt.callbacks import LearningRateRangeTest

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 3)).astype("float32")
Y = X @ np.array([[1.0], [-2.0], [3.0]], "float32")
Y += 0.1 * RNG.normal(size=Y.shape).astype("float32")


def compiled(optimizer, scope=None, loss="mse", **options) -> keras.Model:
    """A model with all kinds of state: moving averages, seeds, weights."""
    keras.utils.set_random_seed(0)
    with scope or contextlib.nullcontext():
        model = keras.Sequential(
            [
                keras.Input((3,)),
                keras.layers.Dense(4),
                keras.layers.BatchNormalization(),
                keras.layers.Dropout(0.1),
                keras.layers.Dense(1),
            ]
        )
        model.compile(optimizer=optimizer(), loss=loss, **options)
    return model


def run(model: keras.Model, test: LearningRateRangeTest, epochs=10, callbacks=()):
    return model.fit(
        X, Y, batch_size=16, epochs=epochs, verbose=0, callbacks=[test, *callbacks]
    )


def state_of(model: keras.Model) -> list[bytes]:
    variables = model.variables + model.optimizer.variables
    return [keras.ops.convert_to_numpy(v.value).tobytes() for v in variables]


class Rates(keras.callbacks.Callback):
    """The learning rate at each batch, as the optimizer has it."""

    def on_train_begin(self, logs=None):
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(float(self.model.optimizer.learning_rate))


def test_rates_are_the_geometric_sequence():
    model, rates = compiled(lambda: tf_effopt.SGD(0.01)), Rates()
    test = LearningRateRangeTest(1e-4, 1e-1, steps=31)
    run(model, test, callbacks=[rates])
    expected = np.geomspace(1e-4, 1e-1, 31)
    np.testing.assert_allclose(test.learning_rates, expected, rtol=1e-12)
    np.testing.assert_allclose(rates.seen, expected, rtol=1e-6)
    assert not test.exploded
    assert len(test.losses) == 31


def test_losses_are_each_batchs_own_smoothed():
    """Against a loop in NumPy: SGD on one weight, by the rates of the test."""
    x, y = np.full((24, 1), 2.0, "float32"), np.linspace(1, 5, 24)[:, None]
    dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
    model = keras.Sequential([keras.Input((1,)), dense])
    model.compile(optimizer=tf_effopt.SGD(0.5), loss="mse")
    test = LearningRateRangeTest(1e-3, 1e-1, steps=6, smoothing=0.5, explosion=99)
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0, callbacks=[test])
    w, average, expected = 0.0, 0.0, []
    for i, rate in enumerate(np.geomspace(1e-3, 1e-1, 6)):
        error = 2 * w - y[4 * i : 4 * i + 4, 0]
        average = 0.5 * average + 0.5 * np.mean(error**2)
        expected.append(average / (1 - 0.5 ** (i + 1)))
        w -= rate * np.mean(4 * error)
    np.testing.assert_allclose(test.losses, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: tf_effopt.Adam(0.01),
        lambda: tf_effopt.SGD(0.01, momentum=0.9, use_ema=True),
        lambda: tf_effopt.LossScaleOptimizer(tf_effopt.SGD(0.01)),
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)),
    ],
    ids=["adam", "momentum_ema", "loss_scale", "keras"],
)
def test_everything_is_restored_bit_for_bit(optimizer):
    model = compiled(optimizer)
    model.fit(X, Y, verbose=0)
    before = state_of(model)
    changed = []

    class Watch(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            changed.append(state_of(model) != before)

    test = LearningRateRangeTest(1e-4, 100, steps=40)
    run(model, test, callbacks=[Watch()])
    assert any(changed)  # else there was nothing to restore
    assert state_of(model) == before
    assert float(model.optimizer.learning_rate) == pytest.approx(0.01)
    model.fit(X, Y, verbose=0)  # training can start


def test_under_two_replicas():
    tf = pytest.importorskip("tensorflow")
    script = """
        import sys
        import tensorflow as tf
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * 2,
        )
        sys.path.insert(0, sys.argv[1])
        import test_callbacks as t
        import tf_effopt
        strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
        model = t.compiled(lambda: tf_effopt.Adam(0.01), strategy.scope())
        model.fit(t.X, t.Y, verbose=0)
        before = t.state_of(model)
        test = t.LearningRateRangeTest(1e-4, 100, steps=40)
        t.run(model, test)
        assert test.exploded and test.suggestion < 1, test.learning_rates
        assert t.state_of(model) == before
        print("restored")
    """
    assert tf and "restored" in _python(script)


@pytest.mark.representatives("jax")
@pytest.mark.parametrize(
    "backend", ["jax", pytest.param("torch", marks=pytest.mark.torch)]
)
def test_other_backends(backend):
    """The rate reaches each batch: SGD's weight moves by rate times gradient."""
    pytest.importorskip(backend)
    script = """
        import sys
        sys.path.insert(0, sys.argv[1])
        import keras, numpy as np, tf_effopt, test_callbacks as t
        from tf_effopt.runtime.keras_hooks import sync_state
        dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
        model = keras.Sequential([keras.Input((1,)), dense])
        # The gradient is 1 everywhere.
        model.compile(tf_effopt.SGD(0.5), loss=lambda y, p: keras.ops.mean(p))
        weights = []
        class Watch(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                sync_state(model)
                weights.append(model.get_weights()[0].item())
        test = t.LearningRateRangeTest(1e-3, 1e-1, steps=8, explosion=1e9)
        model.fit(np.ones((16, 1)), np.ones((16, 1)), batch_size=4, epochs=2,
                  verbose=0, callbacks=[test, Watch()])
        moved = -np.diff([0.0, *weights])
        np.testing.assert_allclose(moved, np.geomspace(1e-3, 1e-1, 8), rtol=1e-4)
        assert model.get_weights()[0].item() == 0.0
        assert float(model.optimizer.learning_rate) == 0.5

        model = t.compiled(lambda: tf_effopt.Adam(0.01))
        model.fit(t.X, t.Y, verbose=0)
        before = t.state_of(model)
        t.run(model, t.LearningRateRangeTest(1e-4, 100, steps=40))
        assert t.state_of(model) == before
        print("restored")
    """
    assert "restored" in _python(script, KERAS_BACKEND=backend)


def _python(script: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(Path(__file__).parent)],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_stops_when_the_loss_explodes():
    model, rates = compiled(lambda: tf_effopt.SGD(0.01)), Rates()
    test = LearningRateRangeTest(1e-4, 1e4, steps=40, explosion=4)
    run(model, test, callbacks=[rates])
    assert test.exploded
    assert len(rates.seen) < 40
    assert all(np.isfinite(test.losses))
    assert max(test.losses[:-1]) <= 4 * max(test.losses[0], min(test.losses))
    assert test.losses.index(min(test.losses)) > 0


def test_stops_at_a_loss_that_is_not_finite():
    def poisoned(y, prediction):
        return keras.ops.mean(prediction) * np.nan

    model = compiled(lambda: tf_effopt.SGD(0.01), loss=poisoned)
    before = state_of(model)
    test = LearningRateRangeTest(steps=10)
    run(model, test)
    assert test.exploded
    assert test.losses == []
    assert state_of(model) == before
    with pytest.raises(RuntimeError, match="lower `low`"):
        _ = test.suggestion


def test_a_negative_loss_does_not_count_as_an_explosion():
    def negative(y, prediction):
        return keras.ops.mean(keras.ops.square(prediction - y)) - 100.0

    test = LearningRateRangeTest(1e-6, 1e-3, steps=10)
    run(compiled(lambda: tf_effopt.SGD(0.01), loss=negative), test)
    assert not test.exploded
    assert len(test.losses) == 10


def test_suggestion_is_a_tenth_of_the_rate_of_the_lowest_loss():
    test = LearningRateRangeTest()
    test.learning_rates, test.losses = [0.1, 0.2, 0.4, 0.8], [3.0, 2.0, 1.0, 5.0]
    assert test.suggestion == pytest.approx(0.04)
    test.losses = [1.0, 2.0, 3.0, 4.0]
    with pytest.raises(RuntimeError, match="never fell"):
        _ = test.suggestion


def test_plot_writes_an_image(tmp_path):
    test = LearningRateRangeTest()
    test.learning_rates, test.losses = [0.1, 0.2, 0.4], [3.0, 1.0, 2.0]
    path = test.plot(tmp_path / "new" / "range.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_steps_per_execution_holds_a_rate():
    model = compiled(lambda: tf_effopt.SGD(0.01), steps_per_execution=2)
    test = LearningRateRangeTest(1e-4, 1e-2, steps=8)
    run(model, test, epochs=4)
    assert len(test.losses) == 8
    with pytest.raises(ValueError, match=r"9 steps of 2 batches.*has 8.*epochs=5"):
        run(model, LearningRateRangeTest(steps=9), epochs=4)


def test_too_few_batches_fail_before_anything_changes():
    model = compiled(lambda: tf_effopt.SGD(0.01))
    before = state_of(model)
    with pytest.raises(ValueError, match=r"takes 100 steps.*has 8.*epochs=25"):
        run(model, LearningRateRangeTest(steps=100), epochs=2)
    assert state_of(model)[: len(before)] == before


def test_data_that_ends_early_warns_and_restores():
    model = compiled(lambda: tf_effopt.SGD(0.01))
    before = [w.tobytes() for w in model.get_weights()]
    batches = ((X[i : i + 16], Y[i : i + 16]) for i in (0, 16, 32))
    with pytest.warns(UserWarning, match="after 3 of 10 steps"):
        model.fit(batches, verbose=0, callbacks=[LearningRateRangeTest(steps=10)])
    assert [w.tobytes() for w in model.get_weights()] == before


@pytest.mark.parametrize(
    ("optimizer", "received"),
    [
        (
            lambda: tf_effopt.SGD(
                keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
            ),
            "SGD with a ExponentialDecay",
        ),
        (lambda: keras.optimizers.SGD(lambda: 0.1), "SGD with a function"),
        (
            lambda: tf_effopt.LossScaleOptimizer(tf_effopt.SGD(lambda: 0.1)),
            "SGD with a function",
        ),
    ],
    ids=["schedule", "callable", "wrapped"],
)
def test_a_learning_rate_that_is_no_number_fails(optimizer, received):
    with pytest.raises(ValueError, match=rf"is a number.*Received: {received}"):
        run(compiled(optimizer), LearningRateRangeTest(steps=4))


def test_another_callback_that_sets_the_rate_fails():
    class Meddler(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.model.optimizer.learning_rate = 0.5

    model = compiled(lambda: tf_effopt.SGD(0.01))
    test = LearningRateRangeTest(1e-4, 1e-2, steps=4)
    with pytest.raises(RuntimeError, match=r"Leave out.*Expected: 0.0001"):
        run(model, test, callbacks=[Meddler()])
    test.restore()
    assert float(model.optimizer.learning_rate) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 0.0}, r"`low` must be a number above 0. Received: low=0.0"),
        ({"low": "a"}, r"Received: low='a'"),
        ({"low": 1.0, "high": 0.5}, r"`high` must be above low=1.0"),
        ({"high": float("inf")}, r"`high`"),
        ({"steps": 1}, r"`steps` must be an integer of at least 2"),
        ({"steps": 10.5}, r"`steps`"),
        ({"smoothing": 1.0}, r"`smoothing` must be in \[0, 1\)"),
        ({"explosion": 1.0}, r"`explosion` must be a number above 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LearningRateRangeTest(**arguments)
