"""The engine of Keras's JAX and PyTorch backends.

Keras's own trainers compile the step (JAX) or run it as it is (PyTorch);
here the stages only read Keras variables and assign what comes back.
"""

from __future__ import annotations

import contextlib
from typing import Any

import keras
from keras import ops

from tf_effopt.engine import stages
from tf_effopt.engine.base import Engine


class PortableEngine(Engine):
    """Reads and writes Keras variables, also in a `StatelessScope`."""

    def __init__(self, optimizer: Any):
        super().__init__(optimizer)
        self.backend = keras.backend.backend()
        self.has_run = False
        self._skipped = 0

    def set_hyperparameter(self, name: str, value: Any) -> None:
        if self.backend == "jax" and self.has_run:
            raise RuntimeError(
                f"`{name}` can't change to {value!r} after the first step: on "
                "Keras's JAX backend, the compiled train step holds its value as "
                "a constant, and would go on with the old one. Only "
                "`learning_rate` is part of the state that JAX passes. Make a "
                "new optimizer and `compile` again, or use the TensorFlow "
                "backend, where each number may change."
            )

    def apply(self, gradients: list[Any], indices: list[int]) -> Any:
        with _no_grad(self.backend):
            return self._apply(gradients, indices)

    def _apply(self, gradients: list[Any], indices: list[int]) -> Any:
        self.has_run = True
        by_index = dict(zip(indices, gradients, strict=True))
        indices = self.involved(indices)
        gradients = [by_index.get(i) for i in indices]
        state = [self.state[i] for i in indices]
        variables = [self.variables[i] for i in indices]
        before = [_values(tensors) for tensors in state]
        optimizer = self.optimizer
        scalars = self.make_scalars(
            ops.convert_to_tensor(optimizer._iterations.value),
            ops.convert_to_tensor(optimizer._get_current_learning_rate()),
            ops.convert_to_tensor(self.hyperparameters()),
        )
        measured = stages.measure(self.plan, variables, before, gradients, scalars)
        total = sum(ops.cast(x, self.scalar_dtype) for x in measured)
        after, finite = stages.step(
            self.plan, variables, before, gradients, scalars, measured, total
        )
        for tensors, values in zip(state, after, strict=True):
            _assign(tensors, values)
        if self.backend == "torch":
            self._skipped += int(not finite)
        advanced = ops.cast(finite, optimizer._iterations.dtype)
        optimizer._iterations.assign(optimizer._iterations.value + advanced)
        return finite

    def skipped_steps(self) -> int | None:
        return self._skipped if self.backend == "torch" else None


def _values(tensors: dict) -> dict:
    return {
        k: _values(x) if isinstance(x, dict) else x.value for k, x in tensors.items()
    }


def _assign(tensors: dict, values: dict) -> None:
    for k, x in tensors.items():
        if isinstance(x, dict):
            _assign(x, values[k])
        else:
            x.assign(values[k])


def _no_grad(backend: str) -> contextlib.AbstractContextManager:
    if backend == "torch":
        import torch

        return torch.no_grad()
    return contextlib.nullcontext()
