"""Whether a saved state fits an optimizer."""

from __future__ import annotations

from collections.abc import Iterator
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
    return state[OF_LOSS_SCALE:] if _starts_with(state, "ififi") else state


def size_of_loss_scale(state: list[np.ndarray]) -> int:
    """How much of a state is of a `LossScaleOptimizer` itself, not the one inside."""
    if _starts_with(state, "ififi"):
        return OF_LOSS_SCALE
    # Saved before `build`, it lacks the scale, and the inner one has no slots.
    unbuilt = len(state) <= OF_LOSS_SCALE and _starts_with(state, "ifi")
    return OF_LOSS_SCALE - 2 if unbuilt else 0


def is_untrained(state: list[np.ndarray]) -> bool:
    """Whether it is that of an optimizer before `build`: nothing but its numbers."""
    numbers = len(state) <= 2 and all(x.shape == () for x in state)
    return bool(state) and numbers and int(state[0]) == 0


def with_rate_as(
    state: list[np.ndarray], numbers: list[np.ndarray]
) -> Iterator[list[np.ndarray]]:
    """The state as it is, then as it is with a learning rate or without one.

    A schedule has none in the state. That of the file doesn't count where either has
    a schedule.

    Args:
        state: as it was saved.
        numbers: the optimizer's, as they are: with its learning rate, or without.
    """
    yield state
    if len(numbers) > 1:
        yield [*state[:1], numbers[1], *state[1:]]
    elif len(state) > 1 and state[1].shape == ():
        yield [*state[:1], *state[2:]]


def _starts_with(state: list[np.ndarray], kinds: str) -> bool:
    """Whether the first values are scalars of these kinds of dtype."""
    first = [(x.shape, x.dtype.kind) for x in state[: len(kinds)]]
    return first == [((), kind) for kind in kinds]


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
        "with; or start with no state: `load_model(path, compile=False)` or "
        "`load_weights` before `compile`."
    )


def _shapes(values: list[Any]) -> list[tuple[int, ...]]:
    return [tuple(value.shape) for value in values]
