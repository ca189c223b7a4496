"""Stages with slots: their contract, and those of the package against NumPy."""

from __future__ import annotations

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import STAGES, X, Y, arrays, compiled_model, train
from cases import weights_after as steps

import tf_effopt
from tf_effopt import SGD, Adam, AdamW, Group, Stage, hyperparameters
from tf_effopt.averaging import Lookahead
from tf_effopt.base.stage import PLACES
from tf_effopt.rules import ModelRule, Slot, Slots
from tf_effopt.transforms import MARS, Transform

# ------------------------------------------------------------------- the contract


def remember(x, slots, *, share):
    mean = slots["mean"] + share * (x - slots["mean"])
    return mean, {"mean": mean}


def stage_at(place, function=remember, **declared):
    """An instance of a new class of stages."""
    names = {
        "where": place,
        "slots": Slots(mean="mean"),
        "function": staticmethod(function),
        "share": hyperparameters.Fraction(default=0.5),
    }
    return type("Remember", (Stage,), names | declared)()


def argument_at(place):
    """The argument of an optimizer that takes stages at a place."""
    return "averaging" if place in ("write", "average") else "transforms"


@pytest.mark.parametrize(
    "place, expected",
    {
        # Gradients 1, 1; SGD at rate 1 without momentum, from 0.
        "sent": [-0.5, -0.5 - 0.75],
        "gradient": [-0.5, -0.5 - 0.75],
        "update": [-0.5, -0.5 - 0.75],
        # Of the weight: -1 -> -0.5; then -1.5 -> (-0.5 - 1.5) / 2.
        "write": [-0.5, -1.0],
        "average": [-0.5, -1.0],
    }.items(),
)
def test_a_stage_changes_what_is_at_its_place(place, expected):
    argument = argument_at(place)
    optimizer = SGD(1.0, **{argument: [stage_at(place)]})
    assert steps(optimizer, [1.0, 1.0]) == expected
    (mean,) = [v for v in optimizer.variables if v.path.endswith("mean")]
    assert optimizer.variables[-1] is mean  # after the rule's


@pytest.mark.parametrize("place", PLACES)
def test_what_a_function_may_ask_for(place):
    seen = {}
    names = ["w", "t", "learning_rate", "weight_decay", "input_axes", "noise", "share"]
    further = {"update": ["g"], "write": ["g", "delta", "rounded"]}
    names += further.get(place, [])

    def function(x, slots, **received):
        # Now: tensors of a trace can't be looked at later.
        seen.update(received)
        seen["integer"] = "int" in str(received["t"].dtype)
        seen["noise"] = tuple(received["noise"](0).shape)
        return x, slots

    function.__module__ = None  # as that of what `exec` has made
    function.__signature__ = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    )
    stage = stage_at(place, function, slots=Slots())
    argument = argument_at(place)
    optimizer = SGD(0.5, weight_decay=0.25, **{argument: [stage]})
    steps(optimizer, [np.ones((3, 2))])
    assert set(names) <= set(seen)
    assert seen["input_axes"] == (0,)
    assert seen["noise"] == (3, 2)
    assert seen["integer"] == (place == "average")


@pytest.mark.parametrize("place", PLACES)
def test_a_name_that_nothing_provides_is_an_error_at_build(place):
    stage = stage_at(place, lambda x, slots, *, shar: (x, slots))
    argument = argument_at(place)
    optimizer = SGD(0.5, **{argument: [stage]})
    with pytest.raises(TypeError, match="takes `shar`, which nothing provides"):
        optimizer.build([keras.Variable([1.0])])


@pytest.mark.parametrize(
    "function",
    [
        lambda x, slots: x,
        lambda x, slots: (x, {}),
        lambda x, slots: (x, {"other": x}),
        lambda x, slots: (x, x),
    ],
)
@pytest.mark.parametrize("place", ["sent", "gradient", "average"])
def test_a_function_that_returns_something_else_is_an_error(place, function):
    argument = argument_at(place)
    optimizer = SGD(1.0, **{argument: [stage_at(place, function)]})
    with pytest.raises(TypeError, match=r"must return `\(x, slots\)`.*\['mean'\]"):
        steps(optimizer, [1.0])


def test_a_place_that_is_not_there_is_refused():
    with pytest.raises(
        TypeError, match="`where` of Mine must be one of 'sent', 'gradient'"
    ):
        type("Mine", (Stage,), {"where": "gradients"})
    with pytest.raises(TypeError, match="doesn't say where it runs"):
        SGD(transforms=[type("Mine", (Stage,), {})()])


