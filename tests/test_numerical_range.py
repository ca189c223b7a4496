"""Finite gradients of any size and form make no number that isn't finite."""

from __future__ import annotations

import keras
import numpy as np
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
