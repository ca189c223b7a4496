"""Wrong input gets an error that helps, and costs nothing that was trained."""

from __future__ import annotations

import re
from typing import Any

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import BY_NAME, arrays

import tf_effopt
from tf_effopt import hyperparameters
from tf_effopt.base.configurable import fields
from tf_effopt.base.routing import KnownRoles

NAN, INF = float("nan"), float("inf")
SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
# kind: (what the message must say is expected, values that aren't that)
NOT_NUMBERS = [NAN, INF, "0.5", True, np.array([0.5]), 1j, float]
DECAY_RATE = (r"in \[0, 1\)", [1.0, 1.5, -0.1, None, *NOT_NUMBERS])
FRACTION = (r"in \[0, 1\]", [1.5, -0.1, None, *NOT_NUMBERS])
POSITIVE = ("a number above 0", [0, -1e-7, None, *NOT_NUMBERS])
NON_NEGATIVE = ("a number of at least 0", [-0.1, None, *NOT_NUMBERS])
NEGATIVE = ("a number below 0", [0, 0.5, None, *NOT_NUMBERS])
REAL = ("a finite number", [None, *NOT_NUMBERS])
SWITCH = ("True or False", [0, 1, "yes", None, 1.0])
PATTERNS = ("a list of regular expressions", ["bias", None, 1, 0.5, [1], ["("]])


def or_none(kind: tuple[str, list]) -> tuple[str, list]:
    expected, wrong = kind
    return f"{expected} or None", [value for value in wrong if value is not None]


def count(low: int) -> tuple[str, list]:
    wrong = [-1, 2.0, 2.5, "2", True, NAN, *([1] if low > 1 else [])]
    zero = "0" if low == 1 else f"{low}, 0"
    return f"an integer of at least {zero} or None", wrong


SHARED = {
    "weight_decay": or_none(NON_NEGATIVE),
    "clipnorm": or_none(NON_NEGATIVE),
    "clipvalue": or_none(NON_NEGATIVE),
    "global_clipnorm": or_none(NON_NEGATIVE),
    "use_ema": SWITCH,
    "ema_momentum": FRACTION,
    "ema_overwrite_frequency": count(1),
    "loss_scale_factor": or_none(POSITIVE),
    "gradient_accumulation_steps": count(2),
    "rounding": (
        "one of 'stochastic', 'compensated', 'nearest'",
        ["up", None, True, 1, ["nearest"]],
    ),
    "lazy": SWITCH,
    "transforms": ("", []),  # has tests of its own
    "averaging": ("", []),  # so has this
    "groups": ("", []),  # has tests of its own
}
INTEGER = [0, -1, 2.0, 1.5, "2", True, None, NAN]
KINDS = {
    hyperparameters.DecayRate: DECAY_RATE,
    hyperparameters.Fraction: FRACTION,
    hyperparameters.Negative: NEGATIVE,
    hyperparameters.NonNegative: NON_NEGATIVE,
    hyperparameters.Patterns: PATTERNS,
    hyperparameters.Positive: POSITIVE,
    hyperparameters.Real: REAL,
    hyperparameters.Switch: SWITCH,
}


def of_kind(kind: hyperparameters.Hyperparameter) -> tuple[str, list]:
    """What is expected of a hyperparameter, and values that aren't that."""
    if isinstance(kind, KnownRoles):
        expected = r"what `tf_effopt.roles\(model\)` returned, or None"
        return expected, ["hidden", {"kernel": "hidden"}, 1]
    if isinstance(kind, hyperparameters.Choice):
        wrong = ["other", None, 1, 0.2, [kind.choices[0]]]
        return "one of " + ", ".join(map(repr, kind.choices)), wrong
    if isinstance(kind, hyperparameters.Count):
        return count(int(kind.low))
    if isinstance(kind, hyperparameters.Integer):
        too_small = [x for x in INTEGER if x != 0 or kind.low > 0]
        return f"an integer of at least {kind.low}", too_small
    expected, wrong = next(x for cls, x in KINDS.items() if isinstance(kind, cls))
    if getattr(kind, "low", None) == 0 and kind.open_low and kind.high == 1:
        expected, wrong = r"in \(0, 1\)", [0, 0.0, *wrong]
    is_optional = getattr(kind, "optional", False)
    return or_none((expected, wrong)) if is_optional else (expected, wrong)


