"""Any number by a schedule: its values, where it runs, what is saved."""

from __future__ import annotations

import functools
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import (
    CASES,
    X,
    Y,
    arrays,
    by_name,
    compiled_model,
    falling,
    traces,
    train,
    weights_after,
)

import tf_effopt
from tf_effopt import SGD, Adam, AdamW, Group, LossScaleOptimizer
from tf_effopt.averaging import Lookahead
from tf_effopt.base.configurable import fields
from tf_effopt.hyperparameters import Number
from tf_effopt.transforms import MARS, AdaptiveClipping

pytestmark = pytest.mark.fresh_programs

schedules = keras.optimizers.schedules


steps = functools.partial(weights_after, start=1.0)


def test_a_decay_by_a_schedule_is_that_of_its_numbers():
    decay = falling(0.8)
    found = steps(SGD(0.5, weight_decay=decay), np.zeros(6))
    optimizer, expected = SGD(0.5, weight_decay=0.8), []
    w = keras.Variable([1.0])
    for t in range(6):
        optimizer.weight_decay = float(decay(t))
        optimizer.apply([tf.constant([0.0])], [w])
        expected.append(float(w.numpy()[0]))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert len(set(np.round(np.diff(found), 3))) > 3


def numbers_of(make):
    optimizer = make()
    for name, kind in fields(type(optimizer)).items():
        value = getattr(optimizer, name)
        is_number = isinstance(kind, Number) and not kind.fixed
        if is_number and isinstance(value, float) and value:
            yield name


@pytest.mark.representatives("rmsprop", "adafactor", "muon")
@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_every_number_of_every_optimizer(case):
    """The same as assigning the value before each step."""
    gradients = np.random.default_rng(0).normal(size=(5, 4, 3))

    def run(**arguments):
        w = keras.Variable(np.linspace(-1, 1, 12).reshape(4, 3), name="hidden")
        optimizer = case.make(**{k: x for k, x in arguments.items() if callable(x)})
        optimizer.build([w])
        for t, g in enumerate(gradients):
            for name, x in arguments.items():
                if not callable(x):
                    setattr(optimizer, name, x[t])
            optimizer.apply([tf.constant(g, "float32")], [w])
        return w.numpy()

    checked = 0
    for name in numbers_of(case.make):
        value = getattr(case.make(), name)
        schedule = falling(value, 0.9 * value)
        if case.name == "schedule_free_adamw" and name == "beta_1":
            with pytest.raises(ValueError, match="`beta_1` can't be given by a sched"):
                case.make(beta_1=schedule)
            continue
        found = run(**{name: schedule})
        expected = run(**{name: [float(schedule(t)) for t in range(5)]})
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-6, err_msg=name)
        checked += 1
    assert checked or case.make.func in (tf_effopt.GradientDescent, SGD)


SHARED = {
    "weight_decay": {},
    "clipnorm": {},
    "clipvalue": {},
    "global_clipnorm": {},
    "ema_momentum": {"use_ema": True},
    "loss_scale_factor": {},
}


@pytest.mark.representatives(
    "eager-global_clipnorm", "fit-weight_decay", "fit-loss_*", "jit-ema_momentum"
)
@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("way", ["eager", "fit", "jit"])
def test_shared_numbers_in_every_way(name, way):
    schedule = falling(0.8, 0.4, steps=5)

    def trained(optimizer, assign=False):
        model = compiled_model(optimizer)
        if way == "jit":
            model.compile(optimizer, "mse", jit_compile=True)
        optimizer.build(model.trainable_variables)
        for t in range(5):
            if assign:
                setattr(optimizer, name, float(schedule(t)))
            if way == "eager":
                with tf.GradientTape() as tape:
                    loss = keras.losses.MeanSquaredError()(Y, model(X))
                    loss = optimizer.scale_loss(loss)
                weights = model.trainable_weights
                optimizer.apply(tape.gradient(loss, weights), weights)
            else:
                train(model, 1)
        return arrays([*model.weights, *optimizer.variables])

    options = SHARED[name]
    found = trained(Adam(0.05, **{name: schedule}, **options))
    expected = trained(Adam(0.05, **{name: 0.7}, **options), assign=True)
    constant = trained(Adam(0.05, **{name: 0.8}, **options))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    # A loss scale has no effect but on rounding; Adam undoes most of a clipping.
    if name != "loss_scale_factor":
        pairs = zip(found, constant, strict=True)
        assert max(np.abs(a - b).max() for a, b in pairs) > 1e-5


def test_numbers_of_stages_and_groups():
    v, w = keras.Variable([0.0], name="v"), keras.Variable([0.0], name="w")
    optimizer = SGD(
        1.0,
        transforms=[MARS(falling(1.0, 0.5, steps=1), beta_1=0.5)],
        averaging=Lookahead(1, step_size=falling(1.0, 0.5, steps=1)),
        groups=[Group("w", learning_rate_multiplier=falling(1.0, 0.5, steps=1))],
    )
    for _ in range(2):
        optimizer.apply([tf.constant([0.25])] * 2, [v, w])
    # c = 0.25 + 1 * (0.25 - 0), then 0.25; half of the second step, and of its rate.
    np.testing.assert_allclose([v.numpy()[0], w.numpy()[0]], [-0.625, -0.5625])
    assert optimizer.transforms[0].current("gamma") == 0.5
    assert optimizer.averaging[0].current("step_size") == 0.5
    assert optimizer.groups[0].current("learning_rate_multiplier") == 0.5
    assert "x 0.5" in optimizer.describe()


