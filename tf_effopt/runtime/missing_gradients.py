"""What a compiled update gets in the place of gradients that aren't there."""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from tf_effopt.engine.plan import TrainedVariable


class MissingGradients:
    """Zeros of the shapes of variables, which share the memory of the largest.

    Args:
        variables: those of an optimizer; None for one that no rule trains.
    """

    def __init__(self, variables: list[TrainedVariable | None]):
        self._sizes: dict[str, int] = {}
        for v in variables:
            if v is not None:
                size = max(math.prod(v.shape), self._sizes.get(v.compute_dtype, 0))
                self._sizes[v.compute_dtype] = size
        self._zeros: dict[tuple[str, str], tf.Tensor] = {}
        self._views: dict[tuple, tf.Tensor] = {}

    def filled(self, gradient: Any, v: TrainedVariable, device: str) -> tf.Tensor:
        """A gradient in the dtype of the arithmetic, or zeros if there is none."""
        if gradient is not None:
            return tf.cast(gradient, v.compute_dtype)
        key = v.shape, v.compute_dtype, device
        if key not in self._views:
            with tf.init_scope(), tf.device(device):
                zeros = self._zeros_on(v.compute_dtype, device)
                self._views[key] = tf.reshape(zeros[: math.prod(v.shape)], v.shape)
        return self._views[key]

    def _zeros_on(self, dtype: str, device: str) -> tf.Tensor:
        if (dtype, device) not in self._zeros:
            self._zeros[dtype, device] = tf.zeros(self._sizes[dtype], dtype)
        return self._zeros[dtype, device]
