"""Groups: against optimizers of their own, found or not, changed, frozen, saved."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import (
    BY_NAME,
    CASES,
    KINDS,
    arrays,
    by_name,
    compiled_model,
    small_model,
    traces,
    train,
)

import tf_effopt
from tf_effopt import SGD, Adam, AdamW, Group
from tf_effopt.base.selection import Trained
from tf_effopt.rules import Part, Slots
from tf_effopt.transforms import Transform, ZClip

pytestmark = pytest.mark.fresh_programs


def variable(*values, name="w"):
    return keras.Variable(np.array(values, "float32"), name=name)


def ones(*shape):
    return tf.ones(shape)


def identical(one, other):
    pairs = zip(arrays(one), arrays(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


# ----------------------------------------------------------------- what they do


@pytest.mark.representatives(*KINDS)
@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_equals_an_optimizer_with_these_numbers(case):
    """Also the rules that decay themselves, where the optimizer has no decay."""
    rate = case.make.keywords["learning_rate"]
    settings = {"learning_rate": rate / 4, "weight_decay": 0.3}
    group = Group("w", learning_rate_multiplier=0.25, weight_decay=0.3)
    none = {"weight_decay": None} if case.make.func.weight_decay.optional else {}
    rng = np.random.default_rng(0)
    start = rng.normal(size=(5, 4))
    ws = [keras.Variable(start, name="w") for _ in range(3)]
    optimizers = [
        case.make(**none, groups=[group]),
        case.make(**settings),
        case.make(**none),
    ]
    for _ in range(6):
        g = tf.constant(rng.normal(size=(5, 4)), "float32")
        for optimizer, w in zip(optimizers, ws, strict=True):
            optimizer.apply([g], [w])
    grouped, expected, plain = arrays(ws)
    np.testing.assert_allclose(grouped, expected, rtol=1e-6, atol=1e-7)
    assert np.abs(grouped - plain).max() > 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2},
        {"gradient_accumulation_steps": 2},
        {"lazy": True},
        {"transforms": 1},
    ],
    ids=str,
)
def test_each_variable_as_by_an_optimizer_of_its_own(options):
    def make(**settings):
        own = {"transforms": [AsIs()]} if "transforms" in options else options
        return Adam(**own, **settings)

    def gradients():
        for i in range(4):
            yield [
                tf.IndexedSlices(
                    ones(2, 3) + i, tf.constant([0, 2]), tf.constant([4, 3])
                ),
                tf.constant([1.0, -2.0]) * (i + 1),
                tf.constant([3.0, i - 1.0]),
            ]

    def start():
        table = keras.Variable(np.ones((4, 3), "float32"), name="table")
        return [table, variable(1, 2, name="kernel"), variable(3, 4, name="bias")]

    groups = [
        Group("table", learning_rate_multiplier=0.5, weight_decay=0.25),
        Group("bias", weight_decay=0.0),
    ]
    together = make(learning_rate=0.125, weight_decay=0.5, groups=groups)
    apart = [
        make(learning_rate=0.125 / 2, weight_decay=0.25),
        make(learning_rate=0.125, weight_decay=0.5),
        make(learning_rate=0.125, weight_decay=0.0),
    ]
    ours, theirs = start(), start()
    for gs in gradients():
        together.apply(gs, ours)
        for optimizer, g, w in zip(apart, gs, theirs, strict=True):
            optimizer.apply([g], [w])
    for a, b in zip(arrays(ours), arrays(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


class AsIs(Transform):
    """Sees the learning rate and the decay of each variable."""

    after = staticmethod(
        lambda delta, g, *, learning_rate, weight_decay: (
            delta + 0 * learning_rate * weight_decay
        )
    )


def test_a_transform_gets_the_final_numbers_of_the_variable():
    class Shown(Transform):
        after = staticmethod(
            lambda delta, g, *, learning_rate, weight_decay: (
                -100 * learning_rate - weight_decay + 0 * delta
            )
        )

    w, b = variable(0, name="w"), variable(0, name="b")
    groups = [Group("w", learning_rate_multiplier=0.5, weight_decay=0.25)]
    SGD(1.0, transforms=[Shown()], groups=groups).apply([ones(1)] * 2, [w, b])
    assert [w.numpy()[0], b.numpy()[0]] == [-50.25, -100]


def test_all_groups_of_a_variable_count():
    w, b = variable(1), variable(1)
    w._path, b._path = "block/w", "block/b"
    groups = [
        Group("block", learning_rate_multiplier=0.25),
        Group(re.compile("w$"), weight_decay=0.25),
        Group("block/b", frozen=True),
        Group(b),
    ]
    optimizer = SGD(1.0, weight_decay=9.0, groups=groups)
    optimizer.apply([0 * ones(1)] * 2, [w, b])
    assert [w.numpy()[0], b.numpy()[0]] == [1 - 0.25 * 0.25, 1]


@pytest.mark.parametrize("name", ["sgd", "lamb"])
def test_exclusion_from_decay_wins(name):
    w, b = variable(1, name="w"), variable(1, name="b")
    optimizer = BY_NAME[name].make(groups=[Group(re.compile("."), weight_decay=0.5)])
    optimizer.exclude_from_weight_decay([b])
    optimizer.apply([0 * ones(1)] * 2, [w, b])
    assert w.numpy()[0] < 1 and b.numpy()[0] == 1


def test_a_callable_rate_and_a_schedule_are_multiplied():
    schedule = keras.optimizers.schedules.ExponentialDecay(1.0, 1, 0.5)
    for rate in (schedule, lambda: 1.0):
        w = variable(0)
        optimizer = SGD(rate, groups=[Group(w, learning_rate_multiplier=0.5)])
        for _ in range(2):
            optimizer.apply([ones(1)], [w])
        assert w.numpy()[0] == (-0.75 if rate is schedule else -1.0)


def test_weights_of_float64_and_bfloat16():
    for dtype in ("float64", "bfloat16"):
        w = keras.Variable([1.0], dtype=dtype)
        group = Group(w, learning_rate_multiplier=0.5, weight_decay=0.5)
        SGD(1.0, groups=[group]).apply([tf.ones(1, dtype)], [w])
        assert float(w.numpy()[0]) == 1 - 0.5 - 0.25


# ------------------------------------------------------------ changed while training


def test_numbers_may_change_while_training():
    first, second = Group("first", weight_decay=0.0), Group("nothing", optional=True)
    model = compiled_model(SGD(0.1, groups=[first, second]))
    train(model, 2)
    frozen = arrays(model.layers[0].weights)
    first.learning_rate_multiplier = 0.0
    second.learning_rate_multiplier = 3.0  # of no variable
    train(model, 2)
    assert identical(model.layers[0].weights, frozen)
    first.learning_rate_multiplier, first.weight_decay = 2.0, 5.0
    for v in model.layers[0].weights:
        v.assign(np.ones(v.shape))
    gradients = [tf.zeros(v.shape) for v in model.trainable_variables]
    model.optimizer.apply(gradients, model.trainable_variables)
    np.testing.assert_allclose(model.layers[0].get_weights()[0], 1 - 0.2 * 5)
    train(model, 1)
    assert traces(model.optimizer) == [1]


STRUCTURE = {
    "frozen": True,
    "weight_decay": 0.1,
    "members": "bias",
    "optional": True,
}


@pytest.mark.parametrize("name", STRUCTURE)
def test_a_change_of_structure_is_refused(name):
    w = variable(1)
    group = Group("w")
    group.frozen, group.members = False, ["w"]  # before `build` all may change
    SGD(groups=[group]).build([w])
    message = rf"`{name}` can't change.*after the optimizer was built.*carry_over\("
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        setattr(group, name, STRUCTURE[name])
    with pytest.raises(ValueError, match="must be a number of at least 0"):
        group.learning_rate_multiplier = -1
    assert group.learning_rate_multiplier == 1 and group.frozen is False


def test_a_decay_taken_away_late_is_refused():
    off = Group("w", weight_decay=0.5)
    SGD(groups=[off]).build([variable(1)])
    with pytest.raises(ValueError, match="from 0.5 to None.*the compiled update"):
        off.weight_decay = None


# ------------------------------------------------------------------------ frozen


def test_a_frozen_gradient_counts_nowhere():
    """As if the variable weren't there: norms, transforms, sums, finite check."""
    for make in (
        lambda **x: SGD(0.5, global_clipnorm=1.0, transforms=[ZClip()], **x),
        lambda **x: tf_effopt.Prodigy(1.0, initial_estimate=0.1, **x),
    ):
        w, alone, still = variable(1, 2), variable(1, 2), variable(5, name="still")
        together = make(weight_decay=0.1, groups=[Group("still", frozen=True)])
        apart = make(weight_decay=0.1)
        for g in ([3.0, 4.0], [1.0, 9.0], [0.1, 0.2]):
            together.apply([tf.constant(g), tf.constant([np.nan])], [w, still])
            apart.apply([tf.constant(g)], [alone])
        assert identical([w], [alone]) and still.numpy() == 5
        assert together.skipped_steps == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_ema": True, "ema_overwrite_frequency": 1, "ema_momentum": 0.3},
        {"gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_frozen_weights_stay_in_fit(options):
    model = compiled_model(
        AdamW(0.1, weight_decay=0.5, **options, groups=[Group("first", frozen=True)])
    )
    before = arrays(model.weights)
    model.fit(np.ones((12, 4)), np.ones((12, 2)), batch_size=2, verbose=0)
    assert identical(model.layers[0].weights, before[:2])
    assert not np.array_equal(model.get_weights()[2], before[2])


def test_a_frozen_table_is_left_alone_lazily():
    table = keras.Variable(np.ones((3, 2), "float32"), name="table")
    w = variable(1)
    rows = tf.IndexedSlices(ones(1, 2), tf.constant([1]), tf.constant([3, 2]))
    optimizer = AdamW(0.1, lazy=True, groups=[Group("table", frozen=True)])
    optimizer.apply([rows, ones(1)], [table, w])
    assert np.all(table.numpy() == 1) and w.numpy() < 1


def test_all_frozen_counts_the_step():
    w = variable(1)
    optimizer = SGD(1.0, groups=[Group("w", frozen=True)])
    optimizer.apply([ones(1)], [w])
    optimizer.apply([None], [w])
    assert w.numpy() == 1 and int(optimizer.iterations) == 2


def test_of_a_frozen_variable_no_gradient_is_missed(recwarn):
    w, still = variable(1), variable(1, name="still")
    optimizer = SGD(1.0, groups=[Group("still", frozen=True)])
    optimizer.apply([ones(1), None], [w, still])
    assert not [x for x in recwarn if "Gradients do not exist" in str(x.message)]
    with pytest.raises(ValueError, match="No gradients provided"):
        optimizer.apply([None, ones(1)], [w, still])


@pytest.mark.parametrize("frozen", [True, False])
def test_state_loads_whether_or_not_it_is_frozen(frozen, tmp_path):
    def make(frozen):
        return Adam(0.1, groups=[Group("first", frozen=frozen)])

    saved = train(compiled_model(make(not frozen)), 3)
    saved.save_weights(tmp_path / "saved.weights.h5")
    model = train(compiled_model(make(frozen)), 1)
    model.load_weights(tmp_path / "saved.weights.h5")
    assert identical(model.optimizer.variables, saved.optimizer.variables)


def test_loss_scaling_with_a_frozen_group():
    w, still = variable(1), variable(1, name="still")
    optimizer = tf_effopt.LossScaleOptimizer(
        SGD(1.0, groups=[Group("still", frozen=True)]), initial_scale=4.0
    )
    optimizer.apply([4 * ones(1), tf.constant([np.inf])], [w, still])
    assert [w.numpy()[0], still.numpy()[0]] == [0, 1]
    assert float(optimizer.dynamic_scale) == 4.0
    other = optimizer.carry_over([w, still], groups=[])
    other.apply([0 * ones(1), 4 * ones(1)], [w, still])
    assert still.numpy() == 0


# ------------------------------------------------------------------- who is meant


def members_of(group, variables):
    SGD(groups=[group]).build(variables)
    return [variables[i].path for i in sorted(group.indices)]


def test_members_of_every_kind():
    model = small_model()
    first, second = model.layers
    paths = [v.path for v in model.weights]
    for members, expected in [
        ("bias", [1, 3]),
        (re.compile("first/(kernel|bias)$"), [0, 1]),
        (re.compile("FIRST", re.IGNORECASE), [0, 1]),
        ("first/bias", [1]),
        ("second/", [2, 3]),
        (model.weights[2], [2]),
        (second, [2, 3]),
        (model, [0, 1, 2, 3]),
        (["first/bias", second], [1, 2, 3]),
        ((first, model.weights[0], "kernel"), [0, 1, 2]),
    ]:
        found = members_of(Group(members), model.trainable_variables)
        assert found == [paths[i] for i in expected]


def test_a_layer_that_was_built_after_its_group():
    layer, other = keras.layers.Dense(2), keras.layers.Dense(2)
    model = keras.Sequential([layer, other])
    model.compile(SGD(0.1, groups=[Group(layer, frozen=True)]), "mse")
    model(np.zeros((1, 3)))
    before = layer.get_weights()[0]
    model.train_on_batch(np.ones((4, 3)), np.ones((4, 2)))
    assert np.array_equal(before, layer.get_weights()[0])


def test_variables_of_tensorflow():
    w, b = tf.Variable([1.0], name="w"), tf.Variable([1.0], name="b")
    SGD(1.0, groups=[Group("b", frozen=True)]).apply([ones(1)] * 2, [w, b])
    assert [w.numpy()[0], b.numpy()[0]] == [0, 1]


def absent_layer():
    layer = keras.layers.Dense(2, name="secnd")
    layer.build((3,))
    return layer


@pytest.mark.parametrize(
    "members, message",
    [
        ("frist", r"'frist': the nearest components are 'first', "),
        (["bias", "norm"], r"'norm': the nearest components are"),
        (absent_layer, r"<layer 'secnd'>: the nearest paths are \S*second/"),
        (lambda: variable(1, name="basi"), r"<variable 'basi'>: .* are \S*/bias"),
        (lambda: keras.layers.ReLU(name="act"), r"<layer 'act'>"),
    ],
    ids=["pattern", "one of two", "layer", "variable", "layer without weights"],
)
def test_members_that_are_not_there(members, message):
    members = members() if callable(members) else members
    model = small_model()
    variables = model.trainable_variables
    optimizer = SGD(1.0, groups=[Group(members)])
    whole = r"none of the 4 variables.*" + message + r".*`optional=True`"
    with pytest.raises(ValueError, match=re.compile(whole, re.DOTALL)):
        optimizer.build(variables)
    assert not optimizer.built
    optional = SGD(1.0, groups=[Group(members, optional=True)])
    optional.apply([tf.ones(v.shape) for v in variables], variables)


def test_the_error_comes_from_fit_and_names_the_group():
    model = compiled_model(SGD(groups=[Group("kernle", weight_decay=0.5)]))
    with pytest.raises(ValueError, match=r"Group\('kernle', weight_decay=0.5\) has"):
        train(model, 1)


def test_a_layer_that_does_not_train_is_named():
    model = small_model()
    model.layers[0].trainable = False
    compiled_model(SGD(groups=[Group(model.layers[0])]), model)
    with pytest.raises(ValueError, match="<layer 'first'>.*`trainable` is False"):
        try:
            train(model, 1)
        except ValueError as error:
            raise ValueError(str(error).replace("\n", " ")) from None
    optional = Group(model.layers[0], optional=True, frozen=True)
    train(compiled_model(SGD(groups=[optional]), model), 1)


def test_a_group_that_is_given_twice_is_refused():
    group = tf_effopt.Group(["kernel"], learning_rate_multiplier=0.5)
    with pytest.raises(ValueError, match="each for this optimizer only"):
        tf_effopt.SGD(groups=[group, group])


def test_a_group_of_another_optimizer_is_refused():
    group, w = Group("w"), variable(1)
    one, other = SGD(groups=[group]), SGD(groups=[group])
    one.build([w])
    with pytest.raises(ValueError, match="is another optimizer's already"):
        other.build([w])
    with pytest.raises(ValueError, match="each for this optimizer only"):
        SGD(groups=[group])


# ------------------------------------------------------------- strings and patterns


def test_a_string_is_whole_components():
    """Layer-wise decay over 12 layers: "layer_1" is neither layer_10 nor layer_11."""
    ws = [variable(0) for _ in range(12)]
    for i, w in enumerate(ws):
        w._path = f"model/layer_{i}/kernel"
    groups = [
        Group(f"layer_{i}", learning_rate_multiplier=0.5 ** (11 - i)) for i in range(12)
    ]
    SGD(1.0, groups=groups).apply([ones(1)] * 12, ws)
    assert [-w.numpy()[0] for w in ws] == [0.5 ** (11 - i) for i in range(12)]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("block/dense", [0]),
        ("dense/kernel", [0]),
        ("block", [0, 1, 2]),
        ("block/dense_1/bias", [1]),
        ("/block/", [0, 1, 2]),
        ("model.block.conv-1", [3]),
        ("weight", [3, 4]),
    ],
)
def test_components_in_a_row(text, expected):
    paths = ["m/block/dense/kernel", "m/block/dense_1/bias", "m/block/norm/scale"]
    paths += ["model.block.conv-1/weight", "weight:0"]
    trained = Trained([None] * 5, paths)
    (found,) = Group(text).members.find(trained)
    assert found == expected


