"""Finite gradients of any size and form make no number that isn't finite."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_effopt


def test_adafactor_takes_a_row_and_a_column_of_zeros():
    g = np.ones((40, 30), "float32")
    g[0] = 0
    g[:, 0] = 0
    w = keras.Variable(np.ones((40, 30), "float32"))
    tf_effopt.Adafactor(1e-3).apply([tf.constant(g)], [w])
    # Shazeer & Stern, algorithm 4 at t = 1, in float64.
    q = g.astype("float64") ** 2 + 1e-30
    v = np.outer(q.mean(1), q.mean(0)) / q.mean()
    u = g / np.sqrt(v)
    expected = 1 - 1e-3 * u / max(1, np.sqrt(np.mean(u**2)))
    np.testing.assert_allclose(w.numpy(), expected, rtol=1e-6)


def test_adafactor_factors_a_matrix_of_two_by_two():
    w = keras.Variable([[1.0, 2.0], [3.0, 4.0]])
    tf_effopt.Adafactor(0.5).apply([tf.constant([[1.0, 6.0], [7.0, 2.0]])], [w])
    # torch.optim.Adafactor, lr=0.5, of the same.
    expected = [[0.7007, -0.0081], [1.2492, 3.4407]]
    np.testing.assert_allclose(w.numpy(), expected, atol=1e-4)


def test_after_a_skipped_step_what_is_not_finite_is_named():
    kernel, bias = (keras.Variable([1.0], name=name) for name in ("kernel", "bias"))
    optimizer = tf_effopt.Adam(0.1)
    gradients = [tf.constant([1.0]), tf.constant([np.nan])]
    optimizer.apply(gradients, [kernel, bias])
    assert "not finite" not in optimizer.describe()
    with pytest.warns(UserWarning, match="division by zero"):
        optimizer.finalize_variable_values([kernel, bias])
    kernel.assign([np.inf])
    optimizer.variables[-1].assign([np.nan])
    optimizer.apply(gradients)
    lines = optimizer.describe().splitlines()[-2:]
    slot = optimizer.variables[-1].path
    assert lines == ["not finite: kernel", f"not finite: {slot}"]
    with pytest.warns(UserWarning, match=f"aren't finite.*kernel, {slot}"):
        optimizer.finalize_variable_values([kernel, bias])