@pytest.mark.parametrize(
    "arguments",
    [
        {"transforms": [Lookahead()]},
        {"averaging": [MARS()]},
        {"averaging": MARS()},
        {"averaging": Lookahead},
        {"averaging": "lookahead"},
        {"averaging": [Lookahead(), 3]},
        {"averaging": Lookahead(), "use_ema": True},
    ],
    ids=str,
)
def test_a_stage_in_the_wrong_argument_is_refused(arguments):
    with pytest.raises(ValueError, match="`(transforms|averaging)`.*Received: "):
        SGD(**arguments)


def test_averaging_takes_one_a_list_or_none():
    one = Lookahead()
    assert SGD(averaging=one).averaging == (one,)
    assert SGD(averaging=[one]).averaging == (one,)
    assert SGD(averaging=None).averaging == SGD().averaging == ()


def test_the_constructor_is_made_of_the_declarations():
    class Mine(Stage):
        where = "average"
        function = staticmethod(lambda x, slots, *, period, share: (x, slots))
        period: int = hyperparameters.Integer(default=6, low=1)
        share: float = hyperparameters.Fraction(default=0.5)

    class Other(Mine):
        share: float = hyperparameters.Fraction(default=0.25)
        limit: float = hyperparameters.Positive(default=2.0)

    assert str(inspect.signature(Mine)) == "(period=6, share=0.5)"
    assert str(inspect.signature(Other)) == "(period=6, share=0.25, limit=2.0)"
    other = Other(3, limit=1.0)
    assert (other.period, other.share, other.limit) == (3, 0.25, 1.0)
    assert Other.from_config(other.get_config()).get_config() == other.get_config()
    assert repr(other) == "Other(period=3, share=0.25, limit=1.0)"
    with pytest.raises(TypeError, match="no argument `perod`. Did you mean `period`"):
        Other(perod=3)
    with pytest.raises(ValueError, match="`share` must be in .*Received: share=3"):
        Mine(share=3)
    with pytest.raises(ValueError, match="`share` must be in .*Received: share=3"):

        class Wrong(Stage):
            share: float = hyperparameters.Fraction(default=3.0)


def test_a_constructor_written_by_hand_stays():
    class Mine(MARS):
        def __init__(self, gamma):
            super().__init__(gamma=gamma, beta_1=0.5)

    class Another(Mine):
        factor: float = hyperparameters.Positive(default=1.0)

    for cls in (Mine, Another):
        assert cls(0.1).get_config() == {"gamma": 0.1}
        assert cls(0.1).beta_1 == 0.5


def test_hyperparameters_change_without_a_trace():
    stage = stage_at("gradient")
    optimizer = SGD(1.0, transforms=[stage])
    weights = steps(optimizer, [1.0])
    stage.share = 1.0
    w = optimizer._trainable_variables[0]
    optimizer.apply([tf.constant(1.0)], [w])
    assert weights + [float(w.numpy())] == [-0.5, -1.5]


def test_numbers_of_the_model_reach_a_stage_at_each_place():
    """A `model_rule` sees the gradient; its numbers come by name."""

    def largest(sums, slots, *, t):
        return {"norm": keras.ops.sqrt(sums["squares"])}, {"seen": t}

    rule = ModelRule(
        largest,
        {"seen": ("seen", 0.0)},
        measure=lambda g, slots: {"squares": keras.ops.sum(g * g)},
    )
    for place in ("gradient", "update", "write", "average"):
        stage = stage_at(
            place,
            lambda x, slots, *, norm: (x * 0 + norm, slots),
            slots=Slots(),
            model_rule=rule,
        )
        argument = argument_at(place)
        optimizer = SGD(1.0, **{argument: [stage]})
        v, w = keras.Variable([0.0]), keras.Variable([0.0])
        optimizer.apply([tf.constant([3.0]), tf.constant([4.0])], [v, w])
        sign = -1.0 if place == "gradient" else 1.0
        assert v.numpy() == w.numpy() == sign * 5.0
        assert stage.slot("seen") == 1.0


def test_a_step_that_is_not_taken_leaves_the_slots():
    optimizer = SGD(1.0, transforms=[MARS()], averaging=Lookahead(2))
    w = keras.Variable([0.0, 0.0])
    optimizer.apply([tf.constant([1.0, 2.0])], [w])
    before = arrays([w, *optimizer.variables])
    optimizer.apply([tf.constant([1.0, np.nan])], [w])
    assert optimizer.skipped_steps == 1
    for was, now in zip(before, arrays([w, *optimizer.variables]), strict=True):
        np.testing.assert_array_equal(was, now)


def test_slots_of_two_stages_of_one_class_are_apart():
    optimizer = SGD(1.0, transforms=[stage_at("gradient"), stage_at("gradient")])
    # 1 -> 0.5 -> 0.25; then 1 -> 0.75 -> 0.5.
    assert steps(optimizer, [1.0, 1.0]) == [-0.25, -0.75]


