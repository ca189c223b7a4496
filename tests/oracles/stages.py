"""What stands around a rule: accumulation, clipping, decay, averages, stages."""

from __future__ import annotations

import re

import numpy as np

from .table import DECAY_INSIDE, DEFAULT_DECAY, OF_ALL_TENSORS, RULES


def train(class_name, settings, weights, gradients, learning_rates, names=None):
    """Runs a rule with the shared stages around it.

    Args:
        class_name: of `RULES`.
        settings: the optimizer's arguments; of stages, `transforms` and `averaging`, a
            list of `[class name, arguments]`.
        weights: float64 arrays, one for each tensor.
        gradients: for each micro-step a list of arrays.
        learning_rates: for each micro-step a number.
        names: of the tensors, for patterns in the settings.

    Returns:
        `(weights, states, averages)`; `states` are dicts under Keras's names.
    """
    moments = trajectory(
        class_name, settings, weights, gradients, learning_rates, names
    )
    for moment in moments:
        last = moment
    return last[:3]


def trajectory(class_name, settings, weights, gradients, learning_rates, names=None):
    """Yields what `train` returns: at the start, and after each micro-step.

    A fourth value is the state of the whole model. The dicts are the same
    objects each time.
    """
    rule = RULES[class_name]
    weights = [np.array(w, "float64") for w in weights]
    states = [{} for _ in weights]
    averages = [np.array(w) for w in weights]
    shared = {}
    micro_steps = settings.get("gradient_accumulation_steps") or 1
    decay = settings.get("weight_decay")
    if decay is None:
        decay = DEFAULT_DECAY.get(class_name, 0.0)
    if class_name in DECAY_INSIDE:
        decay = 0.0
    excluded = settings.get("exclude_from_adaptation", ())
    adapts = [
        not any(re.search(pattern, name) for pattern in excluded)
        for name in names or [""] * len(weights)
    ]
    waiting = []
    t = 0
    yield weights, states, averages, shared
    for gs, lr in zip(gradients, learning_rates, strict=True):
        waiting.append([np.array(g, "float64") for g in gs])
        if len(waiting) < micro_steps:
            yield weights, states, averages, shared
            continue
        gs = [sum(parts) / micro_steps for parts in zip(*waiting, strict=True)]
        waiting = []
        t += 1
        gs = clipped(gs, settings)
        for name, arguments in settings.get("transforms", ()):
            gs = [STAGES[name](g, s, **arguments) for g, s in zip(gs, states)]
        before = weights
        if class_name in OF_ALL_TENSORS:
            steps = rule(gs, weights, states, shared, t, lr, settings)
        else:
            steps = [
                rule(g, w, state, t, lr, settings | {"adapts": adapted})
                for g, w, state, adapted in zip(
                    gs, weights, states, adapts, strict=True
                )
            ]
        weights = [
            w - lr * decay * w + step for w, step in zip(weights, steps, strict=True)
        ]
        if settings.get("use_ema"):
            beta = settings.get("ema_momentum", 0.99) if t > 1 else 0.0
            averages = [
                beta * a + (1.0 - beta) * w
                for a, w in zip(averages, weights, strict=True)
            ]
            every = settings.get("ema_overwrite_frequency")
            if every and t % every == 0:
                weights = [np.array(a) for a in averages]
        for name, arguments in settings.get("averaging", ()):
            weights = [
                STAGES[name](w, state, start, t, **arguments)
                for w, state, start in zip(weights, states, before, strict=True)
            ]
        yield weights, states, averages, shared


def mars(g, state, gamma, beta_1):
    """Yuan et al. 2024, their approximate variant: the last batch's gradient."""
    last = state.get("last_gradient", np.zeros_like(g))
    c = g + gamma * (beta_1 / (1 - beta_1)) * (g - last)
    norm = np.sqrt(np.sum(c * c))
    state["last_gradient"] = g
    return c / norm if norm > 1 else c


def lookahead(w, state, start, t, period, step_size):
    """Zhang et al. 2019, algorithm 1; `start` is the weight before the update."""
    slow = state.setdefault("slow_weight", start)
    if t % period:
        return w
    state["slow_weight"] = slow + step_size * (w - slow)
    return state["slow_weight"]


STAGES = {"MARS": mars, "Lookahead": lookahead}


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
