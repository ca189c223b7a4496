"""Adafactor."""

from __future__ import annotations

import numpy as np


def rms(x):
    """The root of the mean square of all elements."""
    return np.sqrt(np.mean(x * x))


def adafactor(g, w, state, t, lr, settings):
    """Shazeer & Stern 2018, algorithms 4 to 6.

    `g` is factored over its two longest axes, the later ones among equals, if
    both have more than one element; "row" lacks the second of them, "column"
    the first. The paper's relative step is `min(1e-2, 1/sqrt(t))`: the learning rate
    stands for its 1e-2. Alpha is of the weight before the step and its decay.
    """
    eps_1 = settings.get("epsilon_1", 1e-30)
    eps_2 = settings.get("epsilon_2", 1e-3)
    threshold = settings.get("clip_threshold", 1.0)
    rho = lr
    if settings.get("relative_step", True):
        rho = min(lr, 1.0 / np.sqrt(t))
    alpha = max(eps_2, rms(w)) * rho
    beta_2 = 1.0 - t ** settings.get("beta_2_decay", -0.8)
    q = g * g + eps_1
    axes = factored(g.shape)
    if axes:
        a, b = axes
        rows, columns = np.mean(q, axis=b), np.mean(q, axis=a)
        r = beta_2 * state.get("row", np.zeros_like(rows)) + (1.0 - beta_2) * rows
        c = beta_2 * state.get("column", np.zeros_like(columns))
        c = c + (1.0 - beta_2) * columns
        state["row"], state["column"] = r, c
        r, c = np.expand_dims(r, b), np.expand_dims(c, a)
        v = r * c / np.mean(r, axis=a, keepdims=True)
    else:
        v = beta_2 * state.get("velocity", np.zeros_like(g)) + (1.0 - beta_2) * q
        state["velocity"] = v
    u = g / np.sqrt(v)
    return -alpha * u / max(1.0, rms(u) / threshold)


def factored(shape):
    """The two axes; None for vectors, whose one factor is the moment itself."""
    if len(shape) < 2:
        return None
    a, b = sorted(np.argsort(shape, kind="stable")[-2:])
    return (a, b) if shape[a] > 1 and shape[b] > 1 else None