def test_a_stage_acts_and_keeps_slots_only_where_it_says():
    mars = MARS(0.5, beta_1=0.5, exclude=["bias"])
    optimizer = SGD(1.0, transforms=[mars])
    w, b = keras.Variable([0.0], name="kernel"), keras.Variable([0.0], name="bias")
    for g in (0.2, 0.4):
        optimizer.apply([tf.constant([g])] * 2, [w, b])
    np.testing.assert_allclose([*w.numpy(), *b.numpy()], [-0.8, -0.6], rtol=1e-6)
    assert [v.name for v in optimizer.variables[2:]] == ["kernel_last_gradient"]


def test_carry_over_keeps_the_slots():
    v, w = keras.Variable([0.0]), keras.Variable([0.0])
    optimizer = SGD(1.0, transforms=[MARS()], averaging=Lookahead(3))
    optimizer.apply([tf.constant([0.5])], [v])
    other = optimizer.carry_over([w, v])
    state = {
        x.path.rpartition("/")[2]: float(x.numpy()[0]) for x in other.variables[2:]
    }
    name = v.path
    assert state[f"{name}_last_gradient"] == 0.5
    assert state[f"{name}_slow_weight"] == 0.0


@pytest.mark.parametrize("rounding", ["stochastic", "compensated", "nearest"])
def test_narrow_weights(rounding):
    """What a stage keeps is float32, and it moves the weight as it should."""
    optimizer = SGD(
        1e-3, transforms=[MARS()], averaging=Lookahead(2), rounding=rounding
    )
    w = keras.Variable(np.ones(4000), dtype="bfloat16")
    for _ in range(20):
        optimizer.apply([tf.ones(4000, "bfloat16")], [w])
    kept = {v.name.partition("_")[2]: v for v in optimizer.variables[2:]}
    for name, v in kept.items():
        own = "bfloat16" if "compensation" in name else "float32"
        assert keras.backend.standardize_dtype(v.dtype) == own
    parts = [w, *(v for name, v in kept.items() if "compensation" in name)]
    moved = 1 - np.mean(sum(x.astype("float64") for x in arrays(parts)))
    if rounding != "nearest":  # There it never moves.
        wide = steps(
            SGD(1e-3, transforms=[MARS()], averaging=Lookahead(2)),
            [np.ones(4000)] * 20,
            1.0,
        )
        assert moved == pytest.approx(1 - np.mean(wide[-1]), rel=0.1)


# ---------------------------------------------------------------------------- MARS


def mars(gradients, gamma, beta_1):
    """c of the paper's equation, with the last batch's gradient, in float64."""
    last, made = 0.0 * gradients[0], []
    for g in gradients:
        c = g + gamma * beta_1 / (1 - beta_1) * (g - last)
        made.append(c / max(1.0, np.linalg.norm(c)))
        last = g
    return made


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e18])
def test_mars_follows_its_paper(scale):
    gradients = np.random.default_rng(0).normal(size=(12, 5, 3)) * scale
    gradients[3] *= 0.01
    weights = steps(SGD(1.0, transforms=[MARS(0.025, beta_1=0.95)]), gradients)
    expected = -np.cumsum(mars(gradients, 0.025, 0.95), axis=0)
    largest = np.abs(expected).max()
    np.testing.assert_allclose(weights, expected, atol=2e-6 * largest)


def test_mars_takes_a_gradient_whose_squares_just_fit():
    """That of `c` has squares that don't: 1.475 times as large."""
    g = np.full(9, 6e18)  # of norm 1.8e19
    (w,) = steps(SGD(1.0, transforms=[MARS()]), [g])
    np.testing.assert_allclose(w, -np.full(9, 1 / 3), rtol=1e-6)


# ----------------------------------------------------------------------- Lookahead


def lookahead(start, gradients, rate, period, step_size):
    """The paper's Algorithm 1 with SGD as the inner optimizer."""
    slow, fast, weights = start, start, []
    for t, g in enumerate(gradients, 1):
        fast = fast - rate * g
        if t % period == 0:
            slow = slow + step_size * (fast - slow)
            fast = slow
        weights.append(fast)
    return weights