def own_arguments(cls: type) -> dict[str, tuple[str, list]]:
    """By the class's declarations; of patterns, None is none in some."""
    shared = fields(tf_effopt.Optimizer)
    own = {
        name: of_kind(kind)
        for name, kind in fields(cls).items()
        if kind is not shared.get(name)
        and not isinstance(kind, hyperparameters.LearningRate)
    }
    if cls is tf_effopt.Muon:
        expected, wrong = own["exclude_layers"]
        own["exclude_layers"] = expected, [x for x in wrong if x is not None]
    return own


OWN = {
    name: own_arguments(getattr(tf_effopt, name))
    for name in sorted(tf_effopt.optimizers.__all__)
}
STAGES = [
    make for make in vars(tf_effopt.transforms).values() if isinstance(make, type)
]
STAGES += [tf_effopt.averaging.Lookahead]
CLASSES = list(OWN)
WRONG = [
    (class_name, argument, expected, value)
    for class_name in CLASSES
    for argument, (expected, values) in (SHARED | OWN[class_name]).items()
    for value in values
]


def received(name: str, value: Any) -> str:
    return re.escape(f"Received: {name}={value!r}")


@pytest.mark.parametrize(
    "class_name, argument, expected, value",
    WRONG,
    ids=[f"{c}-{name}-{value!r}" for c, name, _, value in WRONG],
)
def test_wrong_argument_is_named(class_name, argument, expected, value):
    message = f"`{argument}` must be {expected}. {received(argument, value)}"
    with pytest.raises(ValueError, match=message):
        getattr(tf_effopt, class_name)(**{argument: value})


@pytest.mark.parametrize(
    "cls, argument, expected, value",
    [
        (cls, argument, expected, value)
        for cls in STAGES
        for argument, (expected, values) in own_arguments(cls).items()
        for value in values
    ],
    ids=str,
)
def test_wrong_argument_of_a_stage_is_named(cls, argument, expected, value):
    message = f"`{argument}` must be {expected}. {received(argument, value)}"
    with pytest.raises(ValueError, match=message):
        cls(**{argument: value})


def test_every_optimizer_is_in_the_table():
    assert set(CLASSES) == {case.make.func.__name__ for case in cases.CASES}


@pytest.mark.parametrize("class_name", CLASSES)
def test_every_argument_is_in_the_table(class_name):
    config = getattr(tf_effopt, class_name)().get_config()
    checked = SHARED | OWN[class_name]
    assert set(config) == {"name", "learning_rate", *checked}


@pytest.mark.parametrize("class_name", CLASSES)
@pytest.mark.parametrize("value", [-1e-3, "0.1", None, NAN, INF, True, [0.1], float])
def test_wrong_learning_rate_is_named(class_name, value):
    message = "`learning_rate` must be a number of at least 0, a .*LearningRate"
    with pytest.raises(
        ValueError, match=message + ".*" + received("learning_rate", value)
    ):
        getattr(tf_effopt, class_name)(learning_rate=value)


@pytest.mark.parametrize(
    "value",
    [1, 1.0, np.float32(1), np.array(1.0), np.int64(1), tf.constant(1.0)],
    ids=repr,
)
def test_number_of_any_kind_is_a_learning_rate(value):
    optimizer = tf_effopt.SGD(value)
    assert optimizer.get_config()["learning_rate"] == 1.0
    variable = keras.Variable([1.0])
    optimizer.apply([np.ones(1, "float32")], [variable])
    assert variable.numpy()[0] == 0.0


