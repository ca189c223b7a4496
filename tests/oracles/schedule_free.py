"""Schedule-free AdamW."""

from __future__ import annotations

import numpy as np


def schedule_free_adamw(gs, ws, states, shared, t, lr, settings):
    """Defazio et al. 2024 (arXiv:2405.15682), algorithm 1.

    The weights are its y, the state `momentum` is its z; the averages x, to
    evaluate at, are `shared["averages"]`. As in its authors' package: v is
    bias-corrected where the paper corrects gamma (the package's class "Paper"
    does so); a step of the average weighs the square of the largest rate so
    far, where the paper has the square of the rate; the decay is of y.
    """
    b1 = settings.get("beta_1", 0.9)
    b2 = settings.get("beta_2", 0.999)
    eps = settings.get("epsilon", 1e-8)
    decay = settings.get("weight_decay") or 0.0
    warmup = settings.get("warmup_steps", 0)
    gamma = lr * min(1.0, t / warmup) if warmup else lr
    shared["largest_rate"] = max(shared.get("largest_rate", 0.0), gamma)
    weight = shared["largest_rate"] ** 2
    shared["weight_sum"] = shared.get("weight_sum", 0.0) + weight
    c = weight / shared["weight_sum"]
    averages = shared.get("averages", ws)
    steps, shared["averages"] = [], []
    for g, y, x, state in zip(gs, ws, averages, states, strict=True):
        z = state.get("momentum", y)
        v = b2 * state.get("velocity", np.zeros_like(g)) + (1.0 - b2) * g * g
        z = z - gamma * (g / (np.sqrt(v / (1.0 - b2**t)) + eps) + decay * y)
        x = (1.0 - c) * x + c * z
        state.update(momentum=z, velocity=v)
        shared["averages"].append(x)
        steps.append((1.0 - b1) * z + b1 * x - y)
    return steps
