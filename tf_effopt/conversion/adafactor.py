"""`Adafactor`: what Keras's optimizer of that name, or version 0.1.0, saved."""

from __future__ import annotations

import numpy as np

from tf_effopt.base import Optimizer


def adafactor_slots(
    optimizer: Optimizer, saved: list[np.ndarray], steps: int
) -> list[np.ndarray] | None:
    """The slots of `Adafactor`, out of those of Keras's or of version 0.1.0."""

    def axes_of(shape: tuple[int, ...]) -> tuple[int, int] | None:
        return optimizer.part("", shape).settings["axes"]

    # Keras's are row means, column means and the whole second moment; rows
    # and columns are the last two axes, not the largest.
    shapes = [tuple(v.shape) for v in optimizer._trainable_variables]
    if len(saved) == 3 * len(shapes):
        moments = saved[2::3]
        if [x.shape for x in moments] != shapes:
            return None
        factors = [axes_of(shape) for shape in shapes]
    else:
        # Version 0.1.0 kept the whole moment where two axes are 2 x 2.
        moments, factors, rest = [], [], list(saved)
        for shape in shapes:
            axes = axes_of(shape)
            is_whole = axes is None or bool(rest and rest[0].shape == shape)
            taken = 1 if is_whole else 2
            moments += rest[:taken]
            factors += [axes] if is_whole else [None, None]
            rest = rest[taken:]
        if rest or len(moments) != len(factors):
            return None
    slots = []
    for v, axes in zip(moments, factors, strict=True):
        slots += [v] if axes is None else [v.mean(axis) for axis in axes[::-1]]
    return slots
