"""What an optimizer does at each step, before its engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras

from tf_effopt import runtime
from tf_effopt.base import copies
from tf_effopt.base.checks import (
    checked_gradients,
    checked_variables,
    is_nothing,
    same_shape,
    shown_shape,
    with_a_gradient,
)
from tf_effopt.state.tensors import in_a_graph, outside_of_graphs
from tf_effopt.state.variables import path_of, shape_of

# What all gradients go through first: `(gradients, variables) -> gradients`. Empty but for
# `distribute.prepare`, whose replicas may have nothing but stand-ins for examples.
GRADIENT_FILTERS: list[Callable[[list, list], list]] = []


class Applying(keras.optimizers.Optimizer):
    """The part of `Optimizer` that takes gradients."""

    def apply(self, grads: list[Any], trainable_variables: Any = None) -> None:
        """Updates variables by their gradients.

        Args:
            grads: a list of gradients, each dense, `tf.IndexedSlices`, or
                None for a variable that stays as it is.
            trainable_variables: their variables, all or some of those that the
                optimizer was built on; None means all.

        Without any gradient and variable, `apply([], [])` or `apply([])`, nothing
        happens: the optimizer isn't built, and no step is counted.

        Raises:
            ValueError: gradients and variables don't match.
        """
        self.apply_and_check(grads, trainable_variables)

    @runtime.without_autograph
    def apply_and_check(self, grads: list[Any], trainable_variables: Any = None) -> Any:
        """As `apply`; returns whether the gradient was finite, on all replicas.

        Returns:
            A boolean scalar tensor. False means that nothing was changed.
        """
        grads = checked_gradients(grads)
        if is_nothing(grads, trainable_variables):
            return keras.ops.convert_to_tensor(True)
        variables, indices = self._matched(grads, trainable_variables)
        if self._frozen:
            kept = [k for k, i in enumerate(indices) if i not in self._frozen]
            grads, variables, indices = _chosen(kept, grads, variables, indices)
        for gradient_filter in GRADIENT_FILTERS:
            grads = gradient_filter(grads, variables)
        kept = with_a_gradient(grads, variables)
        grads, variables, indices = _chosen(kept, grads, variables, indices)
        if self._trained_by_gradient_values(variables):
            grads, variables = map(
                list,
                self._overwrite_variables_directly_with_gradients(grads, variables),
            )
            indices = [self._get_variable_index(v) for v in variables]
        if not variables:
            return self._engine.count_step()
        return self._engine.apply(grads, indices)

    def stateless_apply(
        self, optimizer_variables: list, grads: list, trainable_variables: list
    ) -> tuple[list, list]:
        """As Keras's; of a model that has nothing to train, it returns what it got."""
        if not self.built and is_nothing(grads, trainable_variables):
            return [], list(optimizer_variables)
        return super().stateless_apply(optimizer_variables, grads, trainable_variables)

    def apply_gradients(self, grads_and_vars: Any) -> Any:
        """As `apply`, of pairs of a gradient and its variable."""
        pairs = list(grads_and_vars)
        if not pairs:
            raise ValueError(
                "`grads_and_vars` must have a pair for each variable, as "
                "`zip(gradients, model.trainable_variables)` gives them. Received: "
                f"{grads_and_vars!r}, which has none."
            )
        return super().apply_gradients(pairs)

    def scale_loss(self, loss: Any) -> Any:
        """Returns the loss times `loss_scale_factor`, as it is now."""
        if self.loss_scale_factor is None:
            return loss
        if self.built:
            factor = self._engine.number_now("loss_scale_factor")
        else:
            with outside_of_graphs():
                factor = self.current("loss_scale_factor")
            if in_a_graph():  # See the engine's `building`.
                self.__dict__["_scaled_in_a_graph"] = True
        if "float" not in str(getattr(loss, "dtype", "")):
            if isinstance(loss, float | int) and not keras.ops.is_tensor(factor):
                return loss * factor
            loss = keras.ops.cast(loss, keras.backend.floatx())  # a number, or counts
        return loss * keras.ops.cast(factor, loss.dtype)

    @property
    def skipped_steps(self) -> int | None:
        """Steps that changed nothing because the gradient wasn't finite.

        Not part of the saved state: it counts since this object was made.
        None on Keras's JAX backend, whose compiled step can keep no such count.
        """
        return self._engine.skipped_steps()

    def _trained_by_gradient_values(self, variables: list[Any]) -> bool:
        return any(self._overwrite_variable_with_gradient(v) for v in variables)

    def matching_variables(self, grads: list[Any], variables: Any) -> list[Any]:
        """The variables of `grads`, the optimizer built on them if need be."""
        return self._matched(grads, variables)[0]

    def _matched(self, grads: list[Any], variables: Any) -> tuple[list[Any], list[int]]:
        """As `matching_variables`, with the place of each in the optimizer."""
        if variables is None:
            if not self.built:
                raise ValueError(
                    "`apply(grads)` without variables needs an optimizer that was "
                    "built: call `optimizer.build(model.trainable_variables)` "
                    "first, or pass the variables."
                )
            variables = self._trainable_variables
        variables = checked_variables(variables)
        if len(grads) != len(variables):
            raise ValueError(
                "`grads` must have one gradient, or None, for each variable. "
                f"Received: {len(grads)} gradients for {len(variables)} variables."
            )
        if not self.built or self._state_to_load is not None:
            self.build(variables)
        places = self._trainable_variables_indices
        indices = [places.get(self._var_key(v)) for v in variables]
        unknown = [v for v, i in zip(variables, indices, strict=True) if i is None]
        if unknown and len(unknown) == len(variables):
            raise ValueError(copies.of_another_model(self.name, variables))
        if unknown:
            raise ValueError(self._unknown_variable(unknown[0]))
        for g, variable, i in zip(grads, variables, indices, strict=True):
            if g is None:
                continue
            _, shape = self._built_on[i]
            if not same_shape(g, shape):
                raise ValueError(
                    f"The gradient of {path_of(variable)} must have its shape "
                    f"{shape}. Received: {shown_shape(g)}."
                    + self._word_of_another_shape(variable, shape)
                )
        return variables, indices

    def _word_of_another_shape(self, variable: Any, shape: tuple[int, ...]) -> str:
        with outside_of_graphs():
            now = shape_of(variable)
        if now == shape:
            return ""
        return (
            f" The variable had that shape when {self.name!r} was built, whose state "
            f"has it; now it is {now}. Make a new optimizer: `type(o).from_config("
            "o.get_config())`."
        )

    def _unknown_variable(self, variable: Any) -> str:
        return (
            f"{path_of(variable)} isn't among the "
            f"{len(self._trainable_variables)} variables that this optimizer was "
            "built on. If it was unfrozen or added later, go on with an optimizer "
            "that knows it and keeps the state of the others:\n"
            "    optimizer = optimizer.carry_over(model.trainable_variables)\n"
            "    model.compile(optimizer=optimizer, ...)"
        )


def _chosen(places: list[int], *lists: list) -> Iterator[list]:
    """What is at these places of each list."""
    return ([of[k] for k in places] for of in lists)
