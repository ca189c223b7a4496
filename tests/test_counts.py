"""Bias correction counts the updates of the variable that it corrects."""

import keras
import numpy as np
import pytest
from keras import ops

import tf_effopt

on_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="a step with other gradients"
)


def gradient(step):
    return np.array([1.0, -2.0, 0.5, 3.0], "float32") * (1 + 0.3 * np.sin(step))


def weights(n=2):
    return [keras.Variable(np.ones(4, "float32"), name=f"w{i}") for i in range(n)]


def adam(steps, rate=1e-2, beta_1=0.9, beta_2=0.999, epsilon=1e-7):
    """Keras's Adam in float64, of the gradients of these steps."""
    w, m, v = np.ones(4), np.zeros(4), np.zeros(4)
    for t, step in enumerate(steps, 1):
        g = gradient(step).astype("float64")
        m = beta_1 * m + (1 - beta_1) * g
        v = beta_2 * v + (1 - beta_2) * g * g
        alpha = rate * np.sqrt(1 - beta_2**t) / (1 - beta_1**t)
        w = w - alpha * m / (np.sqrt(v) + epsilon)
    return w


@on_tensorflow
def test_a_trace_of_before_counts_what_a_variable_missed_since(tmp_path):
    import tensorflow as tf

    both = weights()
    optimizer = tf_effopt.Adam(1e-2)

    @tf.function
    def step(g, everything):
        optimizer.apply([g, g if everything else None], both)

    plan = [True, True, False, False, False, True, True, False, True]
    for i, everything in enumerate(plan):
        step(tf.constant(gradient(i)), everything)
    np.testing.assert_allclose(both[0].numpy(), adam(range(9)), rtol=1e-6)
    seen = [i for i, everything in enumerate(plan) if everything]
    np.testing.assert_allclose(both[1].numpy(), adam(seen), rtol=1e-6)

    # The record is part of files and checkpoints.
    def trained_on(other, variables):
        for v, w in zip(variables, both, strict=True):
            v.assign(w)
        other.apply([ops.convert_to_tensor(gradient(9))] * 2, variables)
        return variables[1].numpy()

    store = {}
    optimizer.save_own_variables(store)
    checkpoint = tf.train.Checkpoint(optimizer=optimizer).save(tmp_path / "c")
    copies = [weights(), weights()]
    loaded, restored = tf_effopt.Adam(1e-2), tf_effopt.Adam(1e-2)
    loaded.load_own_variables(store)
    loaded.build(copies[0])
    restored.build(copies[1])
    tf.train.Checkpoint(optimizer=restored).restore(checkpoint).assert_consumed()
    want = adam([*seen, 9])
    np.testing.assert_allclose(trained_on(loaded, copies[0]), want, rtol=1e-6)
    np.testing.assert_allclose(trained_on(restored, copies[1]), want, rtol=1e-6)


@pytest.mark.representatives("Adam", "Adafactor", "Muon")
@pytest.mark.parametrize(
    "name", ["Adam", "RAdam", "Lamb", "Yogi", "Adafactor", "SOAP", "Muon"]
)
def test_a_variable_that_joins_later_starts_as_with_a_new_optimizer(name):
    make = getattr(tf_effopt, name)
    old, new = weights()
    alone = weights(1)
    fresh, optimizer = make(1e-2), make(1e-2)
    for i in range(20):
        optimizer.apply([ops.convert_to_tensor(gradient(i))], [old])
    optimizer = optimizer.carry_over([old, new])
    for i in range(4):
        g = ops.convert_to_tensor(gradient(i))
        optimizer.apply([g, g], [old, new])
        fresh.apply([g], alone)
    got = ops.convert_to_numpy(new)
    np.testing.assert_allclose(got, ops.convert_to_numpy(alone[0]), rtol=1e-6)


def test_equal_counts_leave_no_record():
    both, store = weights(), {}
    optimizer = tf_effopt.Adam(1e-2)
    optimizer.apply([ops.convert_to_tensor(gradient(0))] * 2, both)
    optimizer.save_own_variables(store)
    assert set(store) == {str(i) for i in range(len(optimizer.variables))}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("SGD", {"learning_rate": 0.05, "use_ema": True, "ema_momentum": 0.8}),
        ("Prodigy", {}),
        ("ScheduleFreeAdamW", {"learning_rate": 0.05}),
    ],
)
def test_a_model_that_fit_builds_trains_as_one_with_an_input(name, settings):
    x = np.random.default_rng(0).normal(size=(16, 5)).astype("float32")
    y = x @ np.ones((5, 2), "float32")
    losses = []
    for start in ([], [keras.Input((5,))]):
        keras.utils.set_random_seed(3)
        model = keras.Sequential([*start, keras.layers.Dense(2)])
        model.compile(getattr(tf_effopt, name)(**settings), "mse")
        history = model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
        losses.append(history.history["loss"] + [model.evaluate(x, y, verbose=0)])
    np.testing.assert_allclose(*losses, rtol=1e-6)


@pytest.mark.parametrize(
    "wrong", [{"slots": {"d": ("estimate", 1.0)}}, {"measure": lambda g, slots: {}}]
)
def test_numbers_of_each_variable_have_no_state_of_the_model(wrong):
    with pytest.raises(ValueError, match="can't have `slots` or `measure`"):
        tf_effopt.rules.ModelRule(
            lambda sums, slots, *, t: ({}, {}), each_count=True, **wrong
        )
