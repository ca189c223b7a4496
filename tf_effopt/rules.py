"""What an optimizer tells the engine: its rules, their slots, what they share.

Most optimizers need none of these by name: a class attribute `rule` and a dict
`slots` are a `Part` for all tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Slot:
    """A tensor of state that a rule keeps beside each weight.

    Args:
        name: under which it is saved.
        shape: None for the weight's shape, or a function from that shape to
            the slot's.
        starts_at_weight: whether it starts as a copy of the weight.
        start: the number at which it starts otherwise, or one of Keras's
            initializers.
    """

    name: str
    shape: Callable[[Shape], Shape] | None = None
    starts_at_weight: bool = False
    start: float | Callable = 0.0


class Slots(dict[str, str | Slot]):
    """Letter in a rule -> the name that is saved, or a `Slot`."""


@dataclasses.dataclass(frozen=True)
class Matrices:
    """How a tensor is looked at as matrices of shape `(inputs, outputs)`.

    Axes that are neither count the matrices: each is one of its own.

    Args:
        inputs, outputs: the axes whose product is the rows, and the columns.
        split: the shape that the tensor is brought to first, if its own axes
            hold several matrices side by side; `inputs` and `outputs` are
            axes of it.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    split: Shape | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """The rule of some of the tensors.

    Args:
        rule: `(g, slots, *, ...) -> (delta, slots)`, a pure function.
        slots: what the rule keeps; a tuple where Keras saves one group of
            slots after the other.
        settings: keyword arguments of the rule that are fixed for these
            tensors.
        matrices: for a rule of matrices: how these tensors are looked at. The
            rule gets many tensors of a shape at once, `(n, inputs, outputs)`:
            it works on the last two axes. So do its slots, if they have the
            weight's shape; of others, the first axis counts the matrices.
        name: for people: which of the optimizer's rules this is.
        weight_decay: the name of the class's hyperparameter that decays these
            tensors. A rule that decays itself takes it as `weight_decay`.
    """

    rule: Callable
    slots: Slots | tuple[Slots, ...] = ()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    matrices: Matrices | None = None
    name: str = ""
    weight_decay: str = "weight_decay"

    def groups(self) -> list[dict[str, Slot]]:
        """The slots, group by group, each as a `Slot`."""
        groups = self.slots if isinstance(self.slots, tuple) else (self.slots,)
        return list(map(each_slot, groups))


@dataclasses.dataclass(frozen=True)
class ModelRule:
    """A rule for numbers that belong to the whole model, once per update.

    Args:
        rule: `(sums, slots, *, ...) -> (numbers, slots)`, a pure function of
            scalars. The numbers are then keyword arguments of the tensors'
            rule. Its own keyword-only arguments are `t`, `learning_rate`, and
            hyperparameters.
        slots: symbol in the rule -> `(name that is saved, start)`.
        measure: None, or `(g, slots, *, ...) -> sums`, called for each tensor
            before its rule, with what the rule may take and with `slots` of
            both: the tensor's, and the model's as keyword arguments. `sums`
            is a dict of scalars; `rule` gets their sums over all tensors.
        each_count: whether the numbers are those of each variable by its count of
            updates: `rule` depends on `t` and hyperparameters alone, has no slots
            and no `measure`, and is called with a vector of counts as `t`. What a
            rule makes of `t` alone belongs here: it is computed once for all
            variables, and the step compiles faster.

    Raises:
        ValueError: `each_count` with `slots` or `measure`.
    """

    rule: Callable
    slots: Mapping[str, tuple[str, float]] = dataclasses.field(default_factory=dict)
    measure: Callable | None = None
    each_count: bool = False

    def __post_init__(self):
        if self.each_count and (self.slots or self.measure is not None):
            raise ValueError(
                "A `ModelRule` with `each_count=True` has numbers of each variable, made "
                "of its count alone: it can't have `slots` or `measure`, which are of "
                f"the whole model. Received: slots={dict(self.slots)}, "
                f"measure={self.measure}. Leave them out, or `each_count`."
            )


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """For rules that train at other weights than the model is to be used at.

    Args:
        to_evaluation: `(w, slots, *, ...) -> w`, from the weights of training to
            those of evaluation, a pure function of one tensor.
        to_training: the way back.
    """

    to_evaluation: Callable
    to_training: Callable


def each_slot(slots: Slots) -> dict[str, Slot]:
    """Letter -> `Slot`, for all that a rule or a stage keeps."""
    return {k: Slot(x) if isinstance(x, str) else x for k, x in slots.items()}


def slot_groups(parts: list[Part | None]) -> Iterator[list[dict[str, Slot]]]:
    """Yields for each group of slots what each tensor has in it."""
    groups = [[] if part is None else part.groups() for part in parts]
    for i in range(max(map(len, groups), default=0)):
        yield [own[i] if i < len(own) else {} for own in groups]