@pytest.mark.parametrize("value", [np.float32(0.5), np.array(0.5), np.float64(0.5)])
def test_number_of_any_kind_is_a_hyperparameter(value):
    assert tf_effopt.Adam(beta_1=value).get_config()["beta_1"] == 0.5


def test_numbers_of_numpy_are_counts_and_switches():
    optimizer = tf_effopt.Adam(
        gradient_accumulation_steps=np.int64(2), amsgrad=np.bool_(True)
    )
    assert optimizer.gradient_accumulation_steps == 2
    assert optimizer.amsgrad is True


@pytest.mark.parametrize(
    "class_name, wrong, near",
    [
        ("Adam", "beta1", "beta_1"),
        ("SGD", "momentun", "momentum"),
        ("RMSprop", "centred", "centered"),
        ("AdamW", "weight_decays", "weight_decay"),
        ("GradientDescent", "global_clip_norm", "global_clipnorm"),
        ("Adam", "learning_rates", "learning_rate"),
        ("Adam", "lr", "learning_rate"),
        ("AdamW", "wd", "weight_decay"),
    ],
)
def test_unknown_argument_gets_the_near_name(class_name, wrong, near):
    message = f"`{class_name}` has no argument `{wrong}`. Did you mean `{near}`?"
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(tf_effopt, class_name)(**{wrong: 0.5})


def test_unknown_argument_far_from_all_gets_the_list():
    message = "`Adam` has no argument `zzz`. It takes: learning_rate, beta_1,"
    with pytest.raises(ValueError, match=re.escape(message)):
        tf_effopt.Adam(zzz=1)


@pytest.mark.parametrize(
    "clips",
    [{"clipnorm": 1.0, "clipvalue": 1.0}, {"clipnorm": 1.0, "global_clipnorm": 2.0}],
    ids=str,
)
def test_two_kinds_of_clipping_are_refused(clips):
    with pytest.raises(ValueError, match="Only one of `clipnorm`, `clipvalue`"):
        tf_effopt.Adam(**clips)


def test_lazy_with_accumulation_is_refused():
    message = "`lazy=True` can't be combined with `gradient_accumulation_steps`"
    with pytest.raises(ValueError, match=message + ".*gradient_accumulation_steps=2"):
        tf_effopt.Adam(lazy=True, gradient_accumulation_steps=2)


NOT_ELEMENTWISE = [c for c in CLASSES if not getattr(tf_effopt, c).elementwise]


@pytest.mark.parametrize("class_name", NOT_ELEMENTWISE)
def test_lazy_with_a_rule_that_sees_whole_tensors_is_refused(class_name):
    message = f"`lazy=True` can't be combined with {class_name}: its step for a row"
    with pytest.raises(ValueError, match=message + ".*Received: lazy=True"):
        getattr(tf_effopt, class_name)(lazy=True)


def test_lazy_with_transforms_is_refused():
    message = "`lazy=True` can't be combined with `transforms`.*Received: transforms="
    with pytest.raises(ValueError, match=message):
        tf_effopt.Adam(lazy=True, transforms=[tf_effopt.transforms.Transform()])


@pytest.mark.parametrize(
    "value",
    [None, 1, "clip", tf_effopt.transforms.Transform(), ["clip"], [None]]
    + [[tf_effopt.transforms.Transform]],
    ids=repr,
)
@pytest.mark.parametrize("class_name", CLASSES)
def test_what_is_no_transform_is_refused(class_name, value):
    message = "`transforms` must be a list of instances of .*Received: "
    with pytest.raises(ValueError, match=message):
        getattr(tf_effopt, class_name)(transforms=value)


@pytest.mark.parametrize(
    "value",
    [None, "bias", ["bias"], [None], tf_effopt.Group("bias"), [tf_effopt.Group]],
)
@pytest.mark.parametrize("class_name", CLASSES)
def test_what_is_no_list_of_groups_is_refused(class_name, value):
    message = r"`groups` must be a list of instances of `tf_effopt.Group`.*Received: "
    with pytest.raises(ValueError, match=message):
        getattr(tf_effopt, class_name)(groups=value)