REGULAR = [
    r"layer_\d+",
    "layer_.*",
    "^first",
    "bias$",
    "a|b",
    "w[0-9]",
    "(a)",
    "a+",
    "a?",
]
REGULAR += [".", "layer_.", "a{2}"]


@pytest.mark.parametrize("text", REGULAR)
def test_a_string_that_looks_like_a_regular_expression_is_refused(text):
    with pytest.raises(ValueError, match="looks like a regular expression") as error:
        Group(["bias", text])
    assert f"re.compile({text!r})" in str(error.value)
    Group(["bias", re.compile(text)])


def test_a_part_of_a_component_shows_the_pattern_that_matches():
    optimizer = SGD(groups=[Group("firs")])
    message = r"'firs'.*re.compile\('firs'\)` has a match in 2 paths, such as \S*first/"
    with pytest.raises(ValueError, match=message):
        optimizer.build(small_model().trainable_variables)


def test_a_saved_string_may_have_the_name_of_a_model_in_front():
    trained = Trained([None] * 2, ["inner/kernel", "other/inner/kernel"])
    for text, expected in (("whole/inner", [0]), ("inner", [0, 1]), ("whole/x", [])):
        saved = Group.from_config(Group(text).get_config())
        assert saved.members.find(trained) == [expected]
    assert Group("whole/inner").members.find(trained) == [[]]


