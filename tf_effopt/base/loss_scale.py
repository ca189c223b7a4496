"""Dynamic loss scaling that looks at the gradients of all replicas."""

from __future__ import annotations

import copy
from typing import Any

import keras
import numpy as np
from keras import ops

from tf_effopt import runtime
from tf_effopt.base import copies, overrides, representation
from tf_effopt.base.arguments import all_arguments, check_attribute, unknown_argument
from tf_effopt.base.checks import checked_gradients, is_nothing
from tf_effopt.base.optimizer import Optimizer
from tf_effopt.base.saving import OF_LOSS_SCALE, size_of_loss_scale
from tf_effopt.engine.counts import MISSED
from tf_effopt.hyperparameters import Hyperparameter, Integer, Positive
from tf_effopt.state.tensors import in_a_graph

OF_THE_INNER_OPTIMIZER = (
    "averaging",
    "current",
    "describe",
    "groups",
    "is_evaluating",
    "skipped_steps",
    "transforms",
    "use_evaluation_weights",
    "use_training_weights",
)


# Arguments that files of earlier versions of Keras hold; it checks their values.
OLD_ARGUMENTS = (
    "dynamic",
    "weight_decay",
    "clipnorm",
    "global_clipnorm",
    "clipvalue",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
    "loss_scale_factor",
    "gradient_accumulation_steps",
)


