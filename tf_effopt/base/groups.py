"""Groups: learning rate, weight decay and freezing of some variables."""

from __future__ import annotations

from typing import Any, ClassVar

import keras

from tf_effopt.base.configurable import Settings, serialized
from tf_effopt.base.representation import text
from tf_effopt.base.selection import Selection, Trained, has_no_weights, nothing_found
from tf_effopt.hyperparameters import Hyperparameter, NonNegative, Switch


class Members(Hyperparameter):
    """What a group is made of, fixed once the optimizer is built."""

    expected = (
        "a string of whole components of a path, `re.compile(...)`, a variable, "
        "a layer, or a list of these that isn't empty"
    )

    def check(self, value: Any) -> Selection:
        if isinstance(value, Selection):
            return value
        given = value if isinstance(value, list | tuple) else [value]
        try:
            selection = Selection.of(given)
        except ValueError as error:
            raise ValueError(f"{self.error(value)} ({error}.)") from None
        if not selection:
            raise self.error(value)
        return selection

    def structure(self, value: Selection) -> Selection:
        return value


class Multiplier(NonNegative):
    """Of the learning rate; 1 sets nothing."""

    def __set__(self, group: Group, value: Any) -> None:
        if group.built and self.check(value) != 1:
            optimizer = group._engine.optimizer
            paths = [path for path, _ in optimizer._built_on]
            others = [x for x in optimizer.groups if x is not group]
            for other in others:
                _check_pair(group, other, [self.name], paths, set_now=True)
        super().__set__(group, value)


# Of what `Group.get_config` returns; version 0.1.0 had none.
FORMAT = 2


@keras.saving.register_keras_serializable("tf_effopt")
class Group(Settings):
    r"""The learning rate and weight decay of some variables, or that they are frozen.

    Pass groups to any optimizer. A variable may be in none of them or in several, of
    which only one may set its multiplier, one its decay, and one freeze it. (Groups
    that version 0.1.0 saved go on as they did there: multipliers multiply, and the
    last `weight_decay` counts.)

    The multiplier is part of the learning rate that the rule gets, so that the
    decay, too, is multiplied by it. Both numbers may be changed while training,
    as those of the optimizer: `group.learning_rate_multiplier = 0.5`.
    `exclude_from_weight_decay` wins over each group's decay.

    Groups are saved with the optimizer: strings and regular expressions as they are,
    variables and layers by their paths. Where `load_model` numbers automatic names anew, the old
    paths count, as long as shapes, order and the rest of the names are the same.
    `print(optimizer.describe())` shows the result.

    When not to use it: to freeze a layer for all of the training, rather set its
    `trainable = False`: then no gradient is computed for it, and no state kept.

    Args:
        members: a string of one or more whole components of a variable's path, as
            `"bias"` or `"block_1/dense"`: `"block_1"` is no `block_10`; a compiled
            regular expression, which has a match anywhere in a variable's path, as
            `re.compile(r"norm|block_\d+/bias$")`; a variable; a layer or model, for all
            of its variables; or a list of these.
        learning_rate_multiplier: float of at least 0 or a schedule, times the
            optimizer's learning rate. 1, the default, sets nothing.
        weight_decay: None for the optimizer's own, or float of at least 0 or a schedule,
            also where the optimizer has none.
        frozen: bool, whether these variables stay as they are. Their gradients
            count nowhere, as if there were none. They keep their state, so that
            the optimizer's loads whether or not they are frozen.
        optional: bool, whether a member may be none of the variables that the
            optimizer is built on. Else that is an error. Layers whose `trainable`
            is False are none of them.

    Raises:
        ValueError: an argument is out of its range, or a string looks like a regular
            expression. When the optimizer is built: a member isn't there, or two
            groups set the same thing for one variable.

    Example:

    >>> import keras, tf_effopt
    >>> kernel, bias = keras.Variable([1.0], name="w"), keras.Variable([1.0], name="b")
    >>> optimizer = tf_effopt.SGD(0.5, groups=[
    ...     tf_effopt.Group("w", learning_rate_multiplier=0.5, weight_decay=0.4),
    ...     tf_effopt.Group(bias, frozen=True),
    ... ])
    >>> ones = keras.ops.ones(1)
    >>> optimizer.apply([ones, ones], [kernel, bias])
    >>> [round(float(v.numpy()[0]), 6) for v in (kernel, bias)]
    [0.65, 1.0]
    >>> print(optimizer.describe())
    variable  shape  learning rate  weight decay
    w         (1,)   x 0.5          0.4
    b         (1,)   frozen         -
    """

    members = Members()
    learning_rate_multiplier = Multiplier()
    weight_decay = NonNegative(optional=True)
    frozen = Switch()
    optional = Switch()

    model_rule = None  # of an owner of hyperparameters, as `Transform.model_rule`
    indices: ClassVar[frozenset[int]] = (
        frozenset()
    )  # of its variables, once it is built
    may_overlap = False  # whether version 0.1.0 saved it, where numbers multiplied

    def __init__(
        self,
        members,
        learning_rate_multiplier=1.0,
        weight_decay=None,
        frozen=False,
        optional=False,
    ):
        self.members = members
        self.learning_rate_multiplier = learning_rate_multiplier
        self.weight_decay = weight_decay
        self.frozen = frozen
        self.optional = optional

    def find(self, trained: Trained, is_subset: bool = False) -> None:
        """Finds its variables among those that its optimizer is built on.

        Args:
            trained: these variables.
            is_subset: whether the group has been found among these and others.

        Raises:
            ValueError: a member isn't there, and the group isn't optional.
        """
        if self.built:
            raise ValueError(
                f"{self!r} is another optimizer's already: make a group for each."
            )
        found = self.members.find(trained)
        lost = [
            member
            for member, of in zip(self.members.members, found, strict=True)
            # Beside others, a layer without weights, such as an activation, may stand.
            if not of and not (any(found) and has_no_weights(member))
        ]
        if lost and not (self.optional or is_subset):
            raise ValueError(
                f"{self!r} has members that are none of the "
                f"{len(trained.variables)} variables that the optimizer is built on:\n"
                f"{nothing_found(lost, trained)}\n"
                "Correct the member: a string is one or more whole components of a path. "
                "Or set `optional=True` in the group, if its members may be missing, as "
                "those of layers whose `trainable` is False are."
            )
        self.indices = frozenset(i for of in found for i in of)

    def sets(self, name: str) -> bool:
        """Whether it sets this argument for its variables."""
        kept = {"learning_rate_multiplier": 1.0, "weight_decay": None, "frozen": False}
        return getattr(self, name) != kept[name]

    def attach(self, engine: Any) -> None:
        """Called when the optimizer of this group is built."""
        self._engine = engine
        self.built = True

    def advice_on_change(self) -> str:
        """What to do instead of a change that comes too late."""
        return (
            "Go on with an optimizer that has other groups and keeps the state:\n"
            "    optimizer = optimizer.carry_over(model.trainable_variables, "
            "groups=[...])\n"
            "    model.compile(optimizer=optimizer, ...)"
        )

    def copy(self, memo: dict) -> Group:
        """A new group, for variables that `copy.deepcopy` copied their copies."""
        other = Group(**self._arguments() | {"members": self.members.copy(memo)})
        other.may_overlap = self.may_overlap
        return other

    def _arguments(self) -> dict[str, Any]:
        return {
            "members": self.members,
            "learning_rate_multiplier": self.learning_rate_multiplier,
            "weight_decay": self.weight_decay,
            "frozen": self.frozen,
            "optional": self.optional,
        }

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, with their values now, and a format mark."""
        config = {name: serialized(x) for name, x in self._arguments().items()}
        config["members"] = self.members.get_config()
        config["format"] = FORMAT
        return config | ({"may_overlap": True} if self.may_overlap else {})

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Group:
        """Makes a group from what `get_config` returned, here or in version 0.1.0.

        There, strings are regular expressions, and groups that set the same number for
        a variable have a meaning.
        """
        config = dict(config)
        is_first_format = config.pop("format", None) is None
        may_overlap = config.pop("may_overlap", is_first_format)
        saved = config["members"]
        saved = saved if isinstance(saved, list | tuple) else [saved]
        config["members"] = Selection.of_saved(saved, not is_first_format)
        group = cls(**config)
        group.may_overlap = may_overlap
        return group

    def __repr__(self) -> str:
        defaults = {
            "learning_rate_multiplier": 1.0,
            "weight_decay": None,
            "frozen": False,
            "optional": False,
        }
        own = self._arguments()
        changed = [f"{k}={text(own[k])}" for k, x in defaults.items() if own[k] != x]
        return f"Group({', '.join([repr(self.members), *changed])})"


def checked_groups(groups: Any) -> tuple[Group, ...]:
    """An optimizer's argument `groups`."""
    wrong = not isinstance(groups, list | tuple)
    wrong = wrong or len({id(x) for x in groups}) < len(groups)
    bad = groups if wrong else [x for x in groups if not _is_new(x)]
    if wrong or bad:
        raise ValueError(
            "`groups` must be a list of instances of `tf_effopt.Group`, each for "
            f"this optimizer only. Received: {bad!r}"
        )
    return tuple(groups)


