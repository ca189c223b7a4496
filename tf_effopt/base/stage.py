"""Steps around a rule, whichever rule it is: one contract for all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import keras

from tf_effopt.base import overrides, representation
from tf_effopt.base.arguments import constructor_arguments
from tf_effopt.base.configurable import Settings
from tf_effopt.engine.sent import SENT
from tf_effopt.rules import ModelRule, Slots

# What a replica sends of its gradient; the gradient before the rule; the step that the
# rule wants to take; the weight that is about to be written; that after the update.
PLACES = (SENT, "gradient", "update", "write", "average")
OF_TRANSFORMS = (SENT, "gradient", "update")
OF_AVERAGING = ("write", "average")
# Whose a stage's slots are: all replicas have the same, or each has different ones.
REPLICATED, PER_REPLICA = "replicated", "per_replica"


@dataclasses.dataclass(frozen=True)
class Function:
    """One function of a stage.

    Attributes:
        where: one of `PLACES`.
        function: it, or None where the stage only has numbers of the whole model.
        form: how it is called: `"stage"` as `(x, slots)`, `"before"` as `(g)`, `"after"`
            as `(delta, g)`.
    """

    where: str
    function: Callable | None
    form: str = "stage"


class Stage(Settings):
    """Base of the steps around a rule, built-in and custom.

    A stage is a pure function of one tensor, the state that it keeps for each tensor,
    and its hyperparameters, all declared in the class. It runs inside the compiled
    update, on each replica and backend:

    >>> import keras, tf_effopt
    >>> from tf_effopt import hyperparameters, rules
    >>> def smooth(g, slots, *, share):
    ...     mean = slots["mean"] + share * (g - slots["mean"])
    ...     return mean, {"mean": mean}
    >>> class Smooth(tf_effopt.Stage):
    ...     where = "gradient"
    ...     slots = rules.Slots(mean="mean_gradient")
    ...     function = staticmethod(smooth)
    ...     share: float = hyperparameters.Fraction(default=0.5)
    >>> w = keras.Variable([1.0])
    >>> optimizer = tf_effopt.SGD(0.1, transforms=[Smooth(share=0.25)])
    >>> optimizer.apply([keras.ops.convert_to_tensor([4.0])], [w])
    >>> round(float(w.numpy()[0]), 6)
    0.9

    A subclass sets:

    - `where`, what its function gets as `x` and returns changed:
      `"sent"`: the gradient of one replica, before the sum over replicas;
      `"gradient"`: the gradient, summed over replicas, accumulated and clipped, before
      the rule; `"update"`: the step that the rule wants to add to the weight;
      `"write"`: the new weight before it is rounded to the weight's dtype; `"average"`:
      the weight after each update;
    - `function`: `(x, slots, *, ...) -> (x, slots)`;
    - `slots`: a `tf_effopt.rules.Slots`, what it keeps for each tensor, in float32 for
      narrower weights. It is saved after the rule's slots. A slot that
      `starts_at_weight` starts at the weight before its first update.

    The first three are passed to an optimizer in `transforms=[...]`, the last two in
    `averaging=`. Keyword-only arguments come by name: hyperparameters of the class,
    numbers of its `model_rule`, `w` (the weight before the step; in `"average"` after
    it), `t` (the number of this update, from 1; in `"average"` an integer),
    `learning_rate` and `weight_decay` of the variable, `input_axes`, along which the
    weights of an output unit lie, `noise` (a function of a seed that returns standard
    normal numbers, the same on each replica), and in `"update"` and `"write"` also `g`,
    the gradient that the rule saw, and in `"write"` `delta`, what is added to the weight,
    and `rounded`, a function that rounds to the weight's dtype and back. Write functions
    with operators and `keras.ops`.

    A function at `"sent"` sees, at each micro-step, what this replica adds to the sum:
    with Keras's `fit`, its share of the batch's mean gradient, loss scaling undone. With
    one replica, and on JAX and PyTorch, that is the whole gradient. What it returns is
    summed in the dtype that it has. Its slots have the scope `"per_replica"`: each
    replica has different ones. Saving them forms their sum, so that every worker has to
    save; loading divides it evenly. So an error that is fed back, such as what a
    rounding lost, is complete on any number of replicas.

    Further settings of a class:

    - `reports`: names of slots of its `model_rule`, which `optimizer.reports()` shows;
    - `model_rule`: a `tf_effopt.rules.ModelRule`, for numbers of the whole model; not
      at `"sent"`, where no replica knows the others. If
      its numbers include `skip`, set `decides = True`: a step for which it is
      true changes no weight, slot, average or update count;
    - `clips`: whether gradients of which the squares overflow may come out so small
      that they don't. Else such a step is skipped without asking. The sums of its
      `model_rule` then have `shrunk_<name>`, too: of the gradient times
      `clipping.shrink(g)` where its squares overflow, else 0;
    - `look`: `(g, *, large, ...) -> dict`, what the function takes by name of a tensor,
      for a stage that clips: all tensors are looked at before any is changed. `large`
      is True where the squares of some gradient overflow, a Python boolean;
    - `elementwise`: whether what becomes of an element depends on it alone.

    A stage belongs to one optimizer. It is saved with the model, by its arguments.

    Args:
        A subclass takes its hyperparameters, in the order of their declarations.

    Raises:
        TypeError: `where` isn't one of the five, a report isn't a slot of the
            `model_rule`, or an argument isn't known.
    """

    where: ClassVar[str | None] = None
    function: ClassVar[Callable | None] = None
    slots: ClassVar[Slots] = Slots()
    model_rule: ClassVar[ModelRule | None] = None
    look: ClassVar[Callable | None] = None
    reports: ClassVar[tuple[str, ...]] = ()
    decides = False
    clips = False
    elementwise = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        package = cls.__module__.partition(".")[0]
        keras.saving.register_keras_serializable(package)(cls)
        if cls.where is not None and cls.where not in PLACES:
            places = ", ".join(map(repr, PLACES))
            raise TypeError(
                f"`where` of {cls.__name__} must be one of {places}. "
                f"Received: where = {cls.where!r}"
            )
        if cls.where == SENT and not (cls.model_rule is None and cls.look is None):
            raise TypeError(
                f"{cls.__name__} works on what one replica sends, where numbers of the "
                "whole model aren't known yet: leave `model_rule` and `look` out, or set "
                "`where` to 'gradient'."
            )
        # A `model_rule` may be a property, which depends on arguments.
        if cls.model_rule is None or isinstance(cls.model_rule, ModelRule):
            known = () if cls.model_rule is None else tuple(cls.model_rule.slots)
            for name in cls.reports:
                if name not in known:
                    raise TypeError(
                        f"`reports` of {cls.__name__} must be slots of its `model_rule`: "
                        f"{', '.join(known) or 'it has none'}. Received: {name!r}"
                    )

    @property
    def scope(self) -> str:
        """Whose its slots are: `"replicated"`, or `"per_replica"` at `"sent"`."""
        return PER_REPLICA if self.where == SENT else REPLICATED

    def __setattr__(self, name: str, value: Any) -> None:
        overrides.check_assignment(self, name, {})
        super().__setattr__(name, value)

    def functions(self) -> Iterator[Function]:
        """What it does, in order; the first one has its `model_rule`."""
        if self.where is None:
            raise TypeError(
                f"{type(self).__name__} doesn't say where it runs: set `where` in the "
                f"class to one of {', '.join(map(repr, PLACES))}."
            )
        yield Function(self.where, self.function)

    def attach(self, engine: Any) -> None:
        """Called when an optimizer with this stage is built."""
        self._engine = engine
        self.built = True

    def acts_on(self, path: str, shape: tuple[int, ...]) -> bool:
        """Whether its function acts on the variable of this path."""
        return True

    def slot(self, symbol: str) -> float:
        """The value of a slot of `model_rule` now; 0 before the first step."""
        if not self.built:
            return 0.0
        return self._engine.model_slot(self, symbol)

    def __repr__(self) -> str:
        return representation.shown(
            self, always=tuple(constructor_arguments(type(self)))
        )