@pytest.mark.parametrize(
    "name, value",
    [("learning_rate_multiplier", 0.5), ("weight_decay", 0.0), ("frozen", True)],
)
def test_two_groups_that_set_the_same_are_refused(name, value):
    kernel, bias = variable(1, name="kernel"), variable(1, name="bias")
    groups = [Group("bias", **{name: value}), Group([kernel, bias], **{name: value})]
    optimizer = SGD(groups=groups)
    with pytest.raises(ValueError, match=f"Two groups set `{name}` for bias:") as error:
        optimizer.build([kernel, bias])
    assert all(repr(group) in str(error.value) for group in groups)
    assert not optimizer.built
    SGD(groups=[Group("bias", **{name: value}), Group(bias)]).build([kernel, bias])
    apart = [Group("bias", **{name: value}), Group("kernel", **{name: value})]
    SGD(groups=apart).build([kernel, bias])


def test_a_multiplier_that_another_group_has_set_is_refused_later_too():
    w = variable(1)
    first, second = Group(w, learning_rate_multiplier=0.5), Group("w", weight_decay=0.5)
    SGD(groups=[first, second]).build([w])
    with pytest.raises(ValueError, match="Two groups set `learning_rate_multiplier`"):
        second.learning_rate_multiplier = 2.0
    assert second.learning_rate_multiplier == 1.0
    first.learning_rate_multiplier = 1.0
    second.learning_rate_multiplier = 2.0


