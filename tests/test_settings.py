"""Numbers given as variables, and names of settings that aren't."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_effopt
from tf_effopt.engine.spelling import distance

VARIABLES = {"tf": tf.Variable, "keras": keras.Variable}


@pytest.mark.parametrize("kind", VARIABLES)
def test_a_variable_as_a_number_is_refused(kind):
    variable = VARIABLES[kind](0.5)
    rate = "can't be a variable.*learning_rate=lambda: variable"
    with pytest.raises(ValueError, match=rate):
        tf_effopt.SGD(variable)
    optimizer = tf_effopt.SGD(0.1)
    with pytest.raises(ValueError, match=rate):
        optimizer.learning_rate = variable
    assert float(optimizer.learning_rate) == pytest.approx(0.1)
    for make in (
        lambda: tf_effopt.SGD(momentum=variable),
        lambda: tf_effopt.AdamW(weight_decay=variable),
        lambda: tf_effopt.SGD(clipnorm=variable),
        lambda: tf_effopt.Adam(beta_1=variable),
        lambda: tf_effopt.SGD(use_ema=True, ema_momentum=variable),
        lambda: tf_effopt.Group("w", learning_rate_multiplier=variable),
        lambda: tf_effopt.transforms.ZClip(decay=variable),
        lambda: tf_effopt.LossScaleOptimizer(tf_effopt.SGD(), initial_scale=variable),
        lambda: setattr(tf_effopt.Group("w"), "weight_decay", variable),
    ):
        with pytest.raises(ValueError, match="variable"):
            make()


def test_a_constant_tensor_is_a_number():
    assert tf_effopt.SGD(momentum=tf.constant(0.5)).momentum == 0.5


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_callable_is_followed_in_fit(jit_compile):
    rate = tf.Variable(0.25)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    model.set_weights([np.zeros((1, 1))])
    optimizer = tf_effopt.SGD(lambda: rate)
    model.compile(optimizer, "mse", jit_compile=jit_compile)
    ones = np.ones((1, 1))
    model.fit(ones, ones, verbose=0)  # a gradient of -2
    rate.assign(0.0)
    model.fit(ones, ones, verbose=0)
    assert model.get_weights()[0] == 0.5
    rate.assign(0.5)
    model.fit(ones, ones, verbose=0)  # of -1
    assert model.get_weights()[0] == 1.0


JAX = """
import keras, numpy as np, tf_effopt
rate = keras.Variable(0.25)
model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
ones = np.ones((1, 1))
model.compile(tf_effopt.SGD(lambda: rate), "mse", auto_scale_loss=False)
try:
    model.fit(ones, ones, verbose=0)
except RuntimeError as error:
    assert "and not follow it: pass a number" in str(error), error
else:
    raise SystemExit("nothing was said")
w = keras.Variable([1.0])
optimizer = tf_effopt.SGD(lambda: rate)
for expected in (0.75, 0.75):  # step by step it is followed
    optimizer.apply([keras.ops.ones(1)], [w])
    assert float(w.numpy()[0]) == expected, w
    rate.assign(0.0)


class Doubling(tf_effopt.SGD):
    def apply(self, grads, trainable_variables=None):
        super().apply([2 * g for g in grads], trainable_variables)


