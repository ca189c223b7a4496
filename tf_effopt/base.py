"""The base of every optimizer: arguments, state, saving.

How a step runs is the engine's business (`tf_effopt.engine`), what it
computes is the rule's (`tf_effopt.optimizers`).
"""

from __future__ import annotations

import difflib
import inspect
import warnings
from typing import Any

import keras
import numpy as np

from tf_effopt import engine
from tf_effopt.engine.base import check_dtype, dtype_name, path_of
from tf_effopt.exclusions import Exclusions
from tf_effopt.hyperparameters import (
    Choice,
    Count,
    DecayRate,
    NonNegative,
    Positive,
    Switch,
)
from tf_effopt.precision import ROUNDINGS, compute_dtype, is_narrow

EXCLUSIONS = "exclude_from_weight_decay"  # in a configuration


class Optimizer(keras.optimizers.Optimizer):
    """Base of the optimizers of this package, and of your own.

    A subclass is a rule, the names of its slots, and its hyper-parameters:

    >>> from tf_effopt import Optimizer, hyperparameters
    >>> def sign_rule(g, slots, *, learning_rate, beta):
    ...     m = beta * slots["m"] + (1 - beta) * g
    ...     return -learning_rate * keras.ops.sign(m), {"m": m}
    >>> class SignDescent(Optimizer):
    ...     rule = staticmethod(sign_rule)
    ...     slots = {"m": "momentum"}
    ...     beta = hyperparameters.DecayRate()
    ...     def __init__(self, learning_rate=0.01, beta=0.9, **kwargs):
    ...         super().__init__(learning_rate, **kwargs)
    ...         self.beta = beta
    >>> w = keras.Variable([1.0])
    >>> SignDescent().apply([keras.ops.convert_to_tensor([5.0])], [w])
    >>> round(float(w.numpy()[0]), 2)
    0.99

    The rule is called as `rule(g, slots, *, learning_rate, ...)` and returns
    `(delta, slots)`. Its further keyword-only arguments are looked up by name:
    `t` is the number of this update, from 1; `w` the weight before the step
    and its decay; any other a hyper-parameter of the class. Numbers come as
    scalar tensors of the dtype of `g`, the wider of float32 and the weight's.

    Every number may change while training, without compiling again:
    `optimizer.beta_1 = 0.8`. (On Keras's JAX backend this is true of
    `learning_rate` alone.)

    Args:
        learning_rate: float of at least 0, a
            `keras.optimizers.schedules.LearningRateSchedule`, or a callable
            without arguments. Under accumulation a schedule counts
            micro-steps, as Keras documents.
        weight_decay: None, or float of at least 0. Decoupled: each update
            takes `learning_rate * weight_decay` of the weight before the
            step. See `exclude_from_weight_decay`.
        clipnorm: None, or float: the largest norm of each tensor's gradient.
        clipvalue: None, or float: the largest element of a gradient.
        global_clipnorm: None, or float: the largest norm of all gradients
            together. Only one of the three; 0 is none. They see the gradient
            after it was summed over replicas and accumulated.
        use_ema: bool, whether to keep an exponential moving average of the
            weights, which `fit` puts in their place at its end. It costs 1
            value per parameter and advances once per update. (Keras's moves
            on every micro-step, too.)
        ema_momentum: float in [0, 1], share of the average kept per update.
        ema_overwrite_frequency: None, or int of at least 1: after so many
            updates the weights become their average.
        loss_scale_factor: None, or float above 0: the loss is multiplied and
            the gradient divided by it.
        gradient_accumulation_steps: None, or int of at least 2: so many
            gradients are averaged for one update. It costs 1 value per
            parameter and, with several replicas, one all-reduce per
            micro-step.
        rounding: how bfloat16 and float16 weights are written: `"stochastic"`
            (right on average, the same on each replica), `"compensated"`
            (what was lost is kept, 1 more value per parameter) or
            `"nearest"` (small steps are lost). Slots are float32 for them.
        lazy: bool. An embedding's gradient has only the rows that were looked
            up. If True, only these rows' weights, slots and decay move, at
            the cost of these rows; else the result equals that of a dense
            gradient. TensorFlow backend only.
        name: string, the optimizer's name.

    A gradient that isn't finite, on any replica, changes nothing: no weight,
    no slot, no average, no count; `skipped_steps` tells how often.

    Raises:
        ValueError: an argument is out of its range or not known.
    """

    rule: Any
    slots: Any = ()

    weight_decay = NonNegative(optional=True)
    clipnorm = NonNegative(optional=True, zero_is_off=True)
    clipvalue = NonNegative(optional=True, zero_is_off=True)
    global_clipnorm = NonNegative(optional=True, zero_is_off=True)
    use_ema = Switch()
    ema_momentum = DecayRate(allow_one=True)
    ema_overwrite_frequency = Count(low=1)
    loss_scale_factor = Positive(optional=True)
    gradient_accumulation_steps = Count(low=2, fixed=True)
    rounding = Choice(*ROUNDINGS)
    lazy = Switch()

    def __init__(
        self,
        learning_rate=0.001,
        weight_decay=None,
        clipnorm=None,
        clipvalue=None,
        global_clipnorm=None,
        use_ema=False,
        ema_momentum=0.99,
        ema_overwrite_frequency=None,
        loss_scale_factor=None,
        gradient_accumulation_steps=None,
        rounding="stochastic",
        lazy=False,
        name=None,
        **kwargs,
    ):
        if kwargs:
            raise ValueError(_unknown_argument(type(self), next(iter(kwargs))))
        if "rule" not in dir(type(self)):
            raise TypeError(
                f"{type(self).__name__} has no rule. Set `rule = "
                "staticmethod(my_rule)` in the class; see `tf_effopt.Optimizer`."
            )
        super().__init__(
            _checked_learning_rate(learning_rate),
            weight_decay=weight_decay,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
            name=name,
        )
        self.rounding = rounding
        self.lazy = lazy
        self._check_lazy()
        self._engine = engine.create(self)
        self._decay_exclusions = Exclusions()
        self._state_to_load = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # The top-level package's name keeps your `Adam` apart from ours.
        package = cls.__module__.partition(".")[0]
        keras.saving.register_keras_serializable(package)(cls)

    def _check_lazy(self) -> None:
        if not self.lazy:
            return
        if keras.backend.backend() != "tensorflow":
            raise ValueError(
                "`lazy=True` needs Keras's TensorFlow backend: on "
                f"{keras.backend.backend()!r} an embedding's gradient is dense. "
                "Received: lazy=True"
            )
        if self.gradient_accumulation_steps:
            raise ValueError(
                "`lazy=True` can't be combined with `gradient_accumulation_steps`: "
                "the sum of several gradients has more rows than the last one. "
                "Received: gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}"
            )

    # ------------------------------------------------------------- building

    def build(self, variables: list[Any]) -> None:
        """Makes the state for `variables`.

        Called by the first `apply`, and by `fit`. In a training loop of your
        own under a strategy, call it inside `strategy.scope()`.

        Args:
            variables: the trained variables, `model.trainable_variables`.

        Raises:
            ValueError: a variable's dtype can't be trained, or it belongs to
                another strategy.
        """
        if not self.built:
            variables = list(variables)
            for variable in variables:
                if not self._overwrite_variable_with_gradient(variable):
                    check_dtype(variable)
                    self._engine.check_variable(variable)
            with self._engine.building():
                super().build(variables)  # averages, then accumulators
                self._engine.build(self._build_state(variables))
        if self._state_to_load is not None:
            with self._engine.building():
                self._assign_state(self._state_to_load)
            self._state_to_load = None

    def _build_state(self, variables: list[Any]) -> list[dict | None]:
        """Makes the slots; returns each variable's state (see `Engine`)."""
        state: list[dict | None] = [
            None
            if self._overwrite_variable_with_gradient(v)
            else {"weight": v, "slots": {}}
            for v in variables
        ]
        groups = self.slots if isinstance(self.slots, tuple) else (self.slots,)
        for group in filter(None, groups):
            made = self.add_optimizer_variables(variables, list(group.values()))
            for letter, slots in zip(group, made, strict=True):
                for tensors, slot in zip(state, slots, strict=True):
                    if tensors is not None:
                        tensors["slots"][letter] = slot
        for i, tensors in enumerate(state):
            if tensors is None:
                continue
            if self.gradient_accumulation_steps:
                tensors["accumulator"] = self._accumulated_gradients[i]
            if self.use_ema:
                tensors["average"] = self._model_variables_moving_average[i]
            weight = tensors["weight"]
            if self.rounding == "compensated" and is_narrow(dtype_name(weight)):
                tensors["compensation"] = self.add_variable_from_reference(
                    weight, name="compensation"
                )
        return state

    def add_variable_from_reference(
        self, reference_variable: Any, name: str | None = None, initializer="zeros"
    ) -> Any:
        """Makes one slot for a variable, of its shape and beside it.

        As Keras's, but the slots of bfloat16 and float16 weights are float32,
        and an average starts at the weight.
        """
        dtype = dtype_name(reference_variable)
        if name == "average":

            def initializer(shape: Any, dtype: Any) -> Any:
                # A copy: on PyTorch the tensor is the weight's own memory.
                return keras.ops.copy(keras.ops.cast(reference_variable, dtype))
        elif name != "compensation":
            dtype = compute_dtype(dtype)
        path = path_of(reference_variable).replace("/", "_").replace(":", "_")
        with self._engine.colocated(reference_variable):
            return self.add_variable(
                shape=reference_variable.shape,
                initializer=initializer,
                dtype=dtype,
                name=f"{path}_{name or 'var'}",
                layout=getattr(reference_variable, "_layout", None),
            )

    # -------------------------------------------------------------- running

    def apply(self, grads: list[Any], trainable_variables: Any = None) -> None:
        """Updates variables by their gradients.

        Args:
            grads: a list of gradients, each dense, `tf.IndexedSlices`, or
                None for a variable that stays as it is.
            trainable_variables: their variables, all or some of those that the
                optimizer was built on; None means all.

        Raises:
            ValueError: gradients and variables don't match.
        """
        self.apply_and_check(grads, trainable_variables)

    @engine.without_autograph
    def apply_and_check(self, grads: list[Any], trainable_variables: Any = None) -> Any:
        """As `apply`; returns whether the gradient was finite, on all replicas.

        Returns:
            A boolean scalar tensor. False means that nothing was changed.
        """
        grads = list(grads)
        variables = self._matching_variables(grads, trainable_variables)
        grads, variables = _without_none(grads, variables)
        if self._trained_by_gradient_values(variables):
            grads, variables = self._overwrite_variables_directly_with_gradients(
                grads, variables
            )
        if not variables:
            return self._engine.count_step()
        indices = [self._get_variable_index(v) for v in variables]
        return self._engine.apply(list(grads), indices)

    def _trained_by_gradient_values(self, variables: list[Any]) -> bool:
        return any(self._overwrite_variable_with_gradient(v) for v in variables)

    def _matching_variables(self, grads: list[Any], variables: Any) -> list[Any]:
        """The variables of `grads`, the optimizer built on them if need be."""
        if variables is None:
            if not self.built:
                raise ValueError(
                    "`apply(grads)` without variables needs an optimizer that was "
                    "built: call `optimizer.build(model.trainable_variables)` "
                    "first, or pass the variables."
                )
            variables = self._trainable_variables
        variables = list(variables)
        if len(grads) != len(variables):
            raise ValueError(
                "`grads` must have one gradient, or None, for each variable. "
                f"Received: {len(grads)} gradients for {len(variables)} variables."
            )
        self.build(variables)
        for variable in variables:
            if self._var_key(variable) not in self._trainable_variables_indices:
                raise ValueError(self._unknown_variable(variable))
        for g, variable in zip(grads, variables, strict=True):
            if g is not None and not _same_shape(g, variable):
                raise ValueError(
                    f"The gradient of {path_of(variable)} must have its shape "
                    f"{tuple(variable.shape)}. Received: shape {tuple(g.shape)}."
                )
        return variables

    def _unknown_variable(self, variable: Any) -> str:
        return (
            f"{path_of(variable)} isn't among the "
            f"{len(self._trainable_variables)} variables that this optimizer was "
            "built on. If it was unfrozen or added later, go on with an optimizer "
            "that knows it and keeps the state of the others:\n"
            "    optimizer = optimizer.carry_over(model.trainable_variables)\n"
            "    model.compile(optimizer=optimizer, ...)"
        )

    def carry_over(self, variables: list[Any]) -> Optimizer:
        """Returns this optimizer for other variables, with the state it has.

        For after layers were frozen, unfrozen or added: the state of variables
        that both know goes on, that of the others starts anew.

        Args:
            variables: those that the new optimizer is to train.

        Returns:
            An optimizer with this one's settings, built on `variables`.
        """
        other = self._unbuilt_copy()
        other.build(variables)
        if not self.built:
            return other
        for i, variable in enumerate(other._trainable_variables):
            index = self._trainable_variables_indices.get(self._var_key(variable))
            if index is None or self._engine.state[index] is None:
                continue
            _copy_state(self._engine.state[index], other._engine.state[i])
        other._iterations.assign(keras.ops.copy(self._iterations.value))
        return other

    def _unbuilt_copy(self) -> Optimizer:
        config = self.get_config()
        config.pop(EXCLUSIONS, None)
        if not isinstance(self._learning_rate, keras.Variable):
            config["learning_rate"] = self._learning_rate
        other = type(self)(**config)
        other._decay_exclusions = self._decay_exclusions.copy()
        return other

    def __deepcopy__(self, memo: dict) -> Optimizer:
        """A second optimizer with the same state, for the same variables.

        In a deep copy of a whole model, for the copies of its variables.
        """
        other = self._unbuilt_copy()
        memo[id(self)] = other
        if self.built:
            other.build([memo.get(id(v), v) for v in self._trainable_variables])
            for mine, copied in zip(self.variables, other.variables, strict=True):
                copied.assign(keras.ops.copy(mine.value))
        return other

    @property
    def skipped_steps(self) -> int | None:
        """Steps that changed nothing because the gradient wasn't finite.

        Not part of the saved state: it counts since this object was made.
        None on Keras's JAX backend, whose compiled step can keep no such count.
        """
        return self._engine.skipped_steps()

    @property
    def learning_rate(self) -> Any:
        """The learning rate now. A number can be assigned to it."""
        return self._get_current_learning_rate()

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        keras.optimizers.Optimizer.learning_rate.fset(
            self, _checked_learning_rate(value)
        )

    def finalize_variable_values(self, var_list: list[Any]) -> None:
        """Ends training: averages take the place of the weights.

        `fit` calls it after its last epoch.

        Args:
            var_list: the model's variables; the averages of all variables that
                this optimizer trains are used.
        """
        if self.use_ema and self.built:
            self._engine.overwrite_with_averages()
        if skipped := self.skipped_steps:
            warnings.warn(
                f"{self.name}: {skipped} steps had a gradient that wasn't finite "
                "and changed nothing. If it isn't for loss scaling that finds its "
                "scale, look for a division by zero or a too high learning rate.",
                stacklevel=2,
            )

    # --------------------------------------------------------- weight decay

    def exclude_from_weight_decay(
        self, var_list: list[Any] | None = None, var_names: list[str] | None = None
    ) -> None:
        """Takes variables out of weight decay. Call it before `build`.

        Part of the configuration: it survives saving and loading. (Keras's
        doesn't.)

        Args:
            var_list: variables, or paths of variables.
            var_names: regular expressions; a variable is taken out whose path
                has a match anywhere: `["bias", "norm"]`.

        Raises:
            ValueError: the optimizer is built already.
        """
        if self.built:
            raise ValueError(
                "`exclude_from_weight_decay` must be called before the optimizer "
                "is built, that is before the first step: the compiled update "
                "holds the choice."
            )
        self._decay_exclusions = Exclusions.of(var_list or (), var_names or ())

    def _decays(self, variable: Any, index: int) -> bool:
        return not self._decay_exclusions.has(variable, index)

    # --------------------------------------------------------------- saving

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, with their values now."""
        config = super().get_config()
        for cls in (type(self), Optimizer):
            for name in _arguments(cls):
                if name not in config:
                    config[name] = getattr(self, name)
        exclusions = self._decay_exclusions.get_config(self._trainable_variables)
        if exclusions:
            config[EXCLUSIONS] = exclusions
        return config

    @classmethod
    def from_config(cls, config: dict, custom_objects: dict | None = None) -> Optimizer:
        """Makes an optimizer from what `get_config` returned."""
        config = dict(config)
        exclusions = config.pop(EXCLUSIONS, None)
        optimizer = super().from_config(config, custom_objects=custom_objects)
        if exclusions:
            optimizer._decay_exclusions = Exclusions(**exclusions)
        return optimizer

    def load_own_variables(self, store: Any) -> None:
        """Loads the state that this class, or Keras's own of its name, saved.

        An optimizer that isn't built yet keeps it until it is.

        Raises:
            ValueError: the state is that of another optimizer or model.
        """
        state = [np.array(store[str(i)]) for i in range(len(store.keys()))]
        if self.built:
            self._assign_state(state)
        elif len(state) > len(self.variables):
            self._state_to_load = state
        else:
            self._assign_state(state)
            if int(self._iterations) > 0:
                # It has trained, so `build` must not add slots to this state.
                self._state_to_load = state

    def _assign_state(self, state: list[np.ndarray]) -> None:
        variables = self.variables
        saved = [tuple(value.shape) for value in state]
        own = [tuple(variable.shape) for variable in variables]
        if saved != own:
            at = next(
                (i for i, pair in enumerate(zip(saved, own)) if pair[0] != pair[1]),
                min(len(saved), len(own)),
            )
            raise ValueError(
                f"The saved state doesn't fit {self.name!r}: it has {len(saved)} "
                f"variables, the optimizer {len(own)}; the first difference is at "
                f"number {at}: {saved[at : at + 1] or 'none'} saved, "
                f"{[variables[at].path, own[at]] if at < len(own) else 'none'} here. "
                "Use the class, the arguments that decide on state (momentum, "
                "amsgrad, use_ema, gradient_accumulation_steps, a learning rate "
                "that is a number) and the trainable variables that it was saved "
                "with; or `compile` anew after loading, to start with no state."
            )
        for variable, value in zip(variables, state, strict=True):
            variable.assign(value)


def _copy_state(source: dict, target: dict) -> None:
    for name, variable in target.items():
        if isinstance(variable, dict):
            _copy_state(source[name], variable)
        elif name != "weight":
            variable.assign(keras.ops.copy(source[name].value))


def _without_none(grads: list[Any], variables: list[Any]) -> tuple[list, list]:
    """Drops variables without a gradient, with Keras's warning."""
    missing = [path_of(v) for g, v in zip(grads, variables, strict=True) if g is None]
    if len(missing) == len(variables):
        raise ValueError(
            "No gradients provided for any variable. Check that the loss depends "
            f"on them. Received: None for {missing[:5]}"
            + (" and more." if len(missing) > 5 else ".")
        )
    if missing:
        warnings.warn(
            f"Gradients do not exist for variables {missing} when minimizing the "
            "loss. If using `model.compile()`, did you forget to provide a `loss` "
            "argument?",
            stacklevel=4,
        )
    kept = [(g, v) for g, v in zip(grads, variables, strict=True) if g is not None]
    return [g for g, _ in kept], [v for _, v in kept]


