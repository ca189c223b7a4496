"""The base of what stands before or after a rule, whichever rule it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import keras

from tf_effopt import overrides, representation
from tf_effopt.arguments import (
    check_arguments,
    check_attribute,
    constructor_arguments,
)
from tf_effopt.rules import ModelRule


class Transform:
    """Base of the transforms of this package, and of custom ones.

    A transform changes the gradient before the rule, its step after it, or
    decides about a whole step. It runs inside the compiled update, in the
    order of the list that an optimizer takes, after clipping:

    >>> import keras, tf_effopt
    >>> def halved(g):
    ...     return g / 2
    >>> class Half(tf_effopt.transforms.Transform):
    ...     before = staticmethod(halved)
    >>> w = keras.Variable([1.0])
    >>> optimizer = tf_effopt.SGD(0.1, transforms=[Half()])
    >>> optimizer.apply([keras.ops.convert_to_tensor([1.0])], [w])
    >>> round(float(w.numpy()[0]), 6)
    0.95

    A subclass sets some of:

    - `before`: `(g, *, ...) -> g`, a pure function of one tensor's gradient;
    - `after`: `(delta, g, *, ...) -> delta`, of what the rule wants to add to
      the weight, and of the gradient that the rule saw;
    - `model_rule`: a `tf_effopt.rules.ModelRule`, for numbers of the whole model. If
      its numbers include `skip`, set `decides = True`: a step for which it is
      true changes no weight, slot, average or update count;
    - `clips`: whether gradients of which the squares overflow may come out so small
      that they don't. Else such a step is skipped without asking. The sums of its
      `model_rule` then have `shrunk_<name>`, too: of the gradient times
      `clipping.shrink(g)` where its squares overflow, else 0;
    - `look`: `(g, *, large, ...) -> dict`, what `before` takes by name of a tensor, for
      a transform that clips: all tensors are looked at before any is changed. `large`
      is True where the squares of some gradient overflow, a Python boolean.

    Keyword-only arguments come by name: hyperparameters of the class, numbers
    of its `model_rule`, `w`, `t`, `learning_rate`, and for `before` also `input_axes`,
    along which the weights of an output unit lie, and `noise`: a function of a seed
    that returns standard normal numbers, the same on each replica. Write them with
    operators and `keras.ops`.
    """

    before: Callable | None = None
    after: Callable | None = None
    model_rule: ModelRule | None = None
    look: Callable | None = None
    decides = False
    clips = False
    built = False
    _engine: Any = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        package = cls.__module__.partition(".")[0]
        keras.saving.register_keras_serializable(package)(cls)
        overrides.check_hyperparameters(cls)

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        check_arguments(cls, kwargs)
        return super().__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        overrides.check_assignment(self, name, {})
        check_attribute(self, name)
        super().__setattr__(name, value)

    def attach(self, engine: Any) -> None:
        """Called when an optimizer with this transform is built."""
        self._engine = engine
        self.built = True

    def acts_on(self, path: str, shape: tuple[int, ...]) -> bool:
        """Whether `before` and `after` act on the variable of this path."""
        return True

    def slot(self, letter: str) -> float:
        """The value of a slot of `model_rule` now; 0 before the first step."""
        if not self.built:
            return 0.0
        return self._engine.model_slot(self, letter)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, with their values now."""
        return {name: getattr(self, name) for name in constructor_arguments(type(self))}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Transform:
        return cls(**config)

    def __repr__(self) -> str:
        return representation.shown(
            self, always=tuple(constructor_arguments(type(self)))
        )
