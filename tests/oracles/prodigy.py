"""Prodigy."""

from __future__ import annotations

import numpy as np


def prodigy(gs, ws, states, shared, t, lr, settings):
    """Mishchenko & Defazio 2023 (arXiv:2306.06101), algorithm 4.

    With its authors' code: both sums carry d/d0 and lack the paper's factor
    1 - sqrt(beta_2), which cancel in their quotient; epsilon is times the new
    d where the paper has the one of the moments; the decay is times d * lr.
    Their code doesn't count a step before which all gradients were 0.
    """
    b1 = settings.get("beta_1", 0.9)
    b2 = settings.get("beta_2", 0.999)
    eps = settings.get("epsilon", 1e-8)
    decay = settings.get("weight_decay") or 0.0
    d0 = settings.get("initial_estimate", 1e-6)
    d = shared.get("estimate", d0)
    dlr = d * lr
    if settings.get("bias_correction"):
        dlr = dlr * np.sqrt(1.0 - b2**t) / (1.0 - b1**t)
    share = d if settings.get("safeguard_warmup") else dlr
    numerator = np.sqrt(b2) * shared.get("estimate_numerator", 0.0)
    denominator = 0.0
    for g, w, state in zip(gs, ws, states, strict=True):
        zeros = np.zeros_like(g)
        initial = state.setdefault("initial", w)
        numerator += d / d0 * dlr * np.sum(g * (initial - w))
        state["momentum"] = b1 * state.get("momentum", zeros) + (1.0 - b1) * d * g
        v = b2 * state.get("velocity", zeros) + (1.0 - b2) * d * d * g * g
        state["velocity"] = v
        s = np.sqrt(b2) * state.get("gradient_sum", zeros) + d / d0 * share * g
        state["gradient_sum"] = s
        denominator += np.sum(np.abs(s))
    shared["estimate_numerator"] = numerator
    shared["estimate"] = d
    if denominator > 0:
        found = settings.get("estimate_coefficient", 1.0) * numerator / denominator
        shared["estimate"] = max(d, found)
    return [
        -dlr
        * state["momentum"]
        / (np.sqrt(state["velocity"]) + shared["estimate"] * eps)
        - decay * dlr * w
        for w, state in zip(ws, states, strict=True)
    ]
