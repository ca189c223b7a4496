"""The base of what changes a gradient before the rule, or its step after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

from tf_effopt.base.stage import Function, Stage


class Transform(Stage):
    """A stage with a function before the rule, one after it, or both, without slots.

    It runs inside the compiled update, in the order of the list that an optimizer
    takes, after clipping:

    >>> import keras, tf_effopt
    >>> def halved(g):
    ...     return g / 2
    >>> class Half(tf_effopt.transforms.Transform):
    ...     before = staticmethod(halved)
    >>> w = keras.Variable([1.0])
    >>> optimizer = tf_effopt.SGD(0.1, transforms=[Half()])
    >>> optimizer.apply([keras.ops.convert_to_tensor([1.0])], [w])
    >>> round(float(w.numpy()[0]), 6)
    0.95

    A subclass sets some of:

    - `before`: `(g, *, ...) -> g`, a pure function of one tensor's gradient;
    - `after`: `(delta, g, *, ...) -> delta`, of what the rule wants to add to
      the weight, and of the gradient that the rule saw;
    - `model_rule`, `decides`, `clips` and `look`, as of each `tf_effopt.Stage`, which
      also says which keyword-only arguments come by name.

    For a function that keeps something for each tensor, derive from `Stage`.
    """

    before: ClassVar[Callable | None] = None
    after: ClassVar[Callable | None] = None

    def functions(self) -> Iterator[Function]:
        """What it does, in order."""
        if self.before is not None or self.after is None or self.model_rule is not None:
            yield Function("gradient", self.before, form="before")
        if self.after is not None:
            yield Function("update", self.after, form="after")
