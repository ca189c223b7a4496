"""The base of every optimizer: arguments, state, saving.

How a step runs is the engine's business (`tf_effopt.engine`), what it
computes is the rule's (`tf_effopt.optimizers`).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import keras
import numpy as np

from tf_effopt import (
    copies,
    description,
    engine,
    overrides,
    representation,
    saving,
)
from tf_effopt.arguments import (
    check_attribute,
    constructor_arguments,
    unknown_argument,
)
from tf_effopt.checks import (
    as_int,
    check_dtype,
    checked_averaging,
    checked_gradients,
    checked_transforms,
    checked_variables,
    is_nothing,
    same_shape,
    shown_shape,
    with_a_gradient,
)
from tf_effopt.configurable import Configurable, current_value, serialized
from tf_effopt.engine import counts, keras_hooks, private_names
from tf_effopt.engine.binding import key_of, stage_owners
from tf_effopt.engine.plan import (
    ACCUMULATION,
    COMPENSATION,
    EMA,
    EVALUATING,
    OPTIMIZER,
    RULE,
)
from tf_effopt.groups import (
    Group,
    check_overlaps,
    checked_groups,
    frozen_indices,
)
from tf_effopt.hyperparameters import (
    Choice,
    Count,
    DecayRate,
    FloatOrSchedule,
    LearningRate,
    NonNegative,
    Objects,
    Positive,
    RateOrSchedule,
    Switch,
)
from tf_effopt.paths import (
    dtype_name,
    known_by,
    path_of,
    paths_and_shapes,
    shape_of,
    stand_in,
)
from tf_effopt.precision import ROUNDINGS, compute_dtype, is_narrow
from tf_effopt.rules import (
    Evaluation,
    ModelRule,
    Part,
    Slot,
    Slots,
    each_slot,
    slot_groups,
)
from tf_effopt.selection import Selection, Trained, decay_exclusions
from tf_effopt.stage import Stage

# In a configuration, besides the constructor's arguments.
EXCLUSIONS = "exclude_from_weight_decay"
BUILT_ON = "built_on"
# Arguments that are lists of objects.
OBJECTS = ("transforms", "averaging", "groups")


class Optimizer(Configurable, keras.optimizers.Optimizer):
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

    learning_rate: RateOrSchedule = LearningRate(default=0.001)
    weight_decay: FloatOrSchedule | None = NonNegative(True, default=None, kw_only=True)
    clipnorm: FloatOrSchedule | None = NonNegative(
        True, True, default=None, kw_only=True
    )
    clipvalue: FloatOrSchedule | None = NonNegative(
        True, True, default=None, kw_only=True
    )
    global_clipnorm: FloatOrSchedule | None = NonNegative(
        True, True, default=None, kw_only=True
    )
    use_ema: bool = Switch(default=False, kw_only=True)
    ema_momentum: FloatOrSchedule = DecayRate(
        allow_one=True, default=0.99, kw_only=True
    )
    ema_overwrite_frequency: int | None = Count(1, default=None, kw_only=True)
    loss_scale_factor: FloatOrSchedule | None = Positive(
        True, default=None, kw_only=True
    )
    gradient_accumulation_steps: int | None = Count(
        2, fixed=True, default=None, kw_only=True
    )
    rounding: str = Choice(*ROUNDINGS, default="stochastic", kw_only=True)
    lazy: bool = Switch(default=False, kw_only=True)
    transforms: Sequence[Stage] = Objects(default=(), kw_only=True)
    averaging: Stage | Sequence[Stage] | None = Objects(default=(), kw_only=True)
    groups: Sequence[Group] = Objects(default=(), kw_only=True)
    if TYPE_CHECKING:  # Keras sets it.
        name: str | None = Objects(default=None, kw_only=True)

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
        exclusions = kwargs.pop(EXCLUSIONS, None)
        built_on = kwargs.pop(BUILT_ON, ())
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
            LearningRate().check(copies.deserialized(learning_rate)),
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
        self._check_lazy()
        self._engine = engine.create(self)
        self._part: Part | None = None
        self._skipped_before = 0
        self._decay_exclusions = Selection()
        self.undecayed: frozenset[int] = frozenset()
        self._frozen: frozenset[int] = frozenset()
        self._known: list[tuple[str, tuple[int, ...]]] = []  # what it was built on
        self._known_before: list[tuple[str, tuple[int, ...]]] = []  # and some more
        self._state_to_load = None
        self._numbers_before: list[np.ndarray] = []  # this was loaded
        self._may_skip_state = False
        self._unpickled_from: copies.Origin | None = None
        self._missed_to_load: np.ndarray | None = None
        self._set_from_config(exclusions, built_on)

    def _set_from_config(self, exclusions: Any, built_on: Any) -> None:
        """What a configuration has besides the constructor's arguments."""
        if exclusions:
            self._decay_exclusions = Selection.of_saved(exclusions)
        if built_on:
            self._known = [(path, tuple(shape)) for path, shape in built_on]

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
            if name not in known and name not in (EXCLUSIONS, BUILT_ON):
                raise ValueError(unknown_argument(cls, name, Optimizer))

    def configure(self, values: dict[str, Any]) -> None:
        """What a generated constructor does: Keras's part first."""
        shared = {x.name for x in Optimizer.shared_arguments()}
        shared |= {"learning_rate", EXCLUSIONS, BUILT_ON}
        of_base = {name: x for name, x in values.items() if name in shared}
        Optimizer.__init__(self, **of_base)
        super().configure({k: x for k, x in values.items() if k not in shared})

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # The top-level package's name keeps your `Adam` apart from ours.
        package = cls.__module__.partition(".")[0]
        keras.saving.register_keras_serializable(package)(cls)
        overrides.check_class(cls, (Optimizer,), overrides.IGNORED)

    def __setattr__(self, name: str, value: Any) -> None:
        overrides.check_assignment(self, name, overrides.IGNORED)
        check_attribute(self, name)
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return representation.shown(self, Optimizer, always=("learning_rate",))

    def __str__(self) -> str:
        return representation.with_a_word_for_tf_keras(self)

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
        if not self.elementwise:
            raise ValueError(
                f"`lazy=True` can't be combined with {type(self).__name__}: its step "
                "for a row depends on the other rows. Received: lazy=True"
            )
        if self.transforms:
            raise ValueError(
                "`lazy=True` can't be combined with `transforms`: they see whole "
                f"tensors. Received: transforms={list(self.transforms)}"
            )
        on_rows = [x for x in self.averaging if x.where == "write"]
        if not all(x.elementwise for x in on_rows):
            raise ValueError(
                "`lazy=True` can't be combined with stages on the written weight that "
                "aren't `elementwise`: they see whole tensors. Received: "
                f"averaging={list(self.averaging)}"
            )

    # ------------------------------------------------------------- building

    def build(self, variables: list[Any]) -> None:
        """Makes the state for `variables`.

        Called by the first `apply`, and by `fit`. In a custom training
        loop under a strategy, call it inside `strategy.scope()`.

        Args:
            variables: the trained variables, `model.trainable_variables`.

        Raises:
            ValueError: a variable's dtype can't be trained, it belongs to
                another strategy, or a group has a member that isn't there.
        """
        if not self.built:
            # Once more: a class can be given a method after it was made.
            overrides.check_class(type(self), (Optimizer,), overrides.IGNORED)
            overrides.check_instance(self, overrides.IGNORED)
            variables = checked_variables(variables)
            if not variables:
                return  # So Keras builds the optimizer of a model that it loads of `.h5`.
            if self._unpickled_from is not None:
                self._check_origin(variables)
            for variable in variables:
                if not self._overwrite_variable_with_gradient(variable):
                    check_dtype(variable)
                    self._engine.check_variable(variable)
            saved, self._known = self._known, known_by(variables, self._known)
            if set(self._known) < set(saved):
                self._known_before = saved
            self._find_members(Trained(variables, [path for path, _ in self._known]))
            with self._engine.building():
                super().build(variables)  # averages, then accumulators
                state, parts = self._build_state(variables)
                self._engine.build(state, parts, self._build_model_state(state))
                if self._record_of_missed() is not None:  # By an earlier `restore`.
                    self._handle_deferred_dependencies(
                        counts.MISSED, self._record_of_missed()
                    )
        if self._state_to_load is not None:
            with self._engine.building():
                self._assign_pending_state()
                self._assign_missed()

    def _check_origin(self, variables: list[Any]) -> None:
        """That the state that came with a pickle is of these variables."""
        keys = [self._var_key(v) for v in variables]
        with self._engine.building():
            if not self._unpickled_from.is_of(keys, variables):
                if int(self._iterations) > 0:
                    raise ValueError(copies.of_another_model(self.name, variables))
                # It hasn't trained.
                self._state_to_load = self._missed_to_load = None
        self._unpickled_from = None

    def _find_members(self, trained: Trained) -> None:
        for group in self.groups:
            group.find(trained, some_are_gone=bool(self._known_before))
        check_overlaps(self.groups, trained.paths)
        self._frozen = frozen_indices(self.groups)
        found = self._decay_exclusions.find(trained)
        self.undecayed = frozenset(i for places in found for i in places)

    def _build_state(
        self, variables: list[Any]
    ) -> tuple[list[dict | None], list[Part | None]]:
        """Makes the slots; returns each variable's state (see `Engine`) and its rule."""
        own = [not self._overwrite_variable_with_gradient(v) for v in variables]
        parts = [
            part if is_own else None
            for part, is_own in zip(self.parts(self._known), own, strict=True)
        ]
        state: list[dict | None] = [
            {"weight": v, RULE: {}} if is_own else None
            for v, is_own in zip(variables, own, strict=True)
        ]
        self._slots_start = len(self.variables)
        for group in slot_groups(parts):
            for tensors, slots in zip(state, group, strict=True):
                for letter, slot in slots.items():
                    tensors[RULE][letter] = self._add_slot(tensors["weight"], slot)
        trained = [(i, tensors) for i, tensors in enumerate(state) if tensors]
        for i, tensors in trained:
            if self.gradient_accumulation_steps:
                tensors[ACCUMULATION] = {"sum": self._accumulated_gradients[i]}
            if self.use_ema:
                average = self._model_variables_moving_average[i]
                tensors[EMA] = {"average": average}
            weight = tensors["weight"]
            if self.rounding == "compensated" and is_narrow(dtype_name(weight)):
                lost = self.add_variable_from_reference(weight, name="compensation")
                tensors[COMPENSATION] = {"lost": lost}
        for number, stage in stage_owners(self):
            slots = each_slot(stage.slots)
            for i, tensors in trained if slots else ():
                if stage.acts_on(*self._known[i]):
                    tensors[key_of(number, stage)] = {
                        letter: self._add_slot(tensors["weight"], slot)
                        for letter, slot in slots.items()
                    }
        return state, parts

    def _build_model_state(self, state: list[dict | None]) -> dict[int, dict]:
        """Makes the slots of rules for the whole model, owner by owner."""
        dtypes = {compute_dtype(dtype_name(t["weight"])) for t in state if t}
        dtype = "float64" if "float64" in dtypes else "float32"
        made: dict[int, dict] = {}
        for number, owner in enumerate(self.owners()):
            slots = dict(owner.model_rule.slots) if owner.model_rule else {}
            if number == OPTIMIZER and self.evaluation is not None:
                slots[EVALUATING] = (EVALUATING, 0.0)
            if slots or owner.model_rule:  # A rule may have none.
                made[number] = {}
            for letter, (name, start) in slots.items():
                made[number][letter] = self.add_variable(
                    shape=(),
                    initializer=_filled_with(start),
                    dtype=dtype,
                    aggregation="only_first_replica",
                    name=name,
                )
        return made

    def owners(self) -> list[Any]:
        """The objects that own hyperparameters; this optimizer is the first."""
        return [self, *self.stages(), *self.groups]

    def stages(self) -> list[Stage]:
        """The stages that were passed, in the order in which they run."""
        return [*self.transforms, *self.averaging]

    def part(self, path: str, shape: tuple[int, ...]) -> Part:
        """The rule and the slots of one variable.

        Override it where variables are trained by different rules. Return the
        same object for those that are trained alike.

        Args:
            path: of the variable.
            shape: its shape.
        """
        if self._part is None:
            self._part = Part(self.rule, self.slots)
        return self._part

    def parts(self, variables: list[tuple[str, tuple[int, ...]]]) -> list[Part]:
        """The `part` of each variable, given the path and shape of all of them.

        Override it where one can't be told from another by its path alone.
        """
        return [self.part(path, shape) for path, shape in variables]

    def _add_slot(self, weight: Any, slot: Slot) -> Any:
        shape = shape_of(weight)
        has_meaning = slot.name in ("average", "compensation")  # of another one there
        if slot.shape is None and not slot.starts_at_weight and not has_meaning:
            start = slot.start
            return self.add_variable_from_reference(
                weight,
                name=slot.name,
                initializer=start if callable(start) else _filled_with(start),
            )
        return self._add_beside(
            weight,
            slot.name,
            compute_dtype(dtype_name(weight)),
            shape if slot.shape is None else slot.shape(shape),
            slot.starts_at_weight,
            slot.start if callable(slot.start) else _filled_with(slot.start),
        )

    def add_variable_from_reference(
        self, reference_variable: Any, name: str | None = None, initializer="zeros"
    ) -> Any:
        """Makes one slot for a variable, of its shape and beside it.

        As Keras's, but the slots of bfloat16 and float16 weights are float32,
        and an average starts at the weight.
        """
        dtype = dtype_name(reference_variable)
        if name not in ("average", "compensation"):
            dtype = compute_dtype(dtype)
        return self._add_beside(
            reference_variable,
            name or "var",
            dtype,
            shape_of(reference_variable),
            name == "average",
            initializer,
        )

    def _add_beside(
        self,
        weight: Any,
        name: str,
        dtype: str,
        shape: Any,
        starts_at_weight: bool,
        initializer: Any = "zeros",
    ) -> Any:
        # Else it starts there at the variable's first update.
        if starts_at_weight and self._engine.has_value(weight):

            def initializer(shape: Any, dtype: Any) -> Any:
                # A copy: on PyTorch the tensor is the weight's own memory.
                return keras.ops.copy(keras.ops.cast(weight, dtype))

        path = path_of(weight).replace("/", "_").replace(":", "_")
        same_shape = tuple(shape) == shape_of(weight)
        with self._engine.colocated(weight):
            return self.add_variable(
                shape=shape,
                initializer=initializer,
                dtype=dtype,
                name=f"{path}_{name}",
                layout=_layout_of(weight) if same_shape else None,
            )

    # -------------------------------------------------------------- running

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

    @engine.without_autograph
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
            with engine.outside_of_graphs():
                factor = self.current("loss_scale_factor")
            if engine.in_a_graph():  # See the engine's `building`.
                self.__dict__["_scaled_in_a_graph"] = True
        if "float" not in str(getattr(loss, "dtype", "")):
            if isinstance(loss, float | int) and not keras.ops.is_tensor(factor):
                return loss * factor
            loss = keras.ops.cast(loss, keras.backend.floatx())  # a number, or counts
        return loss * keras.ops.cast(factor, loss.dtype)

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
            _, shape = self._known[i]
            if not same_shape(g, shape):
                raise ValueError(
                    f"The gradient of {path_of(variable)} must have its shape "
                    f"{shape}. Received: {shown_shape(g)}."
                    + self._word_of_another_shape(variable, shape)
                )
        return variables, indices

    def _word_of_another_shape(self, variable: Any, shape: tuple[int, ...]) -> str:
        with engine.outside_of_graphs():
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

    def carry_over(
        self,
        variables: list[Any],
        groups: list[Group] | None = None,
        **settings: Any,
    ) -> Optimizer:
        """Returns this optimizer for other variables, with the state it has.

        For after layers were frozen, unfrozen or added: the state of variables
        that both know goes on, that of the others starts anew.

        Bias correction counts the updates of each variable. Counts that differ are an
        extra record, `missed_updates`, in `.keras` and `.weights.h5` files and in
        `tf.train.Checkpoint`; Keras's optimizers can't load such a file.

        Args:
            variables: those that the new optimizer is to train.
            groups: None for this one's groups, or others, as in the constructor.
            **settings: arguments of the constructor that are to be others, such as
                `roles=tf_effopt.roles(model)` after a layer was added.

        Returns:
            An optimizer with this one's settings, built on `variables`.
        """
        other = self._unbuilt_copy(groups=groups, settings=settings)
        if other._known and self.built:
            own = {
                self._var_key(v): known
                for v, known in zip(self._trainable_variables, self._known, strict=True)
            }
            other._known = [
                own.get(self._var_key(v), known)
                for v, known in zip(variables, paths_and_shapes(variables), strict=True)
            ]
        other.build(variables)
        if not self.built:
            return other
        indices = self._trainable_variables_indices
        other._take_state(self, [indices.get(self._var_key(v)) for v in variables])
        other._iterations.assign(keras.ops.copy(self._iterations.value))
        return other

    def _take_state(self, other: Optimizer, places: list[int | None]) -> None:
        """Takes that of another optimizer, given where it has each variable."""
        mine, its = self._engine, other._engine
        taken: list[int | None] = [None] * len(places)
        for i, place in enumerate(places):
            if place is None or its.state[place] is None:
                continue
            if its.variables[place].part == mine.variables[i].part:
                _copy_state(its.state[place], mine.state[i])
                taken[i] = None if place in other._frozen else place
        _copy_state(its.model_state, mine.model_state)
        steps = int(keras.ops.convert_to_numpy(other._iterations))
        missed = its.missed()
        missed = counts.missed_updates(
            steps // (self.gradient_accumulation_steps or 1),
            steps // (other.gradient_accumulation_steps or 1),
            np.zeros(len(its.state), "int64") if missed is None else missed,
            taken,
        )
        # Where no rule has anything to do, there is nothing to count.
        missed[[tensors is None for tensors in mine.state]] = 0
        mine.set_missed(missed)

    def _unbuilt_copy(
        self, groups: Any = None, memo: dict | None = None, settings: dict | None = None
    ) -> Optimizer:
        config, memo = self.get_config(), memo or {}
        for name in (EXCLUSIONS, BUILT_ON):
            config.pop(name, None)
        if not isinstance(self._learning_rate, keras.Variable):
            config["learning_rate"] = self._learning_rate
        for name in ("transforms", "averaging"):
            stages = getattr(self, name)
            config[name] = [x.from_config(x.get_config()) for x in stages]
        groups_are_kept = groups is None
        if groups_are_kept:
            groups = [group.copy(memo) for group in self.groups]
        config["groups"] = groups
        config |= settings or {}
        with self._engine.building():  # under this one's strategy
            other = type(self)(**config)
        other._decay_exclusions = self._decay_exclusions.copy(memo)
        if groups_are_kept and not settings:  # Else the user goes by paths as they are.
            other._known = self._known
        other._engine.divides_matrices = self._engine.divides_matrices
        other._engine.gradient_dtype = self._engine.gradient_dtype
        if self._state_to_load is not None:
            other._state_to_load = self._state_to_load
            other._numbers_before = self._numbers_before
            other._may_skip_state = self._may_skip_state
            other._missed_to_load = self._missed_to_load
            other._iterations.assign(keras.ops.copy(self._iterations.value))
        return other

    def __deepcopy__(self, memo: dict) -> Optimizer:
        """A second optimizer with the same state, for the same variables.

        In a deep copy of a whole model, for the copies of its variables.
        """
        other = self._unbuilt_copy(memo=memo)
        memo[id(self)] = other
        other._unpickled_from = self._unpickled_from
        if self.built:
            copied = copies.copied_variables(memo)
            other.build([copied.get(id(v), v) for v in self._trainable_variables])
            for mine, copied in zip(self.variables, other.variables, strict=True):
                copied.assign(keras.ops.copy(mine.value))
            other._engine.set_missed(self._engine.missed())
        return other

    def __reduce__(self) -> tuple:
        """`pickle`'s: with the state, which waits for `build`."""
        return copies.reduced(super().__reduce__(), self)

    def __sklearn_clone__(self) -> Optimizer:
        """scikit-learn's `clone`, whose copies are to be fitted anew."""
        return copies.fresh(self)

    @property
    def skipped_steps(self) -> int | None:
        """Steps that changed nothing because the gradient wasn't finite.

        Not part of the saved state: it counts since this object was made.
        None on Keras's JAX backend, whose compiled step can keep no such count.
        """
        return self._engine.skipped_steps()

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

    def finalize_variable_values(self, var_list: list[Any]) -> None:
        """Ends training: averages take the place of the weights.

        `fit` calls it after its last epoch.

        Args:
            var_list: the model's trainable variables; others stay as they are.
        """
        if not keras_hooks.has_value(self._iterations):
            return  # JAX's `fit` took the values, and ends by an error of the step.
        # Weights for evaluation are an average already.
        if self.use_ema and self._has_updated() and self.evaluation is None:
            indices = [
                self._trainable_variables_indices[self._var_key(v)]
                for v in var_list
                if self._var_key(v) in self._trainable_variables_indices
            ]
            self._engine.overwrite_with_averages(indices)
        if self.evaluation is not None and self.built and not self.is_evaluating:
            self.use_evaluation_weights()
            warnings.warn(
                f"{self.name}: the weights for evaluation are in place now; during "
                "`fit` they weren't, also not for its validation and checkpoints. "
                "Pass `callbacks=[tf_effopt.callbacks.EvaluationWeights()]` to `fit`.",
                stacklevel=2,
            )
        skipped = self.skipped_steps or 0
        if skipped > self._skipped_before:
            names = description.not_finite(self)
            advice = (
                "If it isn't for loss scaling that finds its scale, look for a "
                "division by zero or a too high learning rate."
            )
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                advice = (
                    "These variables aren't finite, so that no later step can be: "
                    f"{', '.join(names[:5])}{more}. Start again from a checkpoint."
                )
            warnings.warn(
                f"{self.name}: {skipped - self._skipped_before} steps changed "
                "nothing: the norm of their gradient, or their learning rate, wasn't "
                f"finite. {advice}",
                stacklevel=2,
            )
        self._skipped_before = skipped

    # --------------------------------------------------- weights for evaluation

    def use_evaluation_weights(self) -> None:
        """Puts in place the weights at which to evaluate and use the model.

        For optimizers such as `ScheduleFreeAdamW`, which train at others; for
        the rest nothing happens. In `fit`, `callbacks.EvaluationWeights` calls it.
        """
        self._switch(to_evaluation=True)

    def use_training_weights(self) -> None:
        """Puts back the weights at which to train; see `use_evaluation_weights`."""
        self._switch(to_evaluation=False)

    @property
    def is_evaluating(self) -> bool:
        """Whether the weights in place are those for evaluation."""
        if self.evaluation is None or not self.built:
            return False
        mark = self._engine.model_state[OPTIMIZER][EVALUATING]
        return bool(float(keras.ops.convert_to_numpy(mark)) > 0)

    def _switch(self, to_evaluation: bool) -> None:
        if self.evaluation is None:
            return
        if not self.built:
            if self._state_to_load is not None:
                raise ValueError(
                    f"{self.name}: which weights are in place is part of the state that "
                    "was loaded and waits for `build`: call "
                    "`optimizer.build(model.trainable_variables)` first."
                )
            return
        if self._has_updated() and self.is_evaluating != to_evaluation:
            self._engine.switch(to_evaluation)

    def _has_updated(self) -> bool:
        """Whether at least one update was applied."""
        micro_steps = int(keras.ops.convert_to_numpy(self._iterations))
        return self.built and micro_steps >= (self.gradient_accumulation_steps or 1)

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

    def describe(self, of: Any = None) -> str:
        """A table of the variables: shape, rule, learning rate, weight decay.

        The learning rate is the multiplier of the variable's groups, as it is now.
        Works before the first step, too, for the model that was compiled with this
        optimizer.

        Args:
            of: a model, or a list of variables, to see what this optimizer would do
                with them. None: the variables that it was built on, or those of the
                model that was compiled with it. If there is none, or several, the
                text says so after the optimizer's settings.

        >>> import keras, tf_effopt
        >>> model = keras.Sequential(
        ...     [keras.Input((8,)), keras.layers.Dense(2, name="logits")], name="small")
        >>> print(tf_effopt.AdamW(groups=[
        ...     tf_effopt.Group("bias", weight_decay=0.0)]).describe(model))
        variable             shape   learning rate  weight decay
        small/logits/kernel  (8, 2)  x 1            0.004
        small/logits/bias    (2,)    x 1            0
        """
        return description.described(self, of)

    # --------------------------------------------------------------- saving

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, with their values now."""
        config = super().get_config()
        for cls in (type(self), Optimizer):
            for name in constructor_arguments(cls):
                if name not in config:
                    config[name] = getattr(self, name)
        config = {name: serialized(value) for name, value in config.items()}
        for name in OBJECTS:
            things = getattr(self, name)
            config[name] = [keras.saving.serialize_keras_object(x) for x in things]
        if self._decay_exclusions:
            config[EXCLUSIONS] = self._decay_exclusions.get_config()
        if self._known:
            config[BUILT_ON] = [[path, list(shape)] for path, shape in self._known]
        return config

    @classmethod
    def from_config(cls, config: dict, custom_objects: dict | None = None) -> Optimizer:
        """Makes an optimizer from what `get_config` returned."""
        config = dict(config)
        exclusions = config.pop(EXCLUSIONS, None)
        built_on = config.pop(BUILT_ON, ())
        for name in OBJECTS:
            config[name] = [
                keras.saving.deserialize_keras_object(x, custom_objects=custom_objects)
                for x in config.get(name, ())
            ]
        optimizer = super().from_config(config, custom_objects=custom_objects)
        optimizer._set_from_config(exclusions, built_on)
        return optimizer

    def save_own_variables(self, store: Any) -> None:
        """Saves the state, also one that was loaded and waits for `build`."""
        missed = self._missed_to_load
        if self._state_to_load is None:
            super().save_own_variables(store)
            missed = self._engine.missed()
        else:
            for i, value in enumerate(self._pending_state()):
                store[str(i)] = value
        if missed is not None:
            store[counts.MISSED] = missed

    def load_own_variables(self, store: Any) -> None:
        """Loads the state that this class, or Keras's own of its name, saved.

        An optimizer that isn't built yet keeps it until it is, but for the number of
        updates and the learning rate, which are in place at once.

        Raises:
            ValueError: the state is that of another optimizer or model.
        """
        keys = set(store.keys())
        state = [np.array(store[str(i)]) for i in range(len(keys - {counts.MISSED}))]
        state = saving.without_loss_scale(state)
        if not state:
            return  # The file is of a model that wasn't compiled.
        self._missed_to_load = (
            np.array(store[counts.MISSED]) if counts.MISSED in keys else None
        )
        self._numbers_before = self._numbers_now()
        self._may_skip_state = keras_hooks.skips_mismatches()
        if self.built:
            self._assign_state(state)
            self._assign_missed()
        elif saving.is_untrained(state) or saving.fits(
            self._in_this_layout(state), self.variables
        ):
            self._assign_state(state)
            if int(self._iterations) > 0:
                # It has trained, so `build` must not add slots to this state.
                self._state_to_load = state
        else:
            self._state_to_load = state
            for variable, value in zip(self._numbers(), state, strict=False):
                if value.shape == ():  # else it isn't this optimizer's: `build` says so
                    variable.assign(value)

    def set_weights(self, weights: list[Any]) -> None:
        """Sets the state, as Keras's; before `build` it waits, as what was loaded.

        Args:
            weights: values of this optimizer's `variables`, in their order.

        Raises:
            ValueError: the state is that of another optimizer or model.
        """
        values = map(keras.ops.convert_to_numpy, weights)
        self.load_own_variables({str(i): value for i, value in enumerate(values)})

    def _pending_state(self) -> list[np.ndarray]:
        """The state that waits for `build`; what may have changed since, as it is now."""
        state, numbers = list(self._state_to_load), self._numbers_now()
        state[0] = numbers[0]
        if len(numbers) > 1 and self._has_rate(state):
            state[1] = numbers[1]
        return state

    def _has_rate(self, state: list[np.ndarray]) -> bool:
        """Whether a state that waits has a learning rate."""
        if len(state) < 2 or state[1].shape != ():
            return False
        # A scalar weight's first slot looks like one.
        lacks = self.built and saving.fits([state[0], *state], self.variables)
        return not lacks

    def _assign_pending_state(self) -> None:
        state, loaded = self._pending_state(), self._state_to_load
        self._state_to_load = None
        if not self._has_rate(loaded):
            self._put_numbers_back(loaded, first=1)
        try:
            self._assign_state(state)
        except ValueError as error:
            if not self._may_skip_state:
                raise
            self._put_numbers_back(loaded)
            self._missed_to_load = None
            warnings.warn(
                f"{self.name}: the training starts with no state, since the weights "
                f"were loaded with `skip_mismatch=True`. {error}",
                stacklevel=4,
            )

    def _put_numbers_back(self, loaded: list[np.ndarray], first: int = 0) -> None:
        """Undoes what loading has set before `build`, unless it was changed since."""
        for variable, value, before in list(
            zip(self._numbers(), loaded, self._numbers_before, strict=False)
        )[first:]:
            if value.shape == () and value == keras.ops.convert_to_numpy(variable):
                variable.assign(before)

    def _numbers_now(self) -> list[np.ndarray]:
        return [np.array(keras.ops.convert_to_numpy(v)) for v in self._numbers()]

    def _numbers(self) -> list[keras.Variable]:
        """What is there before `build`, and first in the state.

        The number of updates and, unless it is a schedule, the learning rate.
        """
        rate = self._learning_rate
        return [self._iterations, *([rate] if isinstance(rate, keras.Variable) else [])]

    def _assign_state(self, state: list[np.ndarray]) -> None:
        if saving.is_untrained(state):
            for variable, value in zip(self._numbers(), state, strict=False):
                variable.assign(value)
            return
        variables = self.variables
        state = self._in_this_layout(state)
        if self._known_before and not saving.fits(state, variables):
            self._assign_some_of(state)
            return
        saving.check_fits(self.name, state, variables)
        for variable, value in zip(variables, state, strict=True):
            variable.assign(value)

    def _in_this_layout(self, state: list[np.ndarray]) -> list[np.ndarray]:
        """The state as this optimizer has it, if it can be brought to that."""
        for candidate in saving.with_rate_as(state, self._numbers_now()):
            if saving.fits(candidate, self.variables):
                return candidate
            if not self.built:
                continue
            first = self._slots_start
            slots = self.convert_keras_slots(candidate[first:], steps=int(candidate[0]))
            if slots is not None and saving.fits(
                candidate[:first] + slots, self.variables
            ):
                return candidate[:first] + slots
        return state

    def _assign_missed(self) -> None:
        """Assigns what variables missed of the updates, by the state just loaded."""
        missed, self._missed_to_load = self._missed_to_load, None
        if missed is not None and len(missed) != len(self._trainable_variables):
            raise ValueError(
                f"The saved state doesn't fit {self.name!r}: it has counts of updates "
                f"of {len(missed)} variables, and the optimizer trains "
                f"{len(self._trainable_variables)}. Train the variables that it was "
                "saved with."
            )
        self._engine.set_missed(missed)

    def _assign_some_of(self, state: list[np.ndarray]) -> None:
        """Assigns what is of the variables that are still trained."""
        whole = self._unbuilt_copy(groups=[])
        whole._known, whole._state_to_load = self._known_before, None
        dtypes = [dtype_name(v) for v in self._trainable_variables]
        dtype = dtypes[0] if dtypes else None
        with self._engine.building(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `build` has said what there is to say.
            whole.build([stand_in(*known, dtype) for known in whole._known])
            whole._assign_state(state)
            whole._missed_to_load = self._missed_to_load
            whole._assign_missed()
        places = [whole._known.index(known) for known in self._known]
        self._take_state(whole, places)
        self._missed_to_load = self._engine.missed()
        for mine, other in zip(self._numbers(), whole._numbers(), strict=True):
            mine.assign(keras.ops.copy(other.value))

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> dict:
        """TensorFlow's: what is saved below this object."""
        children = super()._trackable_children(save_type, **kwargs)
        if save_type == "savedmodel":
            # A function that calls `apply` takes them along. In a checkpoint they'd
            # be missing from every file of Keras's optimizers, and of earlier versions.
            own = self._engine.untracked_variables()
            children |= {f"_engine{name}": x for name, x in own.items()}
        elif self._record_of_missed() is not None and self._engine.missed() is not None:
            children[counts.MISSED] = self._record_of_missed()
        return children

    def _lookup_dependency(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if name == counts.MISSED and self._record_of_missed() is not None:
            return self._record_of_missed()
        return super()._lookup_dependency(name, *args, **kwargs)

    def _record_of_missed(self) -> Any:
        return getattr(self._engine, "missed_record", None) if self.built else None

    def convert_keras_slots(
        self, saved: list[np.ndarray], steps: int
    ) -> list[np.ndarray] | None:
        """The slots from those that Keras's class of the same name saved.

        For classes whose slots differ from Keras's on purpose.

        Args:
            saved: what comes after averages and accumulators in Keras's state.
            steps: of the saved training.

        Returns:
            The values of this optimizer's slots, or None if `saved` isn't Keras's.
        """
        return None


Optimizer.__init__.made_of_fields = True  # A subclass that declares more gets its own.


def _chosen(places: list[int], *lists: list) -> Iterator[list]:
    """What is at these places of each list."""
    return ([of[k] for k in places] for of in lists)


def _filled_with(value: float) -> Callable:
    """An initializer; Keras's `Constant` goes through float32."""

    def initializer(shape: tuple[int, ...], dtype: str) -> Any:
        return keras.ops.convert_to_tensor(np.full(shape, value, dtype))

    return initializer


def _layout_of(weight: Any) -> Any:
    """How a Keras variable is divided among devices on JAX, or None."""
    if not isinstance(weight, keras.Variable):
        return None
    return private_names.attribute(weight, "_layout")


def _copy_state(source: dict, target: dict) -> None:
    for name, variable in target.items():
        if name not in source or name == "weight":
            continue
        if isinstance(variable, dict):
            _copy_state(source[name], variable)
        else:
            variable.assign(keras.ops.copy(source[name].value))
