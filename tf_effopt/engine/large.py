"""Large gradients: finite, but their squares overflow.

An ordinary step reads a gradient once for its norm and the finite check. Only where
the sum of squares isn't finite, and what clips is there, a branch looks at the
gradient again, shrunk: whether it is finite itself, and what its norm is. If it fits
once it is clipped, the step is taken. No branch holds a collective.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from keras import ops

from tf_effopt.engine.gradients import (
    Transformed,
    accumulated,
    clipped_gradients,
    sum_of,
    unscaled,
)
from tf_effopt.engine.inputs import Inputs
from tf_effopt.engine.plan import OPTIMIZER, Arguments, Plan
from tf_effopt.engine.sparse import Rows
from tf_effopt.transforms import clipping

SHRUNK = "shrunk"  # the phase of the second look
CLIPPED = "clipped"  # the phase that tells whether what is clipped fits


def phases_before(plan: Plan) -> list[str]:
    """Phases between that of the gradient and those of transforms."""
    return [SHRUNK] if plan.clips else []


def phases_after(plan: Plan) -> list[str]:
    """Phases after those of transforms."""
    return [CLIPPED] if plan.clips and plan.clip != "global_clipnorm" else []


class LargeGradient:
    """What is known of a gradient that may be large.

    Attributes:
        overflows: boolean, whether the sum of its squares isn't finite.
    """

    def __init__(self, inputs: Inputs, measured: list[Any], total: Any):
        self.inputs = inputs
        self._measured = measured
        self._total = total
        self.overflows = ops.logical_not(ops.isfinite(total))
        self._squares = self._shrunk_squares()
        self._shrunk_total = inputs.total(SHRUNK, self.shrunk)["total"]

    def shrunk(self) -> dict[str, Any]:
        """What this device's tensors add to the phase `SHRUNK`."""
        return {"total": sum_of(self._squares, self.inputs.scalar_dtype)}

    def norms(self) -> Iterator[tuple[Any, Any]]:
        """For each gradient the square that clipping looks at, as it is and shrunk."""
        if self.inputs.plan.clip == "clipnorm":
            return zip(self._measured, self._squares, strict=True)
        return itertools.repeat((self._total, self._shrunk_total))

    def clipped(self) -> dict[str, Any]:
        """What this device's tensors add to the phase `CLIPPED`: squares."""
        dtype = self.inputs.scalar_dtype
        if self.inputs.plan.needs_norms:
            squares = [self._at_most_limit(x) for x in self._measured]
            return {"total": sum_of(squares, dtype)}
        is_finite = ops.isfinite(self._shrunk_total)
        return {
            "total": ops.cond(
                ops.logical_and(self.overflows, is_finite),
                self._clipped_squares,
                lambda: ops.zeros((), dtype),
            )
        }

    def fits(self) -> Any:
        """Whether it is finite, and fits once it is clipped."""
        if self.inputs.plan.clip == "global_clipnorm":
            total = self._at_most_limit(self._total)
        else:
            total = self.inputs.total(CLIPPED, self.clipped)["total"]
        return ops.logical_and(ops.isfinite(self._shrunk_total), ops.isfinite(total))

    def transformed(self, gradients: list[Any]) -> Transformed:
        """The gradients, clipped, to be transformed."""
        plan = self.inputs.plan
        norms = self.norms() if plan.needs_norms else None
        clipped = clipped_gradients(self.inputs, gradients, norms)
        # What was clipped isn't large any more.
        overflows = self.overflows if plan.clip is None else None
        return Transformed(self.inputs, clipped, overflows)

    def _at_most_limit(self, square: Any) -> Any:
        inputs = self.inputs
        dtype = inputs.scalar_dtype
        arguments = Arguments(inputs.plan, inputs.scalars)
        limit = arguments.number(OPTIMIZER, inputs.plan.clip, dtype)
        norm = ops.sqrt(ops.cast(square, dtype))
        # XLA may square a constant factor of a gradient apart from it, which makes NaN
        # of what overflows.
        below = ops.where(ops.isnan(norm), limit, ops.minimum(norm, limit))
        return ops.square(below)

    def _shrunk_squares(self) -> list[Any]:
        """One number for each gradient if each is clipped by its norm; else one."""
        inputs = self.inputs
        alone = inputs.plan.clip == "clipnorm"
        pairs = zip(inputs.variables, inputs.gradients, strict=True)
        dtypes = [v.compute_dtype for v, g in pairs if g is not None]
        if not alone:
            dtypes = [inputs.scalar_dtype]
        if not dtypes:
            return []

        # From the gradients as they are: what is made of them for the update needs
        # no memory then, as it has to if it enters a branch.
        def look() -> list[Any]:
            seen = _dense(accumulated(inputs, unscaled(inputs)))
            if not alone:
                seen = [ops.cast(g, inputs.scalar_dtype) for g in seen]
            seen = [clipping.shrunk(g, self.overflows) for g in seen]
            if alone:
                return [clipping.squared_norm(g) for g in seen]
            return [_sum_of_squares(seen, inputs.scalar_dtype)]

        return ops.cond(
            self.overflows, look, lambda: [ops.zeros((), x) for x in dtypes]
        )

    def _clipped_squares(self) -> Any:
        inputs = self.inputs
        work = self.transformed(accumulated(inputs, unscaled(inputs)))
        if inputs.plan.clip is None:
            work.run()
        return _sum_of_squares(_dense(work.gradients), inputs.scalar_dtype)


def _dense(gradients: list[Any]) -> list[Any]:
    return [g.unique if isinstance(g, Rows) else g for g in gradients if g is not None]


def _sum_of_squares(gradients: list[Any], dtype: str) -> Any:
    groups = clipping.alike(gradients)
    return sum_of([clipping.squared_norm(*group) for group in groups], dtype)