def test_it_counts_micro_steps_as_that_of_the_learning_rate():
    def optimizer(**arguments):
        return SGD(gradient_accumulation_steps=2, **arguments)

    rate = falling(0.5)
    one = steps(optimizer(learning_rate=rate), np.ones(8))
    other = optimizer(
        learning_rate=1.0, groups=[Group("w", learning_rate_multiplier=rate)]
    )
    w = keras.Variable([1.0], name="w")
    for expected in one:
        other.apply([tf.constant([1.0])], [w])
        assert w.numpy()[0] == pytest.approx(float(expected), rel=1e-6)


def test_reading_returns_what_was_set_and_current_the_number():
    decay = falling(0.1, steps=10)
    optimizer = AdamW(falling(1.0, 0.5, steps=2), weight_decay=decay, beta_1=0.8)
    assert optimizer.weight_decay is decay
    assert optimizer.current("weight_decay") == pytest.approx(0.1)
    assert optimizer.current("learning_rate") == 1.0
    assert optimizer.current("beta_1") == 0.8
    assert optimizer.current("amsgrad") is False
    assert optimizer.current("clipnorm") is None
    steps(optimizer, np.zeros(3))
    assert optimizer.current("weight_decay") == pytest.approx(0.07)
    assert optimizer.current("learning_rate") == 0.5
    assert isinstance(optimizer.current("weight_decay"), float)
    with pytest.raises(
        ValueError, match="no hyperparameter `weight_decy`. Did you mea"
    ):
        optimizer.current("weight_decy")
    assert LossScaleOptimizer(AdamW(weight_decay=decay)).current(
        "weight_decay"
    ) == pytest.approx(0.1)


def test_values_out_of_the_range_are_limited_and_warned_about_once():
    with pytest.warns(
        UserWarning, match="`weight_decay` must be .* is -0.5 at step"
    ) as w:
        optimizer = SGD(0.5, weight_decay=falling(0.5, -0.5, steps=1))
    assert len(w) == 1
    assert steps(optimizer, np.zeros(3)) == [0.75, 0.75, 0.75]
    with pytest.warns(UserWarning, match="`beta_1` must be in"):
        optimizer = Adam(beta_1=falling(1.5, 0.5))
    assert optimizer.current("beta_1") < 1.0
    with pytest.warns(UserWarning, match="`clipnorm`"):
        # 0 would be "off", which the compiled update can't be.
        optimizer = SGD(1.0, clipnorm=falling(1.0, 0.0, steps=1))
    assert steps(optimizer, [3.0, 3.0]) == [0.0, pytest.approx(0.0)]


@pytest.mark.parametrize(
    "make",
    [
        lambda x: Adam(gradient_accumulation_steps=x),
        lambda x: tf_effopt.Yogi(initial_accumulator_value=x),
    ],
)
def test_what_is_fixed_takes_no_schedule(make):
    with pytest.raises(ValueError, match="can't be given by a schedule|integer"):
        make(falling(3.0))


def test_a_schedule_is_not_exchanged_after_build():
    optimizer = SGD(0.5, weight_decay=falling(0.8))
    steps(optimizer, [1.0])
    for value in (0.5, falling(0.1), None):
        with pytest.raises(ValueError, match="`weight_decay` can't change from"):
            optimizer.weight_decay = value
    optimizer = SGD(0.5, weight_decay=0.1)
    steps(optimizer, [1.0])
    with pytest.raises(ValueError, match="`weight_decay` can't change from"):
        optimizer.weight_decay = falling(0.1)


def test_one_trace_for_all_its_values():
    optimizer = AdamW(1e-3, weight_decay=falling(0.1), beta_2=falling(0.9, 0.99))
    model = compiled_model(optimizer)
    model.fit(X, Y, batch_size=4, epochs=3, verbose=0)
    assert traces(optimizer) == [1]
    assert int(optimizer.iterations) == 12


def test_saved_and_copied(tmp_path):
    def optimizer():
        return AdamW(
            1e-2,
            weight_decay=falling(0.5),
            transforms=[AdaptiveClipping(falling(1.0, 0.1))],
            averaging=Lookahead(2, falling(1.0, 0.5)),
            groups=[Group("bias", weight_decay=falling(0.2))],
        )

    model = train(compiled_model(optimizer()), 3)
    json.dumps(model.optimizer.get_config())
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for m in (model, loaded):
        train(m, 3)
    for a, b in zip(
        arrays([*model.weights, *model.optimizer.variables]),
        arrays([*loaded.weights, *loaded.optimizer.variables]),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    kept = loaded.optimizer
    for owner, name in (
        (kept, "weight_decay"),
        (kept.transforms[0], "clipping"),
        (kept.averaging[0], "step_size"),
        (kept.groups[0], "weight_decay"),
    ):
        assert isinstance(getattr(owner, name), schedules.PolynomialDecay)
    again = type(kept)(**kept.get_config())
    assert again.weight_decay.get_config() == kept.weight_decay.get_config()
    assert "weight_decay=PolynomialDecay(" in repr(again)