@pytest.mark.parametrize("step_size", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("period", [1, 4])
def test_lookahead_follows_its_paper(period, step_size):
    gradients = np.random.default_rng(0).normal(size=(11, 6))
    optimizer = SGD(0.1, averaging=Lookahead(period, step_size))
    weights = steps(optimizer, gradients, start=2.0)
    expected = lookahead(2.0, gradients, 0.1, period, step_size)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_lookahead_counts_updates_not_micro_steps():
    gradients = np.random.default_rng(1).normal(size=(12, 3))
    optimizer = SGD(0.1, averaging=Lookahead(2), gradient_accumulation_steps=2)
    weights = steps(optimizer, gradients)[1::2]
    means = gradients.reshape(6, 2, 3).mean(1)
    np.testing.assert_allclose(weights, lookahead(0.0, means, 0.1, 2, 0.5), atol=1e-6)


def test_lookahead_starts_at_weights_that_were_set_after_build():
    w = keras.Variable([0.0])
    optimizer = SGD(1.0, averaging=Lookahead(1, step_size=0.5))
    optimizer.build([w])
    w.assign([10.0])
    optimizer.apply([tf.constant([2.0])], [w])
    assert w.numpy() == 9.0


def test_lookahead_moves_variables_without_a_gradient_and_not_frozen_ones():
    a, b, c = (keras.Variable([0.0], name=x) for x in "abc")
    optimizer = SGD(
        1.0, averaging=Lookahead(2, step_size=0.5), groups=[Group("c", frozen=True)]
    )
    ones = [tf.constant([1.0])] * 3
    optimizer.apply(ones, [a, b, c])
    c.assign([5.0])  # by hand
    optimizer.apply(ones[:1], [a])
    assert [float(v.numpy()[0]) for v in (a, b, c)] == [-1.0, -0.5, 5.0]


def test_lookahead_with_compensated_rounding_loses_nothing():
    """The weight and what was lost are the slow weight, to rounding."""
    optimizer = SGD(1e-3, averaging=Lookahead(4), rounding="compensated")
    w = keras.Variable(np.linspace(0.5, 2, 50), dtype="bfloat16")
    start = keras.ops.convert_to_numpy(w).astype("float64")
    for _ in range(8):
        optimizer.apply([tf.ones(50, "bfloat16")], [w])
    lost, slow = (keras.ops.convert_to_numpy(v) for v in optimizer.variables[-2:])
    whole = keras.ops.convert_to_numpy(w).astype("float64") + lost.astype("float64")
    np.testing.assert_allclose(whole, slow, atol=2e-5)
    np.testing.assert_allclose(whole, start - 4e-3, atol=4e-5)


# ------------------------------------------------------------------ in `fit`, saved


def test_a_model_is_saved_with_stages_of_its_own_package():
    optimizer = AdamW(1e-3, transforms=[MARS()], averaging=Lookahead(period=3))
    train(compiled_model(optimizer), 4)
    config = optimizer.get_config()
    assert config["averaging"][0]["registered_name"] == "tf_effopt>Lookahead"
    again = tf_effopt.AdamW.from_config(config)
    assert again.averaging[0].period == 3 and again.transforms[0].gamma == 0.025
    assert len(again.transforms) == 1


def test_files_of_optimizers_without_the_stage_are_refused(tmp_path):
    model = train(compiled_model(Adam(1e-3)), 1)
    model.save_weights(tmp_path / "w.weights.h5")
    other = compiled_model(Adam(1e-3, averaging=Lookahead()))
    with pytest.raises(ValueError, match="The saved state doesn't fit"):
        other.load_weights(tmp_path / "w.weights.h5")
        train(other, 1)


@pytest.mark.fresh_programs
@pytest.mark.parametrize("name", ["mars", "lookahead"])
def test_optimizers_with_equal_stages_share_their_program(name):
    from cases import traces

    first, second = (Adam(1e-3, **STAGES[name]()) for _ in range(2))
    for optimizer in (first, second):
        compiled_model(optimizer).fit(X, Y, batch_size=8, epochs=2, verbose=0)
    assert traces(first) == traces(second) == [1]


def test_a_transform_may_have_both_functions():
    class Both(Transform):
        before = staticmethod(lambda g: 2 * g)
        after = staticmethod(lambda delta, g: delta + g)

    assert steps(SGD(3.0, transforms=[Both()]), [1.0]) == [-6.0 + 2.0]


def test_a_stage_may_start_slots_at_the_weight():
    function = lambda x, slots, *, w: (x + w - slots["start"], slots)
    stage = stage_at(
        "gradient", function, slots=Slots(start=Slot("start", starts_at_weight=True))
    )
    # The gradient is 1 and how far the weight has gone.
    weights = steps(SGD(0.5, transforms=[stage]), [1.0, 1.0, 1.0], start=3.0)
    assert weights == [2.5, 2.25, 2.125]


def test_arguments_of_keras_make_stages():
    optimizer = SGD(
        0.1,
        loss_scale_factor=2.0,
        gradient_accumulation_steps=2,
        clipnorm=1.0,
        use_ema=True,
        rounding="compensated",
    )
    optimizer.build([keras.Variable([1.0], dtype="bfloat16")])
    plan = optimizer._engine.plan
    assert {stage.key: stage.where for stage in plan.stages} == {
        "loss_scale": "received",
        "accumulation": "accumulation",
        "clipnorm": "clipping",
        "compensation": "write",
        "ema": "average",
    }
    plain = SGD(0.1)
    plain.build([keras.Variable([1.0])])
    assert plain._engine.plan.stages == ()
