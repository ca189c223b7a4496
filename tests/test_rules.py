"""Each rule, and each stage around it, against NumPy float64."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from cases import CASES
from golden_certificates import with_signs_of
from oracles import RULES, train

import tf_effopt

pytestmark = pytest.mark.versions

SHAPES = [(3, 4), (), (4097,), (2, 3, 2, 5), (1,)]
NAMES = ["w0", "w1", "bias", "w3", "w4"]  # for patterns in the settings
STEPS = 60
STAGES = [
    {},
    {"weight_decay": 0.05},
    {"clipnorm": 0.5},
    {"clipvalue": 0.3},
    {"global_clipnorm": 1.0, "weight_decay": 0.01},
    {"use_ema": True, "ema_momentum": 0.9},
    {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 7},
    {"gradient_accumulation_steps": 3},
    {"gradient_accumulation_steps": 2, "global_clipnorm": 0.5, "use_ema": True},
    {"loss_scale_factor": 8.0},
]


def problem(seed: int = 0) -> tuple[list, list, list]:
    """Weights, gradients with a zero one among them, and falling rates.

    They drift one way: a float32 tensor of one element that passes near 0 has
    no digits left to compare.
    """
    rng = np.random.default_rng(seed)
    weights = [rng.normal(size=shape) + 9.0 for shape in SHAPES]
    gradients = [
        [(rng.normal(size=shape) + 1) * 10 ** rng.uniform(-1, 1) for shape in SHAPES]
        for _ in range(STEPS)
    ]
    gradients[5] = [np.zeros(shape) for shape in SHAPES]
    rates = [float(np.float32(0.01 * 0.97**i)) for i in range(STEPS)]
    return weights, gradients, rates


def run(optimizer, weights, gradients, rates, dtype="float32"):
    """The optimizer's own trajectory; returns weights, slots and averages."""
    variables = [
        keras.Variable(w, dtype=dtype, name=name)
        for w, name in zip(weights, NAMES, strict=True)
    ]
    scale = optimizer.loss_scale_factor or 1.0
    for gs, rate in zip(gradients, rates, strict=True):
        optimizer.learning_rate = rate
        optimizer.apply(
            [keras.ops.convert_to_tensor((g * scale).astype(dtype)) for g in gs],
            variables,
        )
    slots = [
        {v.name.partition("_")[2]: v.numpy() for v in tensors["rule"].values()}
        for tensors in optimizer._engine.state
    ]
    averages = [
        t["ema"]["average"].numpy() if "ema" in t else None
        for t in optimizer._engine.state
    ]
    return [v.numpy() for v in variables], slots, averages


def assert_near(actual, expected, bound, what):
    norm = np.linalg.norm(np.ravel(expected))
    error = np.linalg.norm(np.ravel(np.asarray(actual, "float64") - expected))
    assert error <= bound * norm, f"{what}: {error / norm:.2e} of its norm"


def settings_of(case) -> dict:
    return dict(case.make.keywords)


# The stages are the same code for every rule: all of them with Adam, alone, and
# several at once with each other. (Rules without any: test_golden.py.)
COMBINATIONS = [
    (case, stages)
    for case in CASES
    for stages in STAGES
    if case.name == "adam" or stages in (STAGES[4], STAGES[8])
]


@pytest.mark.representatives(
    "adam-*",
    "*[aornw]-global_clipnorm+weight_decay",
    "muon-gradient_accumulation_steps*",
)
@pytest.mark.parametrize(
    ("case", "stages"),
    COMBINATIONS,
    ids=[f"{case.name}-{'+'.join(stages) or 'plain'}" for case, stages in COMBINATIONS],
)
def test_follows_its_source(case, stages):
    weights, gradients, rates = problem()
    gradients = [[g.astype("float32") for g in gs] for gs in gradients]
    weights = [w.astype("float32") for w in weights]
    class_name = case.make.func.__name__
    settings = settings_of(case) | stages
    expected = train(class_name, settings, weights, gradients, rates, NAMES)
    actual = run(case.make(**stages), weights, gradients, rates)
    for i, shape in enumerate(SHAPES):
        assert_near(actual[0][i], expected[0][i], 1e-6, f"weight {shape}")
        assert set(actual[1][i]) == set(expected[1][i])
        for name, slot in expected[1][i].items():
            ours = with_signs_of(slot, actual[1][i][name], name)
            assert_near(ours, slot, 1e-6, f"{name} {shape}")
        if stages.get("use_ema"):
            assert_near(actual[2][i], expected[2][i], 1e-6, f"average {shape}")


def test_every_public_optimizer_is_in_the_table():
    public = {
        name
        for name in tf_effopt.__all__
        if isinstance(getattr(tf_effopt, name), type)
        and issubclass(getattr(tf_effopt, name), tf_effopt.Optimizer)
        and name != "Optimizer"
    }
    assert public == {case.make.func.__name__ for case in CASES}
    assert public == set(RULES)


def test_adam_without_bias_correction_is_the_printed_rule():
    """Section 3.2.5 of the article, to the symbol."""
    rng = np.random.default_rng(1)
    theta = rng.normal(size=5)
    m = v = np.zeros(5)
    w = keras.Variable(theta, dtype="float32")
    optimizer = tf_effopt.Adam(learning_rate=0.01, bias_correction=False, epsilon=1e-8)
    for _ in range(30):
        g = rng.normal(size=5).astype("float32")
        m = 0.9 * m + (1 - 0.9) * g
        v = 0.999 * v + (1 - 0.999) * g.astype("float64") ** 2
        theta = theta - 0.01 * m / (np.sqrt(v) + 1e-8)
        optimizer.apply([keras.ops.convert_to_tensor(g)], [w])
    assert_near(w.numpy(), theta, 1e-6, "theta")
