"""Whether a saved state fits an optimizer."""

from __future__ import annotations

from typing import Any

import numpy as np

# Variables of a `LossScaleOptimizer`: two that every optimizer has, and that do nothing
# there, a counter and the scale.
OF_LOSS_SCALE = 4


def without_loss_scale(state: list[np.ndarray]) -> list[np.ndarray]:
    """The state of an optimizer, also out of that of a `LossScaleOptimizer` around it.

    Under the policy `mixed_float16` Keras's `compile` puts one around each optimizer,
    and the model's file has its state, but not that it was there.
    """
    first = [(x.shape, x.dtype.kind) for x in state[: OF_LOSS_SCALE + 1]]
    if first == [((), kind) for kind in "ififi"]:
        return state[OF_LOSS_SCALE:]
    return state


def fits(state: list[np.ndarray], variables: list[Any]) -> bool:
    """Whether the values have the variables' number and shapes."""
    return _shapes(state) == _shapes(variables)


def check_fits(name: str, state: list[np.ndarray], variables: list[Any]) -> None:
    """Raises `ValueError` if the values don't fit."""
    saved, own = _shapes(state), _shapes(variables)
    if saved == own:
        return
    at = next(
        (i for i, pair in enumerate(zip(saved, own)) if pair[0] != pair[1]),
        min(len(saved), len(own)),
    )
    raise ValueError(
        f"The saved state doesn't fit {name!r}: it has {len(saved)} "
        f"variables, the optimizer {len(own)}; the first difference is at "
        f"number {at}: {saved[at : at + 1] or 'none'} saved, "
        f"{[variables[at].path, own[at]] if at < len(own) else 'none'} here. "
        "Use the class, the arguments that decide on state (momentum, "
        "amsgrad, use_ema, gradient_accumulation_steps, a learning rate "
        "that is a number) and the trainable variables that it was saved "
        "with; or start with no state: `load_model(path, compile=False)`, "
        "then `compile`."
    )


def _shapes(values: list[Any]) -> list[tuple[int, ...]]:
    return [tuple(value.shape) for value in values]
