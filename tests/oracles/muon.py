"""Muon and its orthogonalization."""

from __future__ import annotations

import numpy as np

from .adam import adam

# Jordan et al. 2024, five times the same.
JORDAN = [(3.4445, -4.7750, 2.0315)] * 5
# Amsel et al. 2025 (arXiv:2505.16932), five steps, made with a 2 % margin.
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
# Name -> coefficients, and how much larger than the norm the divisor is.
TABLES = {"newton_schulz": (JORDAN, 1.0), "polar_express": (POLAR_EXPRESS, 1.02)}


def newton_schulz(x, coefficients, margin=1.0):
    """Nearly the polar factor of the matrix `x`, by odd quintics in it.

    Jordan et al. 2024: X <- a X + (b A + c A A) X with A = X X^T, on the wide
    one of `x` and its transpose. The norm is at least 1e-7, as in PyTorch's
    Muon (Jordan adds that to it).
    """
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / max(margin * np.sqrt(np.sum(x * x)), 1e-7)
    for a, b, c in coefficients:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def muon(g, w, state, t, lr, settings):
    """Jordan et al. 2024 (kellerjordan.github.io/posts/muon), for a matrix.

    SparseRows are inputs: `scale="original"` is sqrt(max(1, columns / rows)).
    "match_rms_adamw" is Liu et al. 2025 (arXiv:2502.16982), equation 4. The
    momentum is a sum, as in the post's algorithm; Jordan's code takes the mean,
    in the same direction. What isn't a matrix is left to AdamW.
    """
    if g.ndim != 2:
        decay = settings.get("adam_weight_decay", 0.004) or 0.0
        return adam(g, w, state, t, lr, {}) - lr * decay * w
    decay = settings.get("weight_decay", 0.004) or 0.0
    mu = settings.get("momentum", 0.95)
    m = mu * state.get("momentum", np.zeros_like(g)) + g
    state["momentum"] = m
    if settings.get("nesterov", True):
        m = mu * m + g
    coefficients, margin = TABLES[settings.get("iteration", "newton_schulz")]
    rows, columns = g.shape
    scale = {
        "original": np.sqrt(max(1.0, columns / rows)),
        "match_rms_adamw": 0.2 * np.sqrt(max(rows, columns)),
    }[settings.get("scale", "match_rms_adamw")]
    return -lr * (scale * newton_schulz(m, coefficients, margin) + decay * w)
