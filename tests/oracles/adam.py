"""Adam, the two that change its first steps, and Yogi."""

from __future__ import annotations

import numpy as np


def moments(g, state, b1, b2):
    """Kingma & Ba 2015, algorithm 1: the biased moments, kept in `state`."""
    m = b1 * state.get("momentum", np.zeros_like(g)) + (1.0 - b1) * g
    v = b2 * state.get("velocity", np.zeros_like(g)) + (1.0 - b2) * g * g
    state["momentum"], state["velocity"] = m, v
    return m, v


def adam(g, w, state, t, lr, settings):
    """Kingma & Ba 2015, the text before section 2.1 (epsilon-hat)."""
    b1 = settings.get("beta_1", 0.9)
    b2 = settings.get("beta_2", 0.999)
    eps = settings.get("epsilon", 1e-7)
    m, v = moments(g, state, b1, b2)
    denominator = v
    if settings.get("amsgrad"):
        # Reddi et al. 2018, on the uncorrected v.
        denominator = np.maximum(state.get("velocity_hat", np.zeros_like(g)), v)
        state["velocity_hat"] = denominator
    if settings.get("bias_correction", True):
        lr = lr * np.sqrt(1.0 - b2**t) / (1.0 - b1**t)
    return -lr * m / (np.sqrt(denominator) + eps)


def nadam(g, w, state, t, lr, settings):
    """Dozat 2016, algorithm 2, with a beta_1 that grows, as in Keras.

    mu_t = beta_1 (1 - 0.96**(psi t) / 2). Keras takes psi = 1 where Dozat has
    1/250, and keeps the plain m of Adam where Dozat decays it by mu_t. Its
    epsilon is outside the root, after the correction of v.
    """
    b1 = settings.get("beta_1", 0.9)
    b2 = settings.get("beta_2", 0.999)
    eps = settings.get("epsilon", 1e-7)
    m, v = moments(g, state, b1, b2)
    product = 1.0
    for i in range(1, t + 1):
        mu = b1 * (1.0 - 0.5 * 0.96**i)
        product *= mu
    mu_next = b1 * (1.0 - 0.5 * 0.96 ** (t + 1))
    m_hat = mu_next * m / (1.0 - product * mu_next) + (1.0 - mu) * g / (1.0 - product)
    v_hat = v / (1.0 - b2**t)
    return -lr * m_hat / (np.sqrt(v_hat) + eps)


def radam(g, w, state, t, lr, settings):
    """Liu et al. 2019, algorithm 2, with its authors' code's two changes.

    They rectify from rho_t = 5 on where the paper says above 4 (with beta_2 =
    0.999: from step 6, not 5); and they add an epsilon, which the paper
    lacks, to the uncorrected sqrt(v). Before that, the step is along the
    corrected m.
    """
    b1 = settings.get("beta_1", 0.9)
    b2 = settings.get("beta_2", 0.999)
    eps = settings.get("epsilon", 1e-8)
    m, v = moments(g, state, b1, b2)
    m_hat = m / (1.0 - b1**t)
    rho_inf = 2.0 / (1.0 - b2) - 1.0
    rho = rho_inf - 2.0 * t * b2**t / (1.0 - b2**t)
    if rho >= 5.0:
        r = np.sqrt(
            (rho - 4.0)
            * (rho - 2.0)
            * rho_inf
            / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho)
        )
        return -lr * r * np.sqrt(1.0 - b2**t) * m_hat / (np.sqrt(v) + eps)
    return -lr * m_hat


def yogi(g, w, state, t, lr, settings):
    """Zaheer et al. 2018, algorithm 2; the correction is TensorFlow Addons'.

    It is a factor of the learning rate, which leaves epsilon uncorrected. m
    starts at 0.
    """
    b1 = settings.get("beta_1", 0.9)
    b2 = settings.get("beta_2", 0.999)
    eps = settings.get("epsilon", 1e-3)
    m = b1 * state.get("momentum", np.zeros_like(g)) + (1.0 - b1) * g
    start = np.full_like(g, settings.get("initial_accumulator_value", 1e-6))
    v = state.get("velocity", start)
    v = v + (1.0 - b2) * np.where(v < g * g, g * g, np.where(v > g * g, -g * g, 0.0))
    state["momentum"], state["velocity"] = m, v
    if settings.get("bias_correction", True):
        lr = lr * np.sqrt(1.0 - b2**t) / (1.0 - b1**t)
    return -lr * m / (np.sqrt(v) + eps)
