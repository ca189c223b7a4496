"""The engine of Keras's JAX and PyTorch backends.

Keras's own trainers compile the step (JAX) or run it as it is (PyTorch);
here the stages only read Keras variables and assign what comes back.
"""

from __future__ import annotations

import contextlib
from typing import Any

import keras
import numpy as np
from keras import ops

from tf_effopt.engine import stages
from tf_effopt.engine.inputs import Inputs
from tf_effopt.engine.plan import Scalars
from tf_effopt.engine.sent import SENT, common_slots, own_slots, sent
from tf_effopt.runtime.base import Engine, values


class PortableEngine(Engine):
    """Reads and writes Keras variables, also in a `StatelessScope`."""

    def __init__(self, optimizer: Any):
        super().__init__(optimizer)
        self.backend = keras.backend.backend()
        self.has_run = False
        self._skipped = 0
        # Not part of the state that JAX passes: a step that it has compiled holds it.
        self._missed: np.ndarray | None = None

    def set_hyperparameter(self, owner: Any, name: str, value: Any) -> None:
        if self.backend == "jax" and self.has_run:
            raise RuntimeError(
                f"`{name}` can't change to {value!r} after the first step: on "
                "Keras's JAX backend, the compiled train step holds its value as "
                "a constant, and would go on with the old one. Only "
                "`learning_rate` is part of the state that JAX passes. Make a "
                "new optimizer and `compile` again, or use the TensorFlow "
                "backend, where each number may change."
            )

    def scalars(self) -> Scalars:
        rate = self.optimizer.learning_rate
        is_of_user = rate is not self.optimizer._learning_rate
        if self.backend == "jax" and isinstance(rate, keras.Variable) and is_of_user:
            import jax

            is_traced = [
                isinstance(v.value, jax.core.Tracer)
                for v in (self.optimizer._iterations, rate)
            ]
            if is_traced == [True, False]:
                raise RuntimeError(
                    "On Keras's JAX backend the compiled train step would hold the "
                    "value now of the variable that the callable `learning_rate` "
                    "returns, and not follow it: pass a number and assign "
                    "`optimizer.learning_rate = ...`, or pass a schedule. Received: "
                    f"learning_rate={self.optimizer._learning_rate!r}, which returned "
                    f"{rate!r}"
                )
        return super().scalars()

    def apply(self, gradients: list[Any], indices: list[int]) -> Any:
        with _no_grad(self.backend):
            return self._apply(gradients, indices)

    def _apply(self, gradients: list[Any], indices: list[int]) -> Any:
        self.has_run = True
        by_index = dict(zip(indices, gradients, strict=True))
        indices = self.variables_to_update(indices)
        gradients = [by_index.get(i) for i in indices]
        state = [self.state[i] for i in indices]
        variables = [self.variables[i] for i in indices]
        optimizer, scalars = self.optimizer, self.scalars()
        gradients, slots = self._sent(indices, gradients, scalars)
        before = [values(common_slots(self.plan, tensors)) for tensors in state]
        after, outcome = stages.step(
            Inputs(self.plan, variables, before, gradients, scalars)
        )
        for tensors, new in zip(state, after, strict=True):
            _assign(tensors, new)
        for i, new in slots.items():
            old = values({key: self.state[i][key] for key in new})
            _assign(self.state[i], stages.where(outcome.counted > 0, new, old))
        _assign(self.model_state, outcome.model)
        if self.backend == "torch":
            self._skipped += int(not outcome.finite)
        before = optimizer._iterations.value
        after = before + ops.cast(outcome.counted, optimizer._iterations.dtype)
        absent = self.without_gradient(list(by_index))
        if absent:
            self.count_missed(absent, self.updates_between(before, after))
        optimizer._iterations.assign(after)
        return outcome.finite

    def _sent(
        self, indices: list[int], gradients: list[Any], scalars: Scalars
    ) -> tuple[list[Any], dict[int, dict]]:
        """Gradients after the stages on what is sent; index -> next slots of these."""
        if not any(self.plan.at(SENT)):
            return gradients, {}
        given = [i for i, g in zip(indices, gradients, strict=True) if g is not None]
        changed, slots = sent(
            Inputs(
                self.plan,
                [self.variables[i] for i in given],
                [values(own_slots(self.plan, self.state[i])) for i in given],
                [g for g in gradients if g is not None],
                scalars,
            )
        )
        by_index = dict(zip(given, changed, strict=True))
        after = dict(zip(given, slots, strict=True))
        return [by_index.get(i) for i in indices], after

    def count_missed(self, indices: list[int], updates: Any) -> None:
        if self.backend == "jax":
            return  # See `Optimizer`: there `carry_over` alone makes counts differ.
        updates = int(ops.convert_to_numpy(updates))
        if updates:
            missed = np.zeros(len(self.state), "int64")
            if self._missed is not None:
                missed += self._missed
            missed[indices] += updates
            self.set_missed(missed)

    def missed(self) -> np.ndarray | None:
        return self._missed

    def set_missed(self, missed: np.ndarray | None) -> None:
        if missed is not None and not (self.counts_each and missed.any()):
            missed = None
        self._missed = missed

    def skipped_steps(self) -> int | None:
        return self._skipped if self.backend == "torch" else None


def _assign(variables: dict, values: dict) -> None:
    for k, value in values.items():
        if isinstance(value, dict):
            _assign(variables[k], value)
        else:
            variables[k].assign(value)


def _no_grad(backend: str) -> contextlib.AbstractContextManager:
    if backend == "torch":
        import torch

        return torch.no_grad()
    return contextlib.nullcontext()