inner = Doubling(0.125)
print(repr(inner))
model.compile(tf_effopt.LossScaleOptimizer(inner), "mse")
model.set_weights([np.zeros((1, 1))])
model.fit(ones, ones, verbose=0)
assert abs(model.get_weights()[0][0, 0] - 0.5) < 1e-6, model.get_weights()
"""


def test_on_jax():
    pytest.importorskip("jax")
    finished = subprocess.run(
        [sys.executable, "-c", JAX],
        check=False,
        env=os.environ | {"KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    assert "Doubling(learning_rate=0.125)" in finished.stdout


@pytest.mark.parametrize(
    "name, meant",
    [
        ("lr", "Set `learning_rate`"),
        ("beta1", "Set `beta_1`"),
        ("beta2", "Set `beta_2`"),
        ("eps", "Set `epsilon`"),
        ("betas", "`beta_1=0.9, beta_2=0.999`"),
        ("decay", "InverseTimeDecay.*`weight_decay`"),
        ("wd", "Set `weight_decay`"),
        ("learning_rat", "Set `learning_rate`"),
        ("weigt_decy", "Set `weight_decay`"),
        ("clip_norm", "Set `clipnorm`"),
        ("ema_momentun", "Set `ema_momentum`"),
    ],
)
def test_a_name_that_is_nearly_a_setting(name, meant):
    optimizer = tf_effopt.Adam()
    with pytest.raises(
        AttributeError, match=f"`Adam` has no setting `{name}`.*{meant}"
    ):
        setattr(optimizer, name, 0.5)
    with pytest.raises(ValueError, match="`Adam` has no argument"):
        tf_effopt.Adam(**{name: 0.5})


def test_names_far_from_a_setting_are_free():
    optimizer = tf_effopt.Adam()
    optimizer.lr_finder_result = 1
    optimizer.rate_of_mine = 2
    optimizer._lr = 3
    assert optimizer.lr_finder_result == 1


class Declares(tf_effopt.SGD):
    decay: float
    beta = 0.5

    def __init__(self, lr=0.1, eps=1e-3, **kwargs):
        super().__init__(lr, **kwargs)
        self.lr, self.eps, self.decay, self.beta, self._wd = lr, eps, 0.1, 0.2, 0.3


def test_a_subclass_may_declare_such_names():
    optimizer = Declares(0.5)
    assert (optimizer.lr, optimizer.eps, optimizer.decay, optimizer.beta) == (
        (0.5, 1e-3, 0.1, 0.2)
    )
    optimizer.lr = 0.25
    with pytest.raises(AttributeError, match="Set `momentum`"):
        optimizer.momentun = 0.5


def test_names_of_transforms_groups_and_loss_scaling():
    clip, group = tf_effopt.transforms.ZClip(), tf_effopt.Group("w")
    scaled = tf_effopt.LossScaleOptimizer(tf_effopt.Adam())
    for thing, name, meant in [
        (clip, "z_treshold", "z_threshold"),
        (group, "lr_multiplier", "learning_rate_multiplier"),
        (group, "wd", "weight_decay"),
        (scaled, "lr", "learning_rate"),
        (scaled, "beta1", "inner_optimizer.beta_1"),
        (scaled, "inital_scale", "initial_scale"),
    ]:
        with pytest.raises(AttributeError, match=f"Set `{meant}` instead"):
            setattr(thing, name, 0.5)
    for make, message in [
        (lambda: tf_effopt.transforms.ZClip(z_treshold=3), "`z_threshold`"),
        (lambda: tf_effopt.Group("w", lr_multiplier=1), "`learning_rate_multiplier`"),
        (lambda: tf_effopt.Group("w", decay=1), "`weight_decay`"),
    ]:
        with pytest.raises(TypeError, match=f"has no argument.*{message}"):
            make()
    with pytest.raises(ValueError, match="no argument `inital_scale`. Did you mean"):
        tf_effopt.LossScaleOptimizer(tf_effopt.SGD(), inital_scale=2.0)


def test_numbers_of_loss_scaling_are_checked_when_set():
    scaled = tf_effopt.LossScaleOptimizer(tf_effopt.SGD())
    scaled.loss_scale_factor = None
    with pytest.raises(ValueError, match="`initial_scale` must be a number above 0"):
        scaled.initial_scale = -1.0
    scaled.dynamic_growth_steps = 3
    scaled.build([keras.Variable([1.0])])
    with pytest.raises(AttributeError, match="`dynamic_growth_steps` can't change"):
        scaled.dynamic_growth_steps = 4
    with pytest.raises(AttributeError, match="optimizer.inner_optimizer.momentum"):
        scaled.momentum = 0.5


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("loss", [3, 3.0, np.float64(3.0), tf.constant(3)])
def test_scale_loss_of_a_number(loss, built):
    optimizer = tf_effopt.SGD(loss_scale_factor=0.5)
    if built:
        optimizer.build([keras.Variable([1.0])])
    assert float(optimizer.scale_loss(loss)) == 1.5


def test_a_count_says_that_0_is_allowed():
    with pytest.raises(ValueError, match="an integer of at least 0 or None"):
        tf_effopt.ScheduleFreeAdamW(warmup_steps=0.5)


def levenshtein(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(
        levenshtein(a[1:], b) + 1,
        levenshtein(a, b[1:]) + 1,
        levenshtein(a[1:], b[1:]) + (a[0] != b[0]),
    )


def test_distance_is_that_of_levenshtein():
    words: list[Any] = ["", "a", "ab", "ba", "abc", "cab", "rho", "name"]
    for a in words:
        for b in words:
            assert distance(a, b, limit=9) == levenshtein(a, b)
            assert distance(a, b, limit=2) == min(3, levenshtein(a, b))
