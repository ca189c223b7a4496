"""Gradient descent and its scaled forms, and Lion."""

from __future__ import annotations

import numpy as np


def gradient_descent(g, w, state, t, lr, settings):
    """Cauchy 1847: theta <- theta - eta * grad J."""
    return -lr * g


def sgd(g, w, state, t, lr, settings):
    """Sutskever et al. 2013, equations 1 to 4, in Keras's arrangement."""
    mu = settings.get("momentum", 0.0)
    if mu == 0.0:
        return -lr * g
    velocity = mu * state.get("momentum", np.zeros_like(g)) - lr * g
    state["momentum"] = velocity
    if settings.get("nesterov"):
        return mu * velocity - lr * g
    return velocity


def rmsprop(g, w, state, t, lr, settings):
    """Tieleman & Hinton 2012; centered: Graves 2013, equations 38 to 45."""
    rho = settings.get("rho", 0.9)
    mu = settings.get("momentum", 0.0)
    eps = settings.get("epsilon", 1e-7)
    v = rho * state.get("velocity", np.zeros_like(g)) + (1.0 - rho) * g * g
    state["velocity"] = v
    if settings.get("centered"):
        mean = rho * state.get("average_gradient", np.zeros_like(g)) + (1.0 - rho) * g
        state["average_gradient"] = mean
        v = v - mean * mean
    step = lr * g / np.sqrt(v + eps)
    if mu:
        step = mu * state.get("momentum", np.zeros_like(g)) + step
        state["momentum"] = step
    return -step


def lion(g, w, state, t, lr, settings):
    """Chen et al. 2023, algorithm 2; a coordinate with c = 0 stays."""
    b1 = settings.get("beta_1", 0.9)
    b2 = settings.get("beta_2", 0.99)
    m = state.get("momentum", np.zeros_like(g))
    c = b1 * m + (1.0 - b1) * g
    state["momentum"] = b2 * m + (1.0 - b2) * g
    return -lr * np.sign(c)
