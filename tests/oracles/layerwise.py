"""The rules that scale a tensor's step to its norm.

`adapts` says whether they do so for this tensor.
"""

from __future__ import annotations

import numpy as np

from .adam import moments


def norm(x):
    """The Euclidean norm of all elements."""
    return np.sqrt(np.sum(x * x))


def lamb(g, w, state, t, lr, settings):
    """You et al. 2019 (arXiv:1904.00962), algorithm 2, phi the identity.

    The decay is inside the trust ratio (Keras's Lamb decays outside it). As
    in its authors' code the ratio is 1 where either norm is 0.
    """
    b1 = settings.get("beta_1", 0.9)
    b2 = settings.get("beta_2", 0.999)
    eps = settings.get("epsilon", 1e-7)
    m, v = moments(g, state, b1, b2)
    r = (m / (1.0 - b1**t)) / (np.sqrt(v / (1.0 - b2**t)) + eps)
    r = r + (settings.get("weight_decay") or 0.0) * w
    ratio = 1.0
    if settings["adapts"] and norm(w) > 0 and norm(r) > 0:
        ratio = norm(w) / norm(r)
    return -lr * ratio * r


def lars(g, w, state, t, lr, settings):
    """You et al. 2017 (arXiv:1708.03888), algorithm 1; its rate is in v.

    The paper divides by |g| + lambda |w|; this, with TensorFlow's and Optax's
    code, by |g + lambda w|. The ratio is 1 where |w| or the divisor is 0.
    """
    mu = settings.get("momentum", 0.9)
    d = g + (settings.get("weight_decay") or 0.0) * w
    ratio = 1.0
    if settings["adapts"] and norm(w) > 0 and norm(d) > 0:
        ratio = settings.get("trust_coefficient", 0.001) * norm(w) / norm(d)
    velocity = mu * state.get("momentum", np.zeros_like(g)) + lr * ratio * d
    state["momentum"] = velocity
    if settings.get("nesterov"):
        return -(mu * velocity + lr * ratio * d)
    return -velocity