def _same_shape(gradient: Any, variable: Any) -> bool:
    shape = getattr(gradient, "shape", None)
    if shape is None or getattr(shape, "rank", 0) is None:
        return True  # Known only when the graph runs.
    mine, own = tuple(shape), tuple(variable.shape)
    return len(mine) == len(own) and all(a in (None, b) for a, b in zip(mine, own))


def _arguments(cls: type) -> list[str]:
    """The names of a constructor's own arguments."""
    return [
        name
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]


def _unknown_argument(cls: type, name: str) -> str:
    known = _arguments(cls) + [n for n in _arguments(Optimizer) if n != "self"]
    known = list(dict.fromkeys(known))
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    return (
        f"`{cls.__name__}` has no argument `{name}`.{hint} "
        f"It takes: {', '.join(known)}."
    )


def _checked_learning_rate(value: Any) -> Any:
    """A number as a float, checked; schedules and callables as they are."""
    if isinstance(value, keras.optimizers.schedules.LearningRateSchedule) or (
        callable(value) and not isinstance(value, type)
    ):
        return value
    if keras.ops.is_tensor(value) or isinstance(value, keras.Variable):
        value = keras.ops.convert_to_numpy(value)
    kind = NonNegative()
    kind.__set_name__(Optimizer, "learning_rate")
    try:
        return kind.check(value)
    except ValueError:
        raise ValueError(
            "`learning_rate` must be a number of at least 0, a "
            "`keras.optimizers.schedules.LearningRateSchedule`, or a callable "
            f"without arguments. Received: learning_rate={value!r}"
        ) from None