def saved_by_0_1_0(members, **settings):
    """A group's configuration of that version: strings are regular expressions."""
    config = {"members": members, "learning_rate_multiplier": 1.0, "weight_decay": None}
    config |= {"frozen": False, "optional": False} | settings
    return {
        "module": "tf_effopt.base.groups",
        "class_name": "Group",
        "config": config,
        "registered_name": "tf_effopt>Group",
    }


def test_groups_of_0_1_0_keep_their_meaning():
    """Numbers multiply, the last decay counts, and strings are searched for."""
    groups = [
        saved_by_0_1_0(["w"], learning_rate_multiplier=0.5, weight_decay=0.5),
        saved_by_0_1_0(["w_.$"], learning_rate_multiplier=0.5),
        saved_by_0_1_0(["_1|_2"], weight_decay=0.25),
        saved_by_0_1_0([{"path": "b", "index": None}], frozen=True),
        saved_by_0_1_0(["^b"], frozen=True),
    ]
    config = SGD(1.0, weight_decay=9.0).get_config() | {"groups": groups}
    optimizer = SGD.from_config(config)
    again = SGD.from_config(optimizer.get_config())
    copied = copy.deepcopy(again)
    for o in (optimizer, again, copied):
        ws = [variable(1, name=name) for name in ("w_1", "w_10", "b")]
        o.apply([0 * ones(1)] * 3, ws)
        values = [w.numpy()[0] for w in ws]
        assert values == [1 - 0.25 * 0.25, 1 - 0.5 * 0.25, 1]
        o.groups[1].learning_rate_multiplier = 0.25
    carried = optimizer.carry_over(optimizer._trainable_variables)
    assert carried.groups[0].may_overlap


