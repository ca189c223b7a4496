"""Finite gradients whose squares overflow are clipped; others skip the step."""

from __future__ import annotations

import dataclasses
import math

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_effopt
from tf_effopt.transforms import AdaptiveClipping, ZClip

CLIPS = ("clipvalue", "clipnorm", "global_clipnorm")
LIMITS = (0.5, 1e-5, 1e10, 1e30)
SIZES = (1.0, 1e18, 1e20, 3e38)
LARGEST_SQUARE = 3.4028234e38


def gradients(size: float) -> list[np.ndarray]:
    """Large and small tensors side by side."""
    values = [size, -size, 5.0], [[0.1, 7.0]], 3.0, [size]
    return [np.array(x, "float32") for x in values]


def clipped(gs: list[np.ndarray], kind: str, limit: float) -> list[np.ndarray]:
    """In float64."""
    gs = [np.asarray(g, "float64") for g in gs]
    if kind == "clipvalue":
        return [np.clip(g, -limit, limit) for g in gs]
    norms = [math.hypot(*g.ravel()) for g in gs]  # which squares nothing
    if kind == "global_clipnorm":
        norms = [math.hypot(*norms)] * len(gs)
    return [g * min(1, limit / n) for g, n in zip(gs, norms, strict=True)]


def step(gs, dtype="float32", for_tpu=False, start=0.0, **options):
    """The weights after one update of gradient descent, and the optimizer."""
    weights = [keras.Variable(np.full_like(g, start), dtype=dtype) for g in gs]
    optimizer = tf_effopt.SGD(1.0, **options)
    optimizer.build(weights)
    engine = optimizer._engine
    engine.plan = dataclasses.replace(engine.plan, is_for_tpu=for_tpu)
    optimizer.apply([tf.constant(g, dtype) for g in gs])
    return [w.numpy() for w in weights], optimizer


