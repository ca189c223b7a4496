"""Every optimizer, and every transform with Adam, reaches the optimum of small problems.

The problems are those of Optax's tests. What is found here is a rule that goes
wrong in the long run, such as a wrong sign; a wrong pace, such as a missing bias
correction, is found by `test_rules.py` and `test_golden.py`, which look at each step.
"""

from __future__ import annotations

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import CASES, TRANSFORMS

import tf_effopt

# Name -> where it starts, and its optimum.
PROBLEMS = {
    "parabola": ([-1.0, 10.0, 1.0], [1.0, -1.0, 1.0]),
    "rosenbrock": ([0.0, 0.0], [1.0, 1.0]),
    "matrix_parabola": ([[0.0, 0.0], [0.0, 0.0]], [[3.0, -2.0], [1.0, 4.0]]),
}
STEPS = 20000
# It falls to 0 along a cosine: several rules take steps of a constant size.
RATE = 0.03
OTHER_RATES = {
    # Without a scale of its own, it must be below 2 / 1002, twice the inverse of
    # the largest curvature.
    ("gradient_descent", "rosenbrock"): 0.0015,
    ("sgd", "rosenbrock"): 0.0015,
    ("nesterov", "rosenbrock"): 0.001,
    # It finds the rate, from any start.
    **{("prodigy", problem): 1.0 for problem in PROBLEMS},
}
SETTINGS = {"prodigy": {"initial_estimate": 1e-6}}
# What has a schedule of its own gets a number.
CONSTANT = {"adafactor": 0.03, "schedule_free_adamw": 0.05}


def loss(problem: str, w: tf.Tensor) -> tf.Tensor:
    if problem == "rosenbrock":
        return (1.0 - w[0]) ** 2 + 100.0 * (w[1] - w[0] ** 2) ** 2
    return tf.reduce_sum((w - PROBLEMS[problem][1]) ** 2)


def rate_for(name: str, problem: str):
    if name in CONSTANT:
        return CONSTANT[name]
    rate = OTHER_RATES.get((name, problem), RATE)
    return keras.optimizers.schedules.CosineDecay(rate, STEPS)


def trained(optimizer: tf_effopt.Optimizer, problem: str) -> np.ndarray:
    """Where all steps, in one compiled loop, lead to."""
    w = keras.Variable(PROBLEMS[problem][0], dtype="float32", name="w")
    optimizer.build([w])

    @tf.function(jit_compile=True)
    def train():
        for _ in tf.range(STEPS):
            with tf.GradientTape() as tape:
                value = loss(problem, w.value)
            optimizer.apply([tape.gradient(value, w.value)], [w])

    train()
    optimizer.use_evaluation_weights()
    return w.numpy()


@pytest.mark.representatives("*-parabola")
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("case", CASES, ids=cases.by_name)
def test_optimizer_reaches_it(case, problem):
    optimizer = case.make(
        learning_rate=rate_for(case.name, problem),
        weight_decay=0.0,  # or it moves the optimum
        **SETTINGS.get(case.name, {}),
    )
    w = trained(optimizer, problem)
    np.testing.assert_allclose(w, PROBLEMS[problem][1], rtol=3e-2)


@pytest.mark.representatives("*-parabola")
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_adam_with_transform_reaches_it(name, problem):
    optimizer = tf_effopt.Adam(
        rate_for("adam", problem), transforms=[TRANSFORMS[name]()]
    )
    optimum = np.array(PROBLEMS[problem][1])
    if name == "gradient_centralization" and optimum.ndim == 2:
        # The nearest to it with the sums of the start, output by output.
        optimum = optimum - optimum.mean(axis=0)
    w = trained(optimizer, problem)
    np.testing.assert_allclose(w, optimum, rtol=3e-2)