def test_a_pattern_is_saved_with_its_flags():
    group = Group(["a/b", re.compile("BIAS", re.IGNORECASE)], frozen=True)
    other = Group.from_config(group.get_config())
    assert repr(other) == repr(group) and "re.IGNORECASE" in repr(group)
    trained = Trained([None] * 3, ["x/bias", "a/b", "a/bc"])
    assert other.members.find(trained) == [[1], [0]]
    assert other.get_config() == group.get_config() and not other.may_overlap


# ------------------------------------------------------------------ parts of a class


def sign_rule(g, slots, *, learning_rate):
    return -learning_rate * keras.ops.sign(g), slots


def own_decay_rule(g, slots, *, w, learning_rate, weight_decay):
    return -learning_rate * (g + weight_decay * w), slots


class TwoDecays(tf_effopt.Optimizer):
    """Matrices decay by `weight_decay`, the rest by `other_weight_decay`."""

    other_weight_decay = tf_effopt.hyperparameters.NonNegative(optional=True)
    matrices = Part(sign_rule, Slots(), name="matrix")
    rest = Part(sign_rule, name="rest", weight_decay="other_weight_decay")

    def __init__(self, learning_rate=1.0, other_weight_decay=None, **kwargs):
        super().__init__(learning_rate, **kwargs)
        self.other_weight_decay = other_weight_decay

    def part(self, path, shape):
        return self.matrices if len(shape) == 2 else self.rest