def assert_near(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("for_tpu", [False, True])
@pytest.mark.parametrize("kind", CLIPS)
def test_large_gradients_are_clipped(kind, for_tpu):
    options = {kind: LIMITS[0]}
    weights = [keras.Variable(np.zeros_like(g)) for g in gradients(1.0)]
    optimizer = tf_effopt.SGD(1.0, **options)
    optimizer.build(weights)
    engine = optimizer._engine
    engine.plan = dataclasses.replace(engine.plan, is_for_tpu=for_tpu)
    skipped = 0
    for limit in LIMITS:  # One program for all.
        setattr(optimizer, kind, limit)
        for size in SIZES:
            gs = gradients(size)
            expected = [-g for g in clipped(gs, kind, limit)]
            squares = sum(np.sum(x**2) for x in expected)
            for w in weights:
                w.assign(np.zeros(w.shape))
            optimizer.apply([tf.constant(g) for g in gs])
            found = [w.numpy() for w in weights]
            if squares < LARGEST_SQUARE:
                assert_near(found, expected)
            else:
                skipped += 1
                assert not any(w.any() for w in found)
    assert skipped > 0
    assert optimizer.skipped_steps == skipped


@pytest.mark.parametrize("kind", CLIPS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_skipped(kind, value):
    gs = gradients(1e30)
    gs[1][0, 1] = value
    found, optimizer = step(gs, **{kind: 0.5})
    assert not any(w.any() for w in found)
    assert optimizer.skipped_steps == 1


def test_without_clipping_a_large_gradient_is_skipped():
    found, optimizer = step(gradients(1e20))
    assert not any(w.any() for w in found)
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("kind", CLIPS)
def test_dtypes(kind):
    expected = [-g for g in clipped(gradients(1e30), kind, 0.5)]
    found, _ = step(gradients(1e30), "float64", **{kind: 0.5})
    assert_near(found, expected)
    found, _ = step(gradients(1e30), "bfloat16", **{kind: 0.5})
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.astype("float64"), b, rtol=2e-2, atol=1e-37)
    # Both in one model: what overflows in one fits the other.
    gs = [*gradients(1e30), np.array([1e200, 2.0])]
    dtypes = ["float32"] * 4 + ["float64"]
    weights = [keras.Variable(np.zeros_like(g, d), dtype=d) for g, d in zip(gs, dtypes)]
    optimizer = tf_effopt.SGD(1.0, **{kind: 0.5})
    optimizer.apply([tf.constant(g, d) for g, d in zip(gs, dtypes)], weights)
    expected = [-g for g in clipped(gs, kind, 0.5)]
    assert_near([w.numpy() for w in weights], expected)


@pytest.mark.parametrize("kind", CLIPS)
def test_accumulated(kind):
    weights = [keras.Variable(np.zeros_like(g)) for g in gradients(1.0)]
    optimizer = tf_effopt.SGD(1.0, gradient_accumulation_steps=2, **{kind: 0.5})
    for size in (1e25, 1.0):
        optimizer.apply([tf.constant(g) for g in gradients(size)], weights)
    mean = [(a + b) / 2 for a, b in zip(gradients(1e25), gradients(1.0), strict=True)]
    assert_near([w.numpy() for w in weights], [-g for g in clipped(mean, kind, 0.5)])
    # Two that are finite with a sum that isn't: the second is left out.
    for size in (3e38, 3e38, 1.0):
        optimizer.apply([tf.constant(g) for g in gradients(size)], weights)
    assert optimizer.skipped_steps == 1
    assert int(optimizer.iterations) == 2


def test_unscaled_first():
    gs = [g * 8 for g in gradients(1e30)]
    found, _ = step(gs, clipnorm=0.5, loss_scale_factor=8.0)
    assert_near(found, [-g for g in clipped(gradients(1e30), "clipnorm", 0.5)])


def test_rows():
    table = keras.Variable(np.zeros((5, 2)))
    optimizer = tf_effopt.SGD(1.0, clipnorm=0.5, lazy=True)
    values = np.array([[3e30, 0], [1e30, 0], [0, 3e30]], "float32")
    rows = tf.IndexedSlices(
        tf.constant(values), tf.constant([1, 1, 4]), tf.constant([5, 2])
    )
    optimizer.apply([rows], [table])
    expected = np.zeros((5, 2))
    expected[1, 0], expected[4, 1] = -0.4, -0.3
    np.testing.assert_allclose(table.numpy(), expected, rtol=1e-5)


def test_what_is_still_too_large_is_skipped():
    gs = gradients(1e30)
    found, optimizer = step(gs, global_clipnorm=1e25)
    assert optimizer.skipped_steps == 1
    assert not any(w.any() for w in found)


@pytest.mark.parametrize("size", SIZES)
def test_adaptive_clipping(size):
    """Each unit by its norm, small ones beside large ones."""
    g = np.array([[size, 1.0, 1e-4], [-size, 2.0, 1e-4], [5.0, 3.0, 0.0]], "float32")
    bias = np.array([size, 2.0], "float32")
    found, _ = step([g, bias], start=2.0, transforms=[AdaptiveClipping(0.1)])
    expected = []
    for x in (g.astype("float64"), bias.astype("float64")):
        norm = np.sqrt(np.sum(x**2, axis=0))
        largest = 0.1 * np.sqrt(np.sum(np.full_like(x, 2.0) ** 2, axis=0))
        expected.append(2 - x * np.minimum(1, largest / norm))
    assert_near(found, expected)


def test_adaptive_clipping_leaves_what_is_excluded():
    w, b = keras.Variable([[1.0]], name="kernel"), keras.Variable([1.0], name="bias")
    transforms = [AdaptiveClipping(0.1, exclude=["bias"])]
    optimizer = tf_effopt.SGD(1.0, transforms=transforms)
    optimizer.apply([tf.constant([[1e30]]), tf.constant([1e30])], [w, b])
    assert optimizer.skipped_steps == 1
    optimizer.apply([tf.constant([[1e30]]), tf.constant([0.5])], [w, b])
    np.testing.assert_allclose([w.numpy()[0, 0], b.numpy()[0]], [0.9, 0.5], rtol=1e-6)


@pytest.mark.parametrize("size", [1e10, 1e25, 3e38])
def test_zclip(size):
    """In its warm-up it clips nothing; then a spike comes out near the mean."""
    w = keras.Variable(np.zeros(2, "float32"))
    zclip = ZClip(z_threshold=2.0, decay=0.9, warmup_steps=3)
    optimizer = tf_effopt.SGD(1.0, transforms=[zclip])
    optimizer.apply([tf.constant([size, size])], [w])
    assert optimizer.skipped_steps == (size > 1e19)
    w.assign([0.0, 0.0])
    optimizer = tf_effopt.SGD(1.0, transforms=[ZClip(2.0, 0.9, warmup_steps=3)])
    norms = [1.0, 2.0, 3.0]
    for norm in norms:
        optimizer.apply([tf.constant([norm, 0.0])], [w])
    w.assign([0.0, 0.0])
    optimizer.apply([tf.constant([size, -size])], [w])
    norm = size * np.sqrt(2.0)
    mean, deviation = np.mean(norms), np.std(norms)
    z = (norm - mean) / (deviation + 1e-6)
    length = mean + 2.0 * deviation * 2.0 / z
    expected = -length * np.array([1, -1]) / np.sqrt(2)
    np.testing.assert_allclose(w.numpy(), expected, rtol=1e-5)
    assert optimizer.skipped_steps == 0


def test_one_clips_after_the_other():
    w = keras.Variable([3.0, 4.0])
    transforms = [AdaptiveClipping(0.1), ZClip(2.0, 0.9, warmup_steps=3)]
    optimizer = tf_effopt.SGD(1.0, transforms=transforms)
    for _ in range(4):
        optimizer.apply([tf.constant([1e30, 0.0])], [w])
    assert optimizer.skipped_steps == 0
    assert abs(transforms[1].slot("mean") - 0.5) < 0.1
