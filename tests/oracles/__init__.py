"""The rules and stages in NumPy float64, written from their sources.

They share no code with the package: plain loops over plain arrays. A rule of
one tensor is a function `(g, w, state, t, lr, settings) -> step`: the
gradient, the weight before the step and its decay, and the number of the
update from 1. It changes `state`, a dict under the names of Keras's slots
where Keras has the rule. A rule that looks at all tensors at once is
`(gs, ws, states, shared, t, lr, settings) -> steps`, with lists over the
tensors, and the model's own state in `shared`.
"""

from __future__ import annotations

from .stages import clipped, train, trajectory
from .table import RULES

__all__ = ["RULES", "clipped", "train", "trajectory"]