GROUP = {
    "learning_rate_multiplier": NON_NEGATIVE,
    "weight_decay": or_none(NON_NEGATIVE),
    "frozen": SWITCH,
    "optional": SWITCH,
    "members": (
        r"a string of whole components of a path, `re.compile\(...\)`, a variable, a "
        + "layer, or a list of these that isn't empty",
        [None, 1, [], "(", ["bias", 3], [[]], {"a": 1}, "", "a//b", re.compile(b"a")],
    ),
}


@pytest.mark.parametrize(
    "argument, value", [(k, x) for k, (_, values) in GROUP.items() for x in values]
)
def test_wrong_argument_of_a_group_is_named(argument, value):
    arguments = {"members": "bias"} | {argument: value}
    message = f"`{argument}` must be {GROUP[argument][0]}. {received(argument, value)}"
    with pytest.raises(ValueError, match=message):
        tf_effopt.Group(**arguments)


def test_transform_of_another_optimizer_is_refused():
    transform = tf_effopt.transforms.Transform()
    tf_effopt.SGD(transforms=[transform]).build([keras.Variable([1.0])])
    with pytest.raises(ValueError, match="each for this optimizer only"):
        tf_effopt.SGD(transforms=[transform])


def test_lazy_without_tensorflow_is_refused(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ValueError, match=r"needs Keras's TensorFlow.*'jax'"):
        tf_effopt.Adam(lazy=True)


def test_optimizer_without_a_rule_is_refused():
    class Ruleless(tf_effopt.Optimizer):
        pass

    with pytest.raises(TypeError, match="Ruleless has no rule. Set `rule ="):
        Ruleless()


# ------------------------------------------------------------- after `build`


@pytest.fixture(scope="module")
def built() -> tf_effopt.Adam:
    optimizer = tf_effopt.Adam(0.125, beta_1=0.5, clipnorm=1.0)
    optimizer.build([keras.Variable([1.0])])
    return optimizer


@pytest.mark.parametrize(
    "name, value",
    [("beta_1", 1.5), ("beta_1", None), ("beta_1", "0.5"), ("epsilon", 0)]
    + [("clipnorm", -1.0), ("learning_rate", -1.0), ("learning_rate", "fast")]
    + [("learning_rate", NAN), ("beta_2", NAN)],
)
def test_bad_value_after_build_is_refused_and_changes_nothing(built, name, value):
    before = built.get_config()
    with pytest.raises(ValueError, match=f"`{name}` must be .*{received(name, value)}"):
        setattr(built, name, value)
    assert built.get_config() == before


