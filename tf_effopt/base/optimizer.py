"""The base of every optimizer: arguments, state, saving.

How a step runs is the engine's business (`tf_effopt.engine`), what it
computes is the rule's (`tf_effopt.optimizers`).
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import keras
import numpy as np

from tf_effopt import hyperparameters as hp
from tf_effopt import runtime
from tf_effopt.base import copies, overrides, representation
from tf_effopt.base.applying import Applying
from tf_effopt.base.arguments import check_attribute, unknown_argument
from tf_effopt.base.building import Building
from tf_effopt.base.carrying_over import CarryingOver
from tf_effopt.base.checkpoint import (
    EXTRA_KEYS,
    Saving,
)
from tf_effopt.base.checks import (
    as_int,
    check_lazy,
    checked_averaging,
    checked_transforms,
)
from tf_effopt.base.configurable import Configurable, current_value
from tf_effopt.base.evaluation import Evaluating
from tf_effopt.base.groups import Group, checked_groups
from tf_effopt.base.reporting import Reporting
from tf_effopt.base.selection import Selection, decay_exclusions
from tf_effopt.base.stage import Stage
from tf_effopt.rules import Evaluation, ModelRule, Part, Slots
from tf_effopt.runtime import private_names
from tf_effopt.state.precision import ROUNDINGS


class Optimizer(
    Building,
    Applying,
    Evaluating,
    CarryingOver,
    Saving,
    Reporting,
    Configurable,
    keras.optimizers.Optimizer,
):
    """Base of the optimizers of this package, and of custom ones.

    A subclass is a rule, the names of its slots, and its hyperparameters:

    >>> import tf_effopt
    >>> from tf_effopt import Optimizer, hyperparameters
    >>> def sign_rule(g, slots, *, learning_rate, beta):
    ...     m = beta * slots["m"] + (1 - beta) * g
    ...     return -learning_rate * keras.ops.sign(m), {"m": m}
    >>> class SignDescent(Optimizer):
    ...     rule = staticmethod(sign_rule)
    ...     slots = tf_effopt.rules.Slots(m="momentum")
    ...     learning_rate: float = hyperparameters.LearningRate(default=0.01)
    ...     beta: float = hyperparameters.DecayRate(default=0.9)
    >>> w = keras.Variable([1.0])
    >>> SignDescent(beta=0.8).apply([keras.ops.convert_to_tensor([5.0])], [w])
    >>> round(float(w.numpy()[0]), 2)
    0.99

    Its constructor is made of what it declares, and takes the arguments below by name.
    A class may define a custom `__init__` instead, which passes `learning_rate` and
    `**kwargs` on, and sets each attribute.

    The rule is called as `rule(g, slots, *, learning_rate, ...)` and returns
    `(delta, slots)`. Its further keyword-only arguments are looked up by name:
    `t` is the number of this variable's update, from 1: as that of the model, but
    for a variable that joined later or had no gradient for a while (in a class
    with a `model_rule` without `each_count` it is always that of the model); `w` the
    weight before the step and its decay; `weight_decay` that of this variable, for
    rules that decay themselves; any other a hyperparameter of the class, or a number
    that its `model_rule` returns. Numbers come as scalar tensors of the dtype of `g`,
    the wider of float32 and the weight's.

    Rules that need more than one tensor at a time set `model_rule`, and
    `elementwise = False` if they look at a whole tensor; classes with several
    rules override `part`; see `tf_effopt.rules`. For work that is cheaper on
    all tensors together, define `upkeep(gs, slots, *, ...)`, which
    gets and returns the slots of each.

    Every number may change while training, without compiling again:
    `optimizer.beta_1 = 0.8`. (On Keras's JAX backend this is true of
    `learning_rate` alone.) Every number may be given as a schedule, also there:
    `weight_decay=keras.optimizers.schedules.CosineDecay(0.1, 1000)`. It counts as that of
    a learning rate; its values are limited to the argument's range. `1 - beta` of a decay
    rate given so has float32's rounding.

    Args:
        learning_rate: float of at least 0, a
            `keras.optimizers.schedules.LearningRateSchedule`, or a callable
            without arguments. `lambda: variable` follows a variable (not on JAX); a
            Python number that a callable returns is a constant of a graph. Files
            hold no variable: a named function that is registered with Keras is saved,
            a lambda isn't followed any more. Under accumulation a schedule counts
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
        transforms: list of `tf_effopt.transforms`, or of custom `tf_effopt.Stage`s,
            which change the gradient before the rule or the step after it, in this
            order, after clipping.
        averaging: None, or one of `tf_effopt.averaging`, or a list: what becomes of the
            weights after each update. Not with `use_ema`.
        groups: list of `tf_effopt.Group`: variables with another learning rate or
            weight decay than the rest, or frozen.
        lazy: bool. An embedding's gradient has only the rows that were looked
            up. If True, only these rows' weights, slots and decay move, at
            the cost of these rows; else the result equals that of a dense
            gradient. TensorFlow backend only.
        name: string, the optimizer's name.

    A subclass may override what is called: `apply`, `build`, `scale_loss`,
    `learning_rate`, `add_variable_from_reference` (for slots of the weight's shape),
    `finalize_variable_values`, the methods for configuration and saving. Keras's other
    hooks, such as `update_step`, are refused when the class is made.

    A gradient that isn't finite, on any replica, changes nothing: no weight,
    no slot, no average, no count; `skipped_steps` tells how often.

    Raises:
        ValueError: an argument is out of its range or not known.
    """

    rule: ClassVar[Any]
    slots: ClassVar[Slots | tuple[Slots, ...]] = ()
    model_rule: ClassVar[ModelRule | None] = None
    upkeep: ClassVar[Any] = None
    evaluation: ClassVar[Evaluation | None] = None
    elementwise = True  # whether each element's step depends on it alone
    about_arguments = """Makes the optimizer.

        Arguments that the class doesn't describe are those of `tf_effopt.Optimizer`.

        Raises:
            ValueError: an argument is out of its range or not known.
        """

    learning_rate: hp.RateOrSchedule = hp.LearningRate(default=0.001)
    weight_decay: hp.FloatOrSchedule | None = hp.NonNegative(
        True, default=None, kw_only=True
    )
    clipnorm: hp.FloatOrSchedule | None = hp.NonNegative(
        True, True, default=None, kw_only=True
    )
    clipvalue: hp.FloatOrSchedule | None = hp.NonNegative(
        True, True, default=None, kw_only=True
    )
    global_clipnorm: hp.FloatOrSchedule | None = hp.NonNegative(
        True, True, default=None, kw_only=True
    )
    use_ema: bool = hp.Switch(default=False, kw_only=True)
    ema_momentum: hp.FloatOrSchedule = hp.DecayRate(
        allow_one=True, default=0.99, kw_only=True
    )
    ema_overwrite_frequency: int | None = hp.Count(1, default=None, kw_only=True)
    loss_scale_factor: hp.FloatOrSchedule | None = hp.Positive(
        True, default=None, kw_only=True
    )
    gradient_accumulation_steps: int | None = hp.Count(
        2, fixed=True, default=None, kw_only=True
    )
    rounding: str = hp.Choice(*ROUNDINGS, default="stochastic", kw_only=True)
    lazy: bool = hp.Switch(default=False, kw_only=True)
    transforms: Sequence[Stage] = hp.Objects(default=(), kw_only=True)
    averaging: Stage | Sequence[Stage] | None = hp.Objects(default=(), kw_only=True)
    groups: Sequence[Group] = hp.Objects(default=(), kw_only=True)
    if TYPE_CHECKING:  # Keras sets it.
        name: str | None = hp.Objects(default=None, kw_only=True)

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
        transforms=(),
        averaging=(),
        groups=(),
        name=None,
        **kwargs,
    ):
        extras = {name: kwargs.pop(name) for name in EXTRA_KEYS if name in kwargs}
        if kwargs:
            raise ValueError(
                unknown_argument(type(self), next(iter(kwargs)), Optimizer)
            )
        if "rule" not in dir(type(self)) and type(self).part is Optimizer.part:
            raise TypeError(
                f"{type(self).__name__} has no rule. Set `rule = "
                "staticmethod(my_rule)` in the class; see `tf_effopt.Optimizer`."
            )
        super().__init__(
            hp.LearningRate().check(copies.deserialized(learning_rate)),
            weight_decay=weight_decay,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            use_ema=use_ema,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=as_int(gradient_accumulation_steps),
            name=name,
        )
        # Keras would compare them with numbers, and they may be schedules.
        self.ema_momentum = ema_momentum
        self.ema_overwrite_frequency = ema_overwrite_frequency
        private_names.check_optimizer(self)
        self.rounding = rounding
        self.lazy = lazy
        # Bypasses Keras's and TensorFlow's tracking, which would wrap the lists.
        transforms, averaging, groups = map(
            copies.deserialized, (transforms, averaging, groups)
        )
        self.__dict__["_transforms"] = checked_transforms(transforms)
        self.__dict__["_averaging"] = checked_averaging(averaging, use_ema)
        self.__dict__["_groups"] = checked_groups(groups)
        check_lazy(self)
        self._engine = runtime.create(self)
        self._part: Part | None = None
        self._skipped_before = 0
        self._decay_exclusions = Selection()
        self._decay_exempt: frozenset[int] = frozenset()
        self._frozen: frozenset[int] = frozenset()
        self._built_on: list[tuple[str, tuple[int, ...]]] = []  # what it was built on
        self._built_on_before: list[tuple[str, tuple[int, ...]]] = []  # and some more
        self._state_to_load = None
        self._numbers_before: list[np.ndarray] = []  # this was loaded
        self._may_skip_state = False
        self._unpickled_from: copies.Origin | None = None
        self._missed_to_load: np.ndarray | None = None
        self._set_from_config(extras)

    @classmethod
    def shared_arguments(cls) -> list[inspect.Parameter]:
        """Those of `Optimizer`, which every constructor takes by name."""
        parameters = inspect.signature(Optimizer.__init__).parameters.values()
        return [
            x.replace(kind=x.KEYWORD_ONLY)
            for x in parameters
            if x.kind is x.POSITIONAL_OR_KEYWORD
            and x.name not in ("self", "learning_rate")
        ]

    @classmethod
    def check_given(cls, given: Iterable[str], known: Collection[str]) -> None:
        """Raises `ValueError` for an argument that isn't known, with the likest."""
        for name in given:
            if name not in known and name not in EXTRA_KEYS:
                raise ValueError(unknown_argument(cls, name, Optimizer))

    def configure(self, values: dict[str, Any]) -> None:
        """What a generated constructor does: Keras's part first."""
        shared = {x.name for x in Optimizer.shared_arguments()}
        shared |= {"learning_rate", *EXTRA_KEYS}
        of_base = {name: x for name, x in values.items() if name in shared}
        Optimizer.__init__(self, **of_base)
        super().configure({k: x for k, x in values.items() if k not in shared})

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # The top-level package's name keeps your `Adam` apart from ours.
        package = cls.__module__.partition(".")[0]
        keras.saving.register_keras_serializable(package)(cls)
        cls.check_overrides()

    @classmethod
    def check_overrides(cls) -> None:
        """Raises `TypeError` for methods that no update would call."""
        overrides.check_class(cls, Optimizer.__mro__, overrides.IGNORED)

    def __setattr__(self, name: str, value: Any) -> None:
        overrides.check_assignment(self, name, overrides.IGNORED)
        check_attribute(self, name)
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return representation.shown(self, Optimizer, always=("learning_rate",))

    def __str__(self) -> str:
        return representation.with_a_word_for_tf_keras(self)

    def current(self, name: str) -> Any:
        """The value of a hyperparameter now, also of one that is given by a schedule.

        The attribute is what was set.

        Args:
            name: of a hyperparameter, such as `"weight_decay"` or `"learning_rate"`.

        Returns:
            A float for a number, or the setting itself; None for what is off.

        >>> import keras, tf_effopt
        >>> decay = keras.optimizers.schedules.PolynomialDecay(0.1, 10, 0.0)
        >>> optimizer = tf_effopt.AdamW(1e-3, weight_decay=decay)
        >>> round(optimizer.current("weight_decay"), 6)
        0.1
        """
        return current_value(self, name, self)

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
                has a match anywhere: `["bias", "norm"]`. Leave a `Sequential`'s
                own name out: `load_model` takes it off the paths.

        Raises:
            ValueError: the optimizer is built already.
        """
        if self.built:
            raise ValueError(
                "`exclude_from_weight_decay` must be called before the optimizer "
                "is built, that is before the first step: the compiled update "
                "holds the choice."
            )
        self._decay_exclusions = decay_exclusions(var_list, var_names)


Optimizer.__init__.made_of_fields = True  # A subclass that declares more gets its own.