@keras.saving.register_keras_serializable("tf_effopt")
class LossScaleOptimizer(keras.optimizers.LossScaleOptimizer):
    """Multiplies the loss so that float16 gradients don't underflow.

    As `keras.optimizers.LossScaleOptimizer`, whose arguments it takes and
    whose state it loads; but the gradient is checked on all replicas and
    workers. (Keras's looks at the first replica only: an infinity on another
    one reaches the weights; the scale isn't lowered; several workers hang.)
    A step whose gradient isn't finite anywhere changes no weight and no count,
    and halves the scale.

    With the dtype policy `mixed_float16`, `compile` puts Keras's own around an
    optimizer that isn't wrapped yet; wrap it in this one instead:

    >>> import keras, tf_effopt
    >>> optimizer = tf_effopt.LossScaleOptimizer(tf_effopt.Adam(1e-3))
    >>> float(optimizer.scale_loss(1.0))
    32768.0

    Keeps 2 values in all.

    Reference: Micikevicius et al., "Mixed Precision Training", 2018,
    https://arxiv.org/abs/1710.03740

    Args:
        inner_optimizer: the optimizer to wrap.
        initial_scale: float above 0, the first scale.
        dynamic_growth_steps: int of at least 1, finite steps after which the
            scale doubles.
        name: string, the optimizer's name.
        **kwargs: as Keras's.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        inner_optimizer,
        initial_scale=2.0**15,
        dynamic_growth_steps=2000,
        name=None,
        **kwargs,
    ):
        inner_optimizer = copies.deserialized(inner_optimizer)
        is_optimizer = isinstance(inner_optimizer, keras.optimizers.Optimizer)
        if not is_optimizer:
            raise ValueError(
                "`inner_optimizer` must be an optimizer, such as "
                f"`tf_effopt.Adam(1e-3)`. Received: inner_optimizer={inner_optimizer!r}"
            )
        if isinstance(inner_optimizer, Optimizer):
            overrides.check_inner(inner_optimizer, Optimizer)
        for argument in kwargs:
            if argument not in OLD_ARGUMENTS:
                raise ValueError(unknown_argument(LossScaleOptimizer, argument))
        checked = _Arguments(initial_scale, dynamic_growth_steps)
        super().__init__(
            inner_optimizer,
            initial_scale=checked.initial_scale,
            dynamic_growth_steps=checked.dynamic_growth_steps,
            name=name,
            **kwargs,
        )
        self._state_to_load = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        overrides.check_class(cls, LossScaleOptimizer.__mro__, IGNORED)

    def __setattr__(self, name: str, value: Any) -> None:
        inner = self.__dict__.get("inner_optimizer")
        overrides.check_assignment(self, name, IGNORED)
        kind = getattr(type(inner), name, None)  # Keras's passes the learning rate on.
        is_inner = isinstance(kind, Hyperparameter) and name != "learning_rate"
        # Keras sets this one to None: two factors would multiply.
        if is_inner and not (name == "loss_scale_factor" and value is None):
            raise AttributeError(
                f"{name!r} is the inner optimizer's: set "
                f"`optimizer.inner_optimizer.{name}`. Received: {name}={value!r}"
            )
        check_attribute(self, name)
        if isinstance(inner, Optimizer):
            known = {x: f"inner_optimizer.{x}" for x in all_arguments(type(inner))}
            check_attribute(self, name, known)
        if isinstance(kind := vars(_Arguments).get(name), Hyperparameter):
            value = kind.check(value)
            if self.__dict__.get("built") and value != getattr(self, name):
                raise AttributeError(
                    f"`{name}` can't change after the optimizer was built: the compiled "
                    "step holds it. The scale now may be set: "
                    "`optimizer.dynamic_scale.assign(...)`. "
                    f"Received: {name}={value!r}"
                )
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return representation.shown(self)

    def __str__(self) -> str:
        return representation.with_a_word_for_tf_keras(self)

    def __getattr__(self, name: str) -> Any:
        inner = self.__dict__.get("inner_optimizer")
        if name in OF_THE_INNER_OPTIMIZER and isinstance(inner, Optimizer):
            return getattr(inner, name)
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")

    def build(self, var_list: list[Any]) -> None:
        """Makes the state for `var_list`, and assigns what was loaded before."""
        if not var_list:
            return  # As Keras builds it that loads a model's `.h5`.
        # `fit` builds while it traces its step: what is assigned there would be
        # assigned in each step.
        with runtime.create(self).building():
            if not self.built:
                super().build(var_list)
            if self._state_to_load is not None:
                self._assign_own(self._state_to_load)
                self._state_to_load = None

    def apply(self, grads: list[Any], trainable_variables: Any = None) -> None:
        """Updates variables by the gradients of the scaled loss."""
        inner = self.inner_optimizer
        if not isinstance(inner, Optimizer):
            return super().apply(grads, trainable_variables)
        grads = checked_gradients(grads)
        if is_nothing(grads, trainable_variables):
            return None
        variables = inner.matching_variables(grads, trainable_variables)
        if overrides.overrides(inner, "apply", Optimizer):
            # It may do anything with the gradients: as with Keras's, it is called if
            # they are finite, and not if they aren't.
            return super().apply(grads, variables)
        if not self.built:
            self.build(variables)
        unscaled = [
            g
            if g is None or self._overwrite_variable_with_gradient(v)
            else ops.divide(g, self.dynamic_scale)
            for g, v in zip(grads, variables, strict=True)
        ]
        # The inner optimizer checks the gradient it has reduced anyway.
        finite = inner.apply_and_check(unscaled, variables)
        steps = self.step_counter + 1
        grows = ops.equal(steps, self.dynamic_growth_steps)
        factor = ops.where(finite, ops.where(grows, 2.0, 1.0), 0.5)
        counter = ops.where(ops.logical_or(grows, ops.logical_not(finite)), 0, steps)
        assign = inner._engine.assign_alike
        assign(self.dynamic_scale, self.dynamic_scale * factor)
        assign(self.step_counter, ops.cast(counter, self.step_counter.dtype))

    def scale_loss(self, loss: Any) -> Any:
        """Returns the loss times the scale now."""
        if not self.built and in_a_graph():
            self.__dict__["_scaled_in_a_graph"] = True  # See the engine's `building`.
        return super().scale_loss(loss)

    def stateless_apply(
        self, optimizer_variables: list, grads: list, trainable_variables: list
    ) -> tuple[list, list]:
        """As Keras's; of a model that has nothing to train, it returns what it got."""
        if not self.built and is_nothing(grads, trainable_variables):
            return [], list(optimizer_variables)
        grads = checked_gradients(grads)  # dense: Keras's looks at them first
        return super().stateless_apply(optimizer_variables, grads, trainable_variables)

    def check_finite(self, grads: list[Any]) -> Any:
        """Whether the gradients are finite on every replica."""
        finite = super().check_finite(grads)
        if not hasattr(self, "_engine"):
            self._engine = runtime.create(self)
        return self._engine.finite_everywhere(finite)

    def exclude_from_weight_decay(
        self, var_list: list[Any] | None = None, var_names: list[str] | None = None
    ) -> None:
        """Takes variables out of the inner optimizer's weight decay."""
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def carry_over(
        self,
        variables: list[Any],
        groups: list[Any] | None = None,
        **settings: Any,
    ) -> LossScaleOptimizer:
        """Returns this optimizer for other variables, with the state it has.

        `settings` are arguments of the inner optimizer's constructor.

        See `tf_effopt.Optimizer.carry_over`.
        """
        inner = self.inner_optimizer.carry_over(variables, groups=groups, **settings)
        return self._with_state_of_the_scale(inner)

    def __deepcopy__(self, memo: dict) -> LossScaleOptimizer:
        other = self._with_state_of_the_scale(copy.deepcopy(self.inner_optimizer, memo))
        memo[id(self)] = other
        return other

    def __reduce__(self) -> tuple:
        return copies.reduced(super().__reduce__(), self)

    def __sklearn_clone__(self) -> LossScaleOptimizer:
        config = self.get_config()
        inner = self.inner_optimizer
        if isinstance(inner, Optimizer):
            config["inner_optimizer"] = copies.fresh(inner)
        return type(self)(**config)

    def _with_state_of_the_scale(self, inner: Any) -> LossScaleOptimizer:
        config = self.get_config() | {"inner_optimizer": inner}
        other = type(self)(**config)
        if inner.built:
            other.build(inner._trainable_variables)
        other._state_to_load = self._state_to_load
        if self.built:
            other.dynamic_scale.assign(ops.copy(self.dynamic_scale.value))
            other.step_counter.assign(ops.copy(self.step_counter.value))
        return other

    def save_own_variables(self, store: Any) -> None:
        """Saves the state, also one that was loaded and waits for `build`."""
        own, inner = self._state_to_load, {}
        if own is None:
            own = [ops.convert_to_numpy(v) for v in self._variables]
        self.inner_optimizer.save_own_variables(inner)
        if MISSED in inner:
            store[MISSED] = inner.pop(MISSED)
        for i, value in enumerate([*own, *inner.values()]):
            store[str(i)] = value

    def load_own_variables(self, store: Any) -> None:
        """Loads the state that this class, or Keras's own of its name, saved.

        An optimizer that isn't built yet keeps it until it is.

        Raises:
            ValueError: the state is that of another optimizer or model.
        """
        keys = set(store.keys())
        state = [np.array(store[str(i)]) for i in range(len(keys - {MISSED}))]
        n = size_of_loss_scale(state)
        own, inner = state[:n], state[n:]
        inner = {str(i): value for i, value in enumerate(inner)}
        if MISSED in keys:
            inner[MISSED] = np.array(store[MISSED])
        self.inner_optimizer.load_own_variables(inner)
        if self.built or n < OF_LOSS_SCALE:
            self._assign_own(own)  # Nothing, if the state is another optimizer's.
        else:
            self._state_to_load = own

    def set_weights(self, weights: list[Any]) -> None:
        """Sets the state, which waits for `build` if need be."""
        values = map(ops.convert_to_numpy, weights)
        self.load_own_variables({str(i): value for i, value in enumerate(values)})

    def _assign_own(self, state: list[np.ndarray]) -> None:
        for variable, value in zip(self._variables, state, strict=False):
            variable.assign(value)


IGNORED = overrides.IGNORED | overrides.IGNORED_BY_LOSS_SCALE


class _Arguments:
    """Checks the wrapper's own arguments."""

    initial_scale = Positive()
    dynamic_growth_steps = Integer(low=1)

    def __init__(self, initial_scale, dynamic_growth_steps):
        self.initial_scale = initial_scale
        self.dynamic_growth_steps = dynamic_growth_steps