STRUCTURAL = [
    ("SGD", {}, "momentum", 0.9),
    ("SGD", {"momentum": 0.9}, "momentum", 0.0),
    ("SGD", {"momentum": 0.9}, "nesterov", True),
    ("RMSprop", {}, "momentum", 0.9),
    ("RMSprop", {"momentum": 0.9}, "momentum", 0),
    ("RMSprop", {}, "centered", True),
    ("Adam", {}, "amsgrad", True),
    ("Adam", {"amsgrad": True}, "amsgrad", False),
    ("Adam", {}, "bias_correction", False),
    ("Adam", {}, "clipnorm", 1.0),
    ("Adam", {"clipnorm": 1.0}, "clipnorm", None),
    ("Adam", {"clipnorm": 1.0}, "clipnorm", 0),
    ("Adam", {}, "clipvalue", 1.0),
    ("Adam", {}, "global_clipnorm", 1.0),
    ("Adam", {}, "weight_decay", 0.1),
    ("Adam", {"weight_decay": 0.1}, "weight_decay", None),
    ("Adam", {}, "use_ema", True),
    ("Adam", {"use_ema": True}, "ema_overwrite_frequency", 3),
    ("Adam", {}, "gradient_accumulation_steps", 2),
    ("Adam", {"gradient_accumulation_steps": 2}, "gradient_accumulation_steps", 3),
    ("Adam", {}, "loss_scale_factor", 8.0),
    ("Adam", {}, "rounding", "nearest"),
    ("Adam", {}, "lazy", True),
    ("Lars", {}, "nesterov", True),
    ("Lars", {}, "exclude_from_adaptation", ["bias"]),
    ("Lamb", {}, "exclude_from_adaptation", ["bias"]),
    ("Adafactor", {}, "relative_step", False),
    ("Prodigy", {}, "bias_correction", True),
    ("Prodigy", {}, "safeguard_warmup", True),
    ("Muon", {}, "ns_steps", 6),
    ("Muon", {}, "iteration", "polar_express"),
    ("Muon", {}, "roles", {"entries": []}),
    ("Muon", {}, "rms_rate", None),
    ("SOAP", {}, "shampoo_beta", 0.9),
    ("SOAP", {}, "precondition_frequency", None),
    ("SOAP", {}, "max_precondition_dim", 5),
    ("ScheduleFreeAdamW", {}, "warmup_steps", 5),
    ("ScheduleFreeAdamW", {"warmup_steps": 5}, "warmup_steps", 0),
    ("Yogi", {}, "bias_correction", False),
    ("Yogi", {}, "initial_accumulator_value", 1e-3),
]


@pytest.mark.parametrize(
    "class_name, arguments, name, value", STRUCTURAL, ids=lambda x: str(x)
)
def test_structural_change_after_build_is_refused(class_name, arguments, name, value):
    optimizer = getattr(tf_effopt, class_name)(**arguments)
    optimizer.build([keras.Variable([1.0])])
    before = optimizer.get_config()
    with pytest.raises(ValueError, match=f"`{name}` can't change from .*carry_over"):
        setattr(optimizer, name, value)
    assert optimizer.get_config() == before


def test_zero_decay_is_no_structural_change():
    optimizer = tf_effopt.AdamW(weight_decay=0.1)
    optimizer.build([keras.Variable([1.0])])
    optimizer.weight_decay = 0.0
    assert optimizer.get_config()["weight_decay"] == 0.0


def test_decay_exclusion_after_build_is_refused(built):
    with pytest.raises(ValueError, match="must be called before the optimizer is"):
        built.exclude_from_weight_decay(var_names=["bias"])


# ------------------------------------------------- gradients and variables


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, "float32")


BAD_CALLS = {
    "too few gradients": ([ones(2)], "1 gradients for 2 variables"),
    "too many gradients": ([ones(2), ones(3), ones(3)], "3 gradients for 2"),
    "no gradients": ([], "0 gradients for 2 variables"),
    "wrong shape": ([ones(2), ones(2)], r"shape \(3,\). Received: shape \(2,\)"),
    "would broadcast": ([ones(2), ones(1)], r"shape \(3,\). Received: shape \(1,\)"),
    "wrong rank": ([ones(2), ones(3, 1)], r"Received: shape \(3, 1\)"),
    "all None": ([None, None], "No gradients provided for any variable.*None for"),
}


@pytest.fixture(scope="module")
def trained() -> tuple[tf_effopt.Adam, list[keras.Variable]]:
    variables = [keras.Variable(ones(2), name="a"), keras.Variable(ones(3), name="b")]
    optimizer = tf_effopt.Adam(0.125)
    optimizer.apply([ones(2), ones(3)], variables)
    return optimizer, variables


@pytest.mark.parametrize("call", BAD_CALLS)
def test_bad_gradients_are_refused_and_nothing_is_lost(trained, call):
    optimizer, variables = trained
    gradients, message = BAD_CALLS[call]
    before = arrays(variables + optimizer.variables)
    with pytest.raises(ValueError, match=message):
        optimizer.apply(gradients, variables)
    after = arrays(variables + optimizer.variables)
    for value, old in zip(after, before, strict=True):
        np.testing.assert_array_equal(value, old)


