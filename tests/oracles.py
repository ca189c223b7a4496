"""The rules and stages in NumPy float64, written from their sources.

They share no code with the package: plain loops over plain arrays. Each rule
is a function `(g, state, t, lr, settings) -> step`, which changes `state`.
"""

from __future__ import annotations

import numpy as np


def gradient_descent(g, state, t, lr, settings):
    """Cauchy 1847: theta <- theta - eta * grad J."""
    return -lr * g


def sgd(g, state, t, lr, settings):
    """Sutskever et al. 2013, equations 1 to 4, in Keras's arrangement."""
    mu = settings.get("momentum", 0.0)
    if mu == 0.0:
        return -lr * g
    velocity = mu * state.get("momentum", np.zeros_like(g)) - lr * g
    state["momentum"] = velocity
    if settings.get("nesterov"):
        return mu * velocity - lr * g
    return velocity


def adam(g, state, t, lr, settings):
    """Kingma & Ba 2015, the text before section 2.1 (epsilon-hat)."""
    b1 = settings.get("beta_1", 0.9)
    b2 = settings.get("beta_2", 0.999)
    eps = settings.get("epsilon", 1e-7)
    m = b1 * state.get("momentum", np.zeros_like(g)) + (1.0 - b1) * g
    v = b2 * state.get("velocity", np.zeros_like(g)) + (1.0 - b2) * g * g
    state["momentum"], state["velocity"] = m, v
    denominator = v
    if settings.get("amsgrad"):
        # Reddi et al. 2018, on the uncorrected v.
        denominator = np.maximum(state.get("velocity_hat", np.zeros_like(g)), v)
        state["velocity_hat"] = denominator
    if settings.get("bias_correction", True):
        lr = lr * np.sqrt(1.0 - b2**t) / (1.0 - b1**t)
    return -lr * m / (np.sqrt(denominator) + eps)


def rmsprop(g, state, t, lr, settings):
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


RULES = {
    "GradientDescent": gradient_descent,
    "SGD": sgd,
    "Adam": adam,
    "AdamW": adam,
    "RMSprop": rmsprop,
}


def train(class_name, settings, weights, gradients, learning_rates):
    """Runs a rule with the shared stages around it.

    Args:
        class_name: of `RULES`.
        settings: the optimizer's arguments.
        weights: float64 arrays, one for each tensor.
        gradients: for each micro-step a list of arrays.
        learning_rates: for each micro-step a number.

    Returns:
        `(weights, states, averages)`; `states` are dicts under Keras's names.
    """
    weights = [np.array(w, "float64") for w in weights]
    states = [{} for _ in weights]
    averages = [np.array(w) for w in weights]
    steps = settings.get("gradient_accumulation_steps") or 1
    decay = settings.get("weight_decay")
    if decay is None:
        decay = 0.004 if class_name == "AdamW" else 0.0
    waiting = []
    t = 0
    for gs, lr in zip(gradients, learning_rates, strict=True):
        waiting.append([np.array(g, "float64") for g in gs])
        if len(waiting) < steps:
            continue
        gs = [sum(parts) / steps for parts in zip(*waiting, strict=True)]
        waiting = []
        t += 1
        gs = clipped(gs, settings)
        for i, g in enumerate(gs):
            step = RULES[class_name](g, states[i], t, lr, settings)
            weights[i] = weights[i] - lr * decay * weights[i] + step
        if settings.get("use_ema"):
            beta = settings.get("ema_momentum", 0.99) if t > 1 else 0.0
            averages = [
                beta * a + (1.0 - beta) * w
                for a, w in zip(averages, weights, strict=True)
            ]
            every = settings.get("ema_overwrite_frequency")
            if every and t % every == 0:
                weights = [np.array(a) for a in averages]
    return weights, states, averages


def clipped(gs, settings):
    """Pascanu et al. 2013, algorithm 1, of each tensor or of all."""
    if settings.get("clipvalue"):
        c = settings["clipvalue"]
        return [np.minimum(np.maximum(g, -c), c) for g in gs]
    if settings.get("clipnorm"):
        c = settings["clipnorm"]
        return [g * c / max(c, np.sqrt(np.sum(g * g))) for g in gs]
    if settings.get("global_clipnorm"):
        c = settings["global_clipnorm"]
        norm = np.sqrt(sum(np.sum(g * g) for g in gs))
        return [g * c / max(c, norm) for g in gs]
    return gs