class OwnDecay(TwoDecays):
    """The rest decays inside its rule."""

    rest = Part(own_decay_rule, name="rest", weight_decay="other_weight_decay")


@pytest.mark.parametrize("cls", [TwoDecays, OwnDecay])
@pytest.mark.parametrize("decay", [None, 0.5])
@pytest.mark.parametrize("other", [None, 0.25])
def test_each_part_decays_by_its_own_number(cls, decay, other):
    matrix = keras.Variable(np.ones((2, 2), "float32"), name="matrix")
    vector, grouped = variable(1, name="vector"), variable(1, name="grouped")
    variables = [matrix, vector, grouped]
    optimizer = cls(
        weight_decay=decay,
        other_weight_decay=other,
        groups=[Group("grouped", weight_decay=0.125)],
    )

    def step():
        for v in variables:
            v.assign(np.ones(v.shape))
        optimizer.apply([tf.zeros(v.shape) for v in variables], variables)
        return [float(v.numpy().flat[0]) for v in variables]

    assert step() == [1 - (decay or 0), 1 - (other or 0), 1 - 0.125]
    if other is None:
        with pytest.raises(ValueError, match="`other_weight_decay` can't change"):
            optimizer.other_weight_decay = 0.75
    else:
        optimizer.other_weight_decay = 0.75
        assert step() == [1 - (decay or 0), 0.25, 1 - 0.125]
        assert traces(optimizer) == [1]


def test_a_part_that_decays_by_what_the_class_lacks():
    class Lacks(TwoDecays):
        rest = Part(sign_rule, name="rest", weight_decay="adam_decay")

    with pytest.raises(TypeError, match="'rest' of Lacks decays by `adam_decay`"):
        Lacks().build([variable(1)])


# ------------------------------------------------------------------------- saving


def nested_model():
    """A backbone in a model, with paths that name it or don't."""
    backbone = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, name="one")], name="backbone"
    )
    inputs = keras.Input((4,))
    outputs = keras.layers.Dense(2, name="head")(backbone(inputs))
    return keras.Model(inputs, outputs, name="whole")


def sequential_in_sequential():
    backbone = keras.Sequential([keras.layers.Dense(3, name="one")], name="backbone")
    return keras.Sequential(
        [keras.Input((4,)), backbone, keras.layers.Dense(2, name="head")], name="whole"
    )


MODELS = {
    "sequential": small_model,
    "functional": nested_model,
    "nested": sequential_in_sequential,
}


def one_group_of_each_kind(model):
    """Each has a multiplier of its own; the last one freezes."""
    groups = [
        Group("bias", weight_decay=0.5),
        Group(model.layers[-2], learning_rate_multiplier=2.0),
        Group([model.trainable_variables[2]], learning_rate_multiplier=3.0),
        Group(["bias", model.layers[-1], model.trainable_variables[0]]),
        Group(model),
        Group(re.compile("head/bias|second/BIAS", re.IGNORECASE), frozen=True),
    ]
    return groups


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "untrained"])
@pytest.mark.parametrize("make_model", MODELS.values(), ids=MODELS)
def test_groups_are_alive_after_load_model(make_model, trained, tmp_path):
    model = make_model()
    groups = one_group_of_each_kind(model)
    compiled_model(AdamW(0.01, groups=groups), model)
    if trained:
        train(model, 2)
        groups[1].learning_rate_multiplier = 0.25
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    loaded.save(tmp_path / "again.keras")
    again = keras.models.load_model(tmp_path / "again.keras")
    train(model, 2)
    for other in (loaded, again):
        compiled_model(other.optimizer, other)
        train(other, 2)
        for mine, theirs in zip(groups, other.optimizer.groups, strict=True):
            assert mine.indices == theirs.indices
            for name in ("learning_rate_multiplier", "weight_decay", "frozen"):
                assert getattr(mine, name) == getattr(theirs, name)
        assert identical(
            model.weights + model.optimizer.variables,
            other.weights + other.optimizer.variables,
        )