@pytest.mark.parametrize("call", BAD_CALLS)
def test_bad_gradients_in_the_first_call_are_refused(call):
    gradients, message = BAD_CALLS[call]
    variables = [keras.Variable(ones(2), name="a"), keras.Variable(ones(3), name="b")]
    with pytest.raises(ValueError, match=message):
        tf_effopt.Adam().apply(gradients, variables)


def test_error_names_the_variable(trained):
    optimizer, variables = trained
    with pytest.raises(ValueError, match="The gradient of b must have its shape"):
        optimizer.apply([ones(2), ones(4)], variables)


def test_sparse_gradient_of_the_wrong_shape_is_refused():
    table = keras.Variable(ones(5, 2))
    rows = tf.IndexedSlices(ones(1, 3), tf.constant([0]), tf.constant([5, 3]))
    for lazy in (False, True):
        with pytest.raises(ValueError, match=r"Received: shape \(5, 3\)"):
            tf_effopt.Adam(lazy=lazy).apply([rows], [table])


def test_apply_without_variables_needs_build():
    with pytest.raises(ValueError, match=r"call `optimizer.build\(model.trainable"):
        tf_effopt.Adam().apply([ones(1)])


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "bool", "complex64"])
def test_unsupported_dtype_is_refused(dtype):
    bad = tf.Variable(np.ones(2, dtype), name="bad")
    good = tf.Variable(ones(2), name="good")
    message = f"float32, bfloat16, float16 and float64.*bad:0 of dtype {dtype}"
    optimizer = tf_effopt.SGD(momentum=0.9)
    with pytest.raises(ValueError, match=message):
        optimizer.apply([ones(2), ones(2)], [good, bad])
    # It can go on with what can be trained.
    optimizer.apply([ones(2)], [good])
    np.testing.assert_allclose(good.numpy(), 0.99)


def test_unknown_variable_tells_of_carry_over(trained):
    optimizer, variables = trained
    stranger = keras.Variable(ones(2), name="stranger")
    message = r"stranger isn't among the 2 variables.*optimizer\.carry_over\("
    before = arrays(optimizer.variables)
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        optimizer.apply([ones(2), ones(2)], [variables[0], stranger])
    for value, old in zip(arrays(optimizer.variables), before, strict=True):
        np.testing.assert_array_equal(value, old)


@pytest.mark.parametrize("bad", [NAN, 1e20], ids=["nan", "square overflows"])
def test_a_gradient_that_cant_be_squared_changes_nothing(trained, bad):
    optimizer, variables = trained
    before = arrays(variables + optimizer.variables)
    skipped = optimizer.skipped_steps
    optimizer.apply([ones(2), np.array([0, bad, 0], "float32")], variables)
    assert optimizer.skipped_steps == skipped + 1
    for value, old in zip(arrays(variables + optimizer.variables), before, strict=True):
        np.testing.assert_array_equal(value, old)


# --------------------------------------------------------------- unfreezing


def unfrozen_after_build(case: cases.Case) -> keras.Model:
    model = cases.small_model()
    model.layers[0].trainable = False
    cases.train(cases.compiled_model(case.make(use_ema=True), model), 3)
    model.layers[0].trainable = True
    # As Keras asks for after a change of `trainable`.
    return cases.compiled_model(model.optimizer, model)


