"""What a program for a TPU does differently: the same numbers, on this machine."""

from __future__ import annotations

import dataclasses
import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import CASES, STAGES, by_name

from tf_effopt import Adam, AdamW, Group
from tf_effopt.engine import gradients, stacks

pytestmark = pytest.mark.fresh_programs

SHAPES = {
    "scale_0": (8,),
    "kernel": (4, 8),
    "scale_1": (8,),
    "large": (2, 4, 8),
    "scale_2": (8,),
    "temperature": (),
    "other_kernel": (4, 8),
    "limit": (),
    "wide": (33,),
    "also_wide": (33,),
}


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    """Small ones: `large` is large, and `wide` isn't small."""
    monkeypatch.setattr(gradients, "LARGE", 64)
    monkeypatch.setattr(stacks, "SMALL", 32)


def train(make_optimizer, for_tpu, steps=5, spoils=None, dtype="float32"):
    """Weights, state, and how many steps were skipped; `spoils` spoil a step each."""
    rng = np.random.default_rng(0)
    weights = [
        keras.Variable(rng.normal(size=shape), name=name, dtype=dtype)
        for name, shape in SHAPES.items()
    ]
    optimizer = make_optimizer()
    optimizer.build(weights)
    engine = optimizer._engine
    engine.plan = dataclasses.replace(engine.plan, is_for_tpu=for_tpu)
    for spoil in spoils or [None] * steps:
        received = {n: rng.normal(size=s).astype("float32") for n, s in SHAPES.items()}
        if spoil is not None:
            spoil(received)
        optimizer.apply([tf.constant(g, dtype) for g in received.values()])
    state = [v.numpy().astype("float64") for v in [*weights, *optimizer.variables]]
    return state, optimizer.skipped_steps


def compare(make_optimizer, **options):
    one, skipped = train(make_optimizer, for_tpu=False, **options)
    other, also_skipped = train(make_optimizer, for_tpu=True, **options)
    assert skipped == also_skipped
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)
    return skipped


@pytest.mark.representatives("adam", "adafactor", "muon")
@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_the_rules_do_the_same(case):
    assert compare(case.make) == 0


OPTIONS = [
    lambda: {"clipnorm": 0.5},
    lambda: {"clipvalue": 0.1},
    lambda: {"global_clipnorm": 0.5},
    lambda: {"gradient_accumulation_steps": 2},
    lambda: {"gradient_accumulation_steps": 2, "global_clipnorm": 0.5},
    lambda: {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2},
    lambda: {"loss_scale_factor": 8.0},
    lambda: {"groups": [Group("scale_1", learning_rate_multiplier=0.1)]},
    lambda: {
        "groups": [
            Group("scale_0", frozen=True),
            Group(["kernel", "other_kernel"], weight_decay=0.5),
        ]
    },
    *STAGES.values(),
]


@pytest.mark.representatives("{'global_clipnorm*", "*steps': 2, *", "*scale_1*")
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: str(options()))
def test_options_do_the_same(options):
    def make():
        optimizer = AdamW(0.01, weight_decay=0.1, **options())
        optimizer.exclude_from_weight_decay(var_names=["scale_2"])
        return optimizer

    compare(make)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtypes_do_the_same(dtype):
    compare(lambda: Adam(0.01), dtype=dtype)


@pytest.mark.parametrize("options", [{}, {"global_clipnorm": 1.0}], ids=str)
def test_a_step_that_is_not_finite_changes_nothing(options):
    def spoil(name, value):
        def put(received):
            received[name].reshape(-1)[-1] = value

        return put

    def both_signs(received):
        received["large"][0, :2, 3] = [np.inf, -np.inf]

    def cancelled(received):
        received["large"][1, :2, 3] = [2e38, -2e38]

    names = ["scale_1", "temperature", "kernel", "large", "wide"]
    values = [np.nan, np.inf, -np.inf, 2e19, -2e19]
    bad = [spoil(name, value) for name in names for value in values[:3]]
    large = [spoil(name, value) for name in names for value in values[3:]]
    large.append(cancelled)
    bad.append(both_signs)
    if not options:
        bad += large  # Else they are finite once they are clipped.
    spoils = [None] + [x for one in bad for x in (one, None)]
    assert compare(lambda: Adam(0.01, **options), spoils=spoils) == len(bad)


def test_a_large_gradient_is_no_infinite_one():
    def row(received):
        received["large"][0, 0, :] = 1e18

    assert compare(lambda: Adam(0.01), spoils=[None, row, None]) == 0


def test_what_is_trained_alike_is_stacked():
    shapes = []

    class Spied(Adam):
        @staticmethod
        @functools.wraps(Adam.rule)
        def rule(g, slots, **arguments):
            shapes.append(tuple(g.shape))
            return Adam.rule(g, slots, **arguments)

    train(lambda: Spied(0.01), for_tpu=False, steps=1)
    assert [shapes.count(s) for s in [(8,), (4, 8), (33,)]] == [3, 2, 2]
    shapes.clear()
    train(lambda: Spied(0.01), for_tpu=True, steps=1)
    assert [shapes.count(s) for s in [(8,), (4, 8), (33,)]] == [1, 1, 2]
