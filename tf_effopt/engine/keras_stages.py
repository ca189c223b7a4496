"""The functions of the stages on the gradient that Keras's arguments make."""

from __future__ import annotations

from typing import Any

from tf_effopt.engine.clipping import clip_by_value, multiplied


def unscaled(g: Any, slots: dict, *, loss_scale_factor: Any) -> tuple[Any, dict]:
    """Returns the gradient of the loss, out of that of the scaled loss."""
    return g / loss_scale_factor, slots


def accumulated(g: Any, slots: dict, *, steps: int) -> tuple[Any, dict]:
    """Returns the mean gradient of an update, should it be due, and the next sum.

    Args:
        g: the gradient of this micro-step.
        slots: `sum`, of the same shape, of the micro-steps before.
        steps: micro-steps of an update.
    """
    total = slots["sum"] + g
    return total / steps, {"sum": total}


def clipped_by_value(g: Any, slots: dict, *, clipvalue: Any) -> tuple[Any, dict]:
    """Returns the gradient with elements of at most `clipvalue`."""
    return clip_by_value(g, clipvalue), slots


def clipped_by_norm(
    g: Any, slots: dict, *, first: Any, second: Any
) -> tuple[Any, dict]:
    """Returns the gradient times two factors, which make its norm that of the limit.

    Args:
        g: the gradient.
        slots: none.
        first, second: scalars; their product may be too small for float32.
    """
    return multiplied(g, first=first, second=second), slots


BY_CLIP_ARGUMENT = {
    "clipnorm": clipped_by_norm,
    "clipvalue": clipped_by_value,
    "global_clipnorm": clipped_by_norm,
}