def test_paths_are_found_but_for_the_names_of_models():
    def found(path, *trained):
        variables = [variable(1) for _ in trained]
        return Trained(variables, list(trained)).places_of(path)

    assert found("a/kernel", "m/a/kernel", "a/kernel") == [1]
    assert found("a/kernel", "m/a/kernel", "n/m/a/kernel", "b/kernel") == [0, 1]
    assert found("n/m/a/kernel", "a/kernel", "m/a/kernel", "kernel") == [1]
    assert found("kernel", "a/kernel") == found("a/kernel", "kernel") == []


@keras.saving.register_keras_serializable("tests")
class GroupTwins(keras.layers.Layer):
    """Two weights of the same path."""

    def build(self, shape):
        self.one = self.add_weight(shape=(4,), initializer="ones", name="w")
        self.two = self.add_weight(shape=(4,), initializer="ones", name="w")

    def call(self, x):
        return x * self.one + self.two


def test_variables_of_equal_paths_are_told_apart(tmp_path):
    model = keras.Sequential([keras.Input((4,)), GroupTwins()])
    one, two = model.trainable_variables
    assert one.path == two.path
    compiled_model(SGD(0.1, groups=[Group(two, frozen=True)]), model)
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "model.keras")
    (group,) = keras.models.load_model(tmp_path / "model.keras").optimizer.groups
    assert group.indices == {1}


def test_a_layer_saved_before_it_had_weights():
    layer = keras.layers.Dense(2, name="later")
    group = Group.from_config(Group(layer, frozen=True).get_config())
    variables = [variable(1, name="sooner"), variable(1)]
    variables[1]._path = "model/later/kernel"
    assert members_of(group, variables) == ["model/later/kernel"]
    assert repr(group) == "Group(<layer 'later'>, frozen=True)"


def test_layers_without_weights_may_be_members(tmp_path):
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(3),
            keras.layers.ReLU(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(2),
        ]
    )
    group = Group(model.layers[:3], learning_rate_multiplier=0.0)
    model.compile(AdamW(0.1, groups=[group]), "mse", jit_compile=False)
    train(model, 1)
    assert group.indices == {0, 1}
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.groups[0].indices == {0, 1}
    with pytest.raises(ValueError, match="none of the 2 variables"):
        other = keras.layers.Dense(1)
        other.build((None, 1))
        SGD(groups=[Group(other)]).build(model.layers[0].trainable_variables)


def test_a_loaded_layer_knows_its_other_variables(tmp_path):
    """Of a half-frozen layer, the file names the frozen half, too."""
    model = small_model()
    model.layers[0].trainable = False
    group = Group(model, learning_rate_multiplier=0.5)
    train(compiled_model(Adam(0.1, groups=[group]), model), 1)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.groups[0].indices == {0, 1}
    loaded.layers[0].trainable = True
    other = loaded.optimizer.carry_over(loaded.trainable_variables)
    assert other.groups[0].indices == {0, 1, 2, 3}


def test_config_round_trip():
    model = small_model()
    groups = [Group(["bias", model.layers[0]], weight_decay=0.5, optional=True)]
    optimizer = AdamW(groups=groups)
    config = optimizer.get_config()
    copied = AdamW.from_config(config)
    assert copied.get_config() == config
    assert AdamW.from_config({"learning_rate": 0.5}).groups == ()


# ------------------------------------------------------------------------- copies


@pytest.mark.parametrize(
    "make",
    [
        copy.deepcopy,
        lambda o: o.carry_over(o._trainable_variables),
        lambda o: type(o).from_config(o.get_config()),
    ],
    ids=["deepcopy", "carry_over", "config"],
)
def test_copies_have_groups_of_their_own(make):
    w, b = variable(1), variable(1, name="b")
    group = Group(w, learning_rate_multiplier=0.5)
    optimizer = SGD(1.0, groups=[group, Group("b", frozen=True)])
    optimizer.apply([ones(1)] * 2, [w, b])
    copied = make(optimizer)
    copied.groups[0].learning_rate_multiplier = 0.25
    assert group.learning_rate_multiplier == 0.5
    copied.apply([ones(1)] * 2, [w, b])
    assert [w.numpy()[0], b.numpy()[0]] == [0.25, 1]