@pytest.mark.parametrize("name", ["nesterov", "adam"])
def test_unfreezing_asks_for_carry_over_which_goes_on(name):
    case = BY_NAME[name]
    model = unfrozen_after_build(case)
    before = arrays(model.weights + model.optimizer.variables)
    with pytest.raises(ValueError, match="first/kernel isn't among the 2 variables"):
        cases.train(model, 1)
    for value, old in zip(
        arrays(model.weights + model.optimizer.variables), before, strict=True
    ):
        np.testing.assert_array_equal(value, old)

    # The state of `second` goes on; that of `first` starts anew.
    old = model.optimizer
    new = old.carry_over(model.trainable_variables)
    assert int(new.iterations) == 3
    gradients = [np.full(v.shape, 0.5, "float32") for v in model.trainable_variables]
    weights = model.get_weights()
    old.apply(gradients[2:], model.trainable_variables[2:])
    expected = model.get_weights()[2:]
    assert all(np.any(a != b) for a, b in zip(expected, weights[2:], strict=True))
    model.set_weights(weights)
    new.apply(gradients, model.trainable_variables)
    for value, other in zip(model.get_weights()[2:], expected, strict=True):
        np.testing.assert_array_equal(value, other)
    for value, other in zip(model.get_weights()[:2], weights[:2], strict=True):
        assert np.all(value < other)

    cases.train(cases.compiled_model(new, model), 2)
    assert int(new.iterations) == 6


def test_carry_over_keeps_settings_and_schedule():
    optimizer = tf_effopt.Adam(SCHEDULE, beta_1=0.5, clipnorm=1.0)
    variable, added = keras.Variable([1.0]), keras.Variable([1.0])
    optimizer.apply([ones(1)], [variable])
    optimizer.beta_1 = 0.75
    new = optimizer.carry_over([added, variable])
    assert new.beta_1 == 0.75 and new.clipnorm == 1.0
    assert new._learning_rate is SCHEDULE
    assert int(new.iterations) == 1
    assert int(optimizer.iterations) == 1


def test_carry_over_before_build_is_a_fresh_optimizer():
    variable = keras.Variable([1.0])
    new = tf_effopt.SGD(0.5).carry_over([variable])
    new.apply([ones(1)])
    assert variable.numpy()[0] == 0.5


def test_error_in_fit_loses_nothing():
    model = cases.train(cases.compiled_model(BY_NAME["adam"].make()), 3)
    before = arrays(model.weights + model.optimizer.variables)
    with pytest.raises(ValueError, match="must be in"):
        model.optimizer.beta_2 = 2.0
    with pytest.raises(tf.errors.InvalidArgumentError, match="size-incompatible"):
        model.train_on_batch(cases.X[:, :3], cases.Y)
    for value, old in zip(
        arrays(model.weights + model.optimizer.variables), before, strict=True
    ):
        np.testing.assert_array_equal(value, old)
    cases.train(model, 1)
    assert int(model.optimizer.iterations) == 4


def test_no_pairs_of_gradient_and_variable():
    with pytest.raises(ValueError, match="a pair for each variable"):
        tf_effopt.SGD().apply_gradients([])


def test_a_loss_scale_shows_what_is_of_the_inner_optimizer():
    inner = tf_effopt.ScheduleFreeAdamW(groups=[tf_effopt.Group("kernel", frozen=True)])
    optimizer = tf_effopt.LossScaleOptimizer(inner)
    optimizer.build([keras.Variable([1.0], name="kernel")])
    assert optimizer.describe() == inner.describe()
    assert optimizer.groups is inner.groups
    assert optimizer.transforms is inner.transforms
    assert optimizer.skipped_steps == 0
    assert optimizer.is_evaluating is False
    optimizer.use_evaluation_weights()
    optimizer.use_training_weights()
    with pytest.raises(AttributeError, match="no attribute 'beta_3'"):
        print(optimizer.beta_3)


def test_numbers_of_the_inner_optimizer_are_set_there():
    optimizer = tf_effopt.LossScaleOptimizer(tf_effopt.AdamW())
    for name in ("beta_1", "weight_decay", "clipnorm"):
        with pytest.raises(AttributeError, match=f"optimizer.inner_optimizer.{name}"):
            setattr(optimizer, name, 0.5)
    optimizer.learning_rate = 0.5
    assert float(optimizer.inner_optimizer.learning_rate) == 0.5
