"""SOAP."""

from __future__ import annotations

import numpy as np


def rotated(x, bases, back=False):
    """`x` with its axis k in the basis k (columns), or back from there.

    A basis of None leaves its axis alone. Each turn takes the first axis away
    and puts its image last, so that after all of them the order is restored.
    """
    for basis in bases:
        if basis is None:
            x = np.moveaxis(x, 0, -1)
        else:
            x = np.tensordot(x, basis, axes=[[0], [1 if back else 0]])
    return x


def without_rounding(x):
    """`x` with 0 for what is nothing but rounding beside the largest element."""
    return np.where(np.abs(x) > 1e-13 * np.abs(x).max(initial=0), x, 0.0)


def soap(g, w, state, t, lr, settings):
    """Vyas et al. 2024 (arXiv:2409.11321), algorithms 3 and 4.

    As in its authors' code: the first gradient only makes the first bases, by
    eigendecomposition, and the weight stays; Adam counts from the second,
    with epsilon-hat; a gradient enters the statistics after its step; the
    decay is of the weight after its step; vectors, and axes longer than
    `max_precondition_dim`, keep the identity. The momentum is kept unrotated
    (their code turns it with the bases, which is the same). Columns of a
    basis are right up to their sign, which the step doesn't depend on.
    """
    b1 = settings.get("beta_1", 0.95)
    b2 = settings.get("beta_2", 0.95)
    b_sh = settings.get("shampoo_beta", b2)
    eps = settings.get("epsilon", 1e-8)
    decay = settings.get("weight_decay", 0.01)
    longest = settings.get("max_precondition_dim", 10000)
    axes = [k for k in range(g.ndim) if g.ndim > 1 and g.shape[k] <= longest]

    def count_in(g):
        for k in axes:
            others = [i for i in range(g.ndim) if i != k]
            outer = np.tensordot(g, g, axes=[others, others])
            name = f"statistics_{k}"
            kept = state.get(name, np.zeros_like(outer))
            state[name] = b_sh * kept + (1.0 - b_sh) * outer

    if t == 1:
        state["momentum"] = state["velocity"] = np.zeros_like(g)
        count_in(g)
        for k in axes:
            values, vectors = np.linalg.eigh(state[f"statistics_{k}"])
            known = vectors[:, ::-1] * (values[::-1] > 1e-12 * values[-1])
            # Of eigenvectors for 0, which are arbitrary, those of Householder.
            basis, r = np.linalg.qr(known)
            state[f"basis_{k}"] = basis * np.where(np.diag(r) < 0, -1.0, 1.0)
        return np.zeros_like(g)

    t = t - 1
    bases = [state.get(f"basis_{k}") for k in range(g.ndim)]
    m = b1 * state["momentum"] + (1.0 - b1) * g
    v = b2 * state["velocity"] + (1.0 - b2) * without_rounding(rotated(g, bases)) ** 2
    state["momentum"], state["velocity"] = m, v
    n = without_rounding(rotated(m, bases)) / (np.sqrt(v) + eps)
    step = -lr * np.sqrt(1.0 - b2**t) / (1.0 - b1**t) * rotated(n, bases, back=True)
    step = step - lr * decay * (w + step)
    count_in(g)
    if t % settings.get("precondition_frequency", 10) == 0:
        for k in axes:
            image = state[f"statistics_{k}"] @ bases[k]
            order = np.argsort(-np.sum(bases[k] * image, axis=0))
            state["velocity"] = np.take(state["velocity"], order, axis=k)
            state[f"basis_{k}"], _ = np.linalg.qr(image[:, order])
    return step