def _is_new(group: Any) -> bool:
    return isinstance(group, Group) and not group.built


def check_overlaps(groups: tuple[Group, ...], paths: list[str]) -> None:
    """Raises `ValueError` if two groups set the same thing for one variable.

    Args:
        groups: of one optimizer, their variables found.
        paths: of the optimizer's variables.
    """
    names = ["learning_rate_multiplier", "weight_decay", "frozen"]
    for i, group in enumerate(groups):
        for other in groups[:i]:
            _check_pair(other, group, names, paths)


def _check_pair(
    one: Group, other: Group, names: list[str], paths: list[str], set_now: bool = False
) -> None:
    """As `check_overlaps`, of two groups; `set_now`: `one` is about to set it."""
    common = one.indices & other.indices
    if not common or (one.may_overlap and other.may_overlap):
        return
    for name in names:
        if other.sets(name) and (set_now or one.sets(name)):
            raise ValueError(
                f"Two groups set `{name}` for {paths[min(common)]}"
                + (f" and {len(common) - 1} more variables" if len(common) > 1 else "")
                + f":\n    {one!r}\n    {other!r}\n"
                "Each variable may get it from one group only: make their members "
                "distinct, or one group of what they have in common, with the number "
                "that is meant there."
            )


def frozen_indices(groups: tuple[Group, ...]) -> frozenset[int]:
    """The variables that a group freezes."""
    return frozenset(i for group in groups if group.frozen for i in group.indices)


def decay_of(index: int, groups: list[tuple[int, Group]]) -> tuple[int, str] | None:
    """The owner and name of the decay that the groups give a variable, or None.

    Args:
        groups: with their numbers among the optimizer's owners.
    """
    given = [n for n, x in groups if index in x.indices and x.weight_decay is not None]
    return (given[-1], "weight_decay") if given else None


def multipliers_of(
    index: int, groups: list[tuple[int, Group]]
) -> tuple[tuple[int, str], ...]:
    """The owners and names of a variable's multipliers."""
    own = [n for n, x in groups if index in x.indices]
    return tuple((n, "learning_rate_multiplier") for n in own)
