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

from tf_effopt.engine import clipping
from tf_effopt.engine.arguments import Arguments
from tf_effopt.engine.gradients import (
    Transformed,
    accumulated,
    clipped_gradients,
    sum_of,
    unscaled,
)
from tf_effopt.engine.inputs import Inputs
from tf_effopt.engine.plan import OPTIMIZER, Plan

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
        if inputs.plan.clip == "clipnorm":
            self._squares = self._vector(measured)
        self._shrunk = self._shrunk_squares()
        self._shrunk_total = inputs.total(SHRUNK, self.shrunk)["total"]
        # Here, outside of the branch of the update: in it, XLA would make them anew for
        # each element.
        self._factors = self._made_factors() if inputs.plan.needs_norms else None

    def shrunk(self) -> dict[str, Any]:
        """What this device's tensors add to the phase `SHRUNK`."""
        return {"total": ops.sum(self._shrunk)}

    def factors(self) -> Iterator[tuple[Any, Any]]:
        """For each gradient the two factors that clip it by a norm."""
        if self.inputs.plan.clip == "clipnorm":
            return zip(*map(ops.unstack, self._factors), strict=True)
        return itertools.repeat(self._factors)

    def _made_factors(self) -> tuple[Any, Any]:
        """Two scalars; two vectors if each gradient is clipped by its own norm."""
        if self.inputs.plan.clip == "clipnorm":
            # Each operation on each scalar would have to be compiled.
            return self._factors_of(self._squares, self._shrunk)
        return self._factors_of(self._total, self._shrunk_total)

    def _factors_of(self, squares: Any, shrunk: Any) -> tuple[Any, Any]:
        """Of a squared norm, or a vector of them, and the same shrunk."""
        limit = self._limit()
        root = clipping.root_of_factor(limit, squares, shrunk)
        return clipping.factors(ops.sqrt(squares), limit, root)

    def clipped(self) -> dict[str, Any]:
        """What this device's tensors add to the phase `CLIPPED`: squares."""
        dtype = self.inputs.scalar_dtype
        if self.inputs.plan.clip == "clipnorm":
            return {"total": ops.sum(self._at_most_limit(self._squares))}
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
        factors = self.factors() if plan.needs_norms else None
        clipped = clipped_gradients(self.inputs, gradients, factors)
        # What was clipped isn't large any more.
        overflows = self.overflows if plan.clip is None else None
        return Transformed(self.inputs, clipped, overflows)

    def _limit(self) -> Any:
        arguments = Arguments(self.inputs.plan, self.inputs.scalars)
        plan, dtype = self.inputs.plan, self.inputs.scalar_dtype
        return arguments.number(OPTIMIZER, plan.clip, dtype)

    def _vector(self, numbers: list[Any]) -> Any:
        """Numbers, one for each gradient, as a vector; a zero if there are none."""
        dtype = self.inputs.scalar_dtype
        return ops.stack([ops.cast(x, dtype) for x in numbers or [ops.zeros(())]])

    def _at_most_limit(self, square: Any) -> Any:
        limit = self._limit()
        norm = ops.sqrt(ops.cast(square, self.inputs.scalar_dtype))
        # XLA may square a constant factor of a gradient apart from it, which makes NaN
        # of what overflows.
        below = ops.where(ops.isnan(norm), limit, ops.minimum(norm, limit))
        return ops.square(below)

    def _shrunk_squares(self) -> Any:
        """A vector: of each gradient, if each is clipped by its norm; else of all."""
        inputs, dtype = self.inputs, self.inputs.scalar_dtype
        alone = inputs.plan.clip == "clipnorm"
        count = len(self._measured) if alone else 1

        # From the gradients as they are: what is made of them for the update needs
        # no memory then, as it has to if it enters a branch.
        def look() -> Any:
            factor = clipping.shrinking(self.overflows, dtype)
            seen = [
                clipping.shrunk(ops.cast(g, dtype), self.overflows, factor)
                for g in inputs.seen(accumulated(inputs, unscaled(inputs)))
            ]
            groups = [[g] for g in seen] if alone else [seen]
            return self._vector([_sum_of_squares(group, dtype) for group in groups])

        # One vector: XLA takes long for a branch with many results.
        return ops.cond(self.overflows, look, lambda: ops.zeros((count or 1,), dtype))

    def _clipped_squares(self) -> Any:
        inputs = self.inputs
        work = self.transformed(accumulated(inputs, unscaled(inputs)))
        if inputs.plan.clip is None:
            work.run()
        return _sum_of_squares(inputs.seen(work.gradients), inputs.scalar_dtype)


def _sum_of_squares(gradients: list[Any], dtype: str) -> Any:
    groups = clipping.alike(gradients)
    return sum_of([clipping.squared_norm(*group) for group in groups], dtype)