def test_a_deep_copy_of_both_has_groups_and_exclusions_of_the_copied():
    w, b = variable(1), variable(1, name="b")
    optimizer = SGD(1.0, weight_decay=0.5, groups=[Group(w, weight_decay=0.25)])
    optimizer.exclude_from_weight_decay([b])
    optimizer.build([w, b])
    (w2, b2), copied = copy.deepcopy([[w, b], optimizer])
    copied.apply([0 * ones(1)] * 2, [w2, b2])
    assert [w2.numpy()[0], b2.numpy()[0]] == [0.75, 1]


def test_carry_over_with_other_groups_keeps_the_state():
    model = compiled_model(Adam(0.1, groups=[Group("first", frozen=True)]))
    train(model, 3)
    old = model.optimizer
    new = old.carry_over(model.trainable_variables, groups=[Group("bias", frozen=True)])
    assert identical(old.variables, new.variables)
    before = model.get_weights()
    train(compiled_model(new, model), 1)
    pairs = zip(before, model.get_weights(), strict=True)
    changed = [not np.array_equal(a, b) for a, b in pairs]
    assert changed == [True, False, True, False]
    assert old.carry_over(model.trainable_variables, groups=[]).groups == ()


def test_unfreezing_a_layer_of_a_group():
    model = small_model()
    model.layers[0].trainable = False
    group = Group(model, learning_rate_multiplier=0.5)
    train(compiled_model(Adam(0.1, groups=[group]), model), 2)
    model.layers[0].trainable = True
    new = model.optimizer.carry_over(model.trainable_variables)
    assert new.groups[0].indices == {0, 1, 2, 3}
    train(compiled_model(new, model), 1)


# ----------------------------------------------------------------------- in words


def test_a_group_shows_as_its_constructor():
    model = small_model()
    assert repr(Group("bias")) == "Group('bias')"
    group = Group(["a", model.layers[0], model.weights[2]], 0.5, 0.0, True, True)
    assert repr(group) == (
        f"Group(['a', <layer 'first'>, <variable '{model.weights[2].path}'>], "
        "learning_rate_multiplier=0.5, weight_decay=0.0, frozen=True, optional=True)"
    )


def test_describe_shows_the_numbers_of_now():
    matrix = keras.Variable(np.ones((2, 3), "float32"), name="matrix")
    w, b = variable(1, 2), variable(1, name="bias")
    group = Group("matrix", learning_rate_multiplier=0.5)
    groups = [group, Group(re.compile("x"), weight_decay=0.1)]
    optimizer = TwoDecays(1.0, 0.25, groups=[*groups, Group("bias", frozen=True)])
    assert optimizer.describe().startswith("TwoDecays(learning_rate=1")
    optimizer.build([matrix, w, b])
    group.learning_rate_multiplier = 0.75
    assert optimizer.describe().splitlines() == [
        "variable  shape   rule    learning rate  weight decay",
        "matrix    (2, 3)  matrix  x 0.75         0.1",
        "w         (2,)    rest    x 1            0.25",
        "bias      (1,)    rest    frozen         -",
    ]


def test_describe_leaves_out_rules_without_names():
    optimizer = SGD()
    optimizer.build([variable(1)])
    assert optimizer.describe().splitlines() == [
        "variable  shape  learning rate  weight decay",
        "w         (1,)   x 1            -",
    ]


# ---------------------------------------------------------------------------- JAX

JAX = """
import sys
sys.modules["tensorflow"] = None
import keras, numpy as np
import tf_effopt
from tf_effopt import Group

w, b, still = (keras.Variable([1.0], name=name) for name in ("w", "b", "still"))
group = Group("w", learning_rate_multiplier=0.5, weight_decay=0.5)
optimizer = tf_effopt.SGD(1.0, groups=[group, Group("still", frozen=True)])
optimizer.build([w, b, still])
group.learning_rate_multiplier = 0.25
grads = [keras.ops.zeros(1), keras.ops.ones(1), np.nan * keras.ops.ones(1)]
optimizer.apply(grads, [w, b, still])
values = [float(keras.ops.convert_to_numpy(v)[0]) for v in (w, b, still)]
assert values == [0.875, 0.0, 1.0], values
try:
    group.learning_rate_multiplier = 1.0
except RuntimeError as error:
    print(error)
"""


def test_on_jax_without_tensorflow():
    pytest.importorskip("jax")
    finished = subprocess.run(
        [sys.executable, "-c", JAX],
        check=False,
        env=os.environ | {"KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "`learning_rate_multiplier` can't change to 1.0" in finished.stdout
