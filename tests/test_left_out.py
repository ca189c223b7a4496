"""Variables without a gradient: any set of them costs nothing to compile."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import CASES, STAGES, arrays, by_name, programs_of

import tf_effopt
from tf_effopt import Adam, AdamW, Group
from tf_effopt.runtime import choice

pytestmark = [
    pytest.mark.fresh_programs,
    pytest.mark.filterwarnings("ignore:Gradients do not exist"),
    pytest.mark.filterwarnings("ignore:.*goes by the paths"),
]

SHAPES = {"kernel": (6, 4), "bias": (4,), "table": (9, 3), "scale": (), "other": (6, 4)}
NAMES = list(SHAPES)
# What has a gradient, update by update: all, some, one, those of before.
SETS = ["01234", "024", "1", "01234", "0134", "24", "024", "3", "01", "01234"]


def problem(dtype="float32"):
    rng = np.random.default_rng(0)
    weights = [
        keras.Variable(rng.normal(size=shape), dtype=dtype, name=name)
        for name, shape in SHAPES.items()
    ]
    gradients = [
        [keras.ops.cast(rng.normal(size=shape), dtype) for shape in SHAPES.values()]
        for _ in SETS
    ]
    return weights, gradients


def apply(optimizer, weights, kept, *given):
    """A step with these gradients, of the variables in `kept`."""
    left = iter(given)
    optimizer.apply([next(left) if i in kept else None for i in range(5)], weights)


def run(optimizer, dtype="float32", way=lambda f: f, spoil=None):
    """The weights and the state at the end."""
    weights, gradients = problem(dtype)
    optimizer.build(weights)

    for step, (chosen, gs) in enumerate(zip(SETS, gradients, strict=True)):
        kept = set(map(int, chosen))
        given = [gs[i] for i in sorted(kept)]
        if step == spoil:
            given[-1] = given[-1] * np.inf

        way(functools.partial(apply, optimizer, weights, frozenset(kept)))(*given)
    return arrays([*weights, *optimizer.variables]), optimizer.skipped_steps


@pytest.fixture
def programs_of_their_own(monkeypatch):
    """Each set gets dedicated programs, traced without what is left out; not compiled."""

    def activate():
        monkeypatch.setattr(choice, "shares_programs", lambda *_: False)
        tf.config.run_functions_eagerly(True)

    yield activate
    tf.config.run_functions_eagerly(False)


def assert_equal(make, activate, dtype="float32", **options):
    found, skipped = run(make(), dtype, **options)
    activate()
    expected, also_skipped = run(make(), dtype, **options)
    assert skipped == also_skipped == ("spoil" in options)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        a, b = a.astype("float64"), b.astype("float64")
        largest = np.abs(b).max(initial=1e-1)
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6 * largest, err_msg=str(i))


def groups():
    return [
        Group("kernel", learning_rate_multiplier=0.5),
        Group("table", frozen=True),
        Group("bias", weight_decay=0.1),
    ]


OPTIONS = {
    "global_clipnorm": lambda: {"global_clipnorm": 0.5},
    "clipnorm": lambda: {"clipnorm": 0.5},
    "clipvalue": lambda: {"clipvalue": 0.1},
    "accumulation": lambda: {"gradient_accumulation_steps": 2, "clipnorm": 0.5},
    "ema": lambda: {
        "use_ema": True,
        "ema_momentum": 0.5,
        "ema_overwrite_frequency": 2,
    },
    "loss_scale": lambda: {"loss_scale_factor": 8.0},
    "groups": lambda: {"groups": groups()},
    **STAGES,
}


@pytest.mark.representatives("adam", "muon")
@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_rules_do_the_same(case, programs_of_their_own):
    assert_equal(case.make, programs_of_their_own)


@pytest.mark.representatives("accumulation", "mars")
@pytest.mark.parametrize("name", OPTIONS)
def test_options_do_the_same(name, programs_of_their_own):
    def make():
        return AdamW(0.01, weight_decay=0.05, **OPTIONS[name]())

    assert_equal(make, programs_of_their_own)


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_narrow_weights_do_the_same(rounding, programs_of_their_own):
    assert_equal(
        lambda: Adam(0.01, rounding=rounding), programs_of_their_own, dtype="bfloat16"
    )


@pytest.mark.representatives("plain-0", "mars-6", "schedule_free-1")
@pytest.mark.parametrize("step", [0, 1, 6])
@pytest.mark.parametrize("name", ["plain", "ema", "mars", "schedule_free"])
def test_a_step_that_is_not_finite_changes_nothing(name, step, programs_of_their_own):
    def make():
        if name == "schedule_free":
            return tf_effopt.ScheduleFreeAdamW(0.01)
        return Adam(0.01, **OPTIONS.get(name, dict)())

    assert_equal(make, programs_of_their_own, spoil=step)


def test_in_a_graph_for_each_set(programs_of_their_own):
    def way(function):
        return tf.function(function, autograph=False)

    assert_equal(lambda: Adam(0.01), programs_of_their_own, way=way)


@pytest.mark.parametrize(
    "way, count", [(lambda f: f, 60), (tf.function, 12)], ids=["eager", "graph"]
)
def test_many_sets_make_two_programs(way, count):
    """Of which one is for the first set, and one for all others."""
    rng = np.random.default_rng(1)
    weights = [keras.Variable(rng.normal(size=(8, 8))) for _ in range(12)]
    optimizer = Adam(0.01, global_clipnorm=1.0)
    optimizer.build(weights)
    compiled = []
    for _ in range(count):
        chosen = rng.permutation(12)[: rng.integers(1, 12)].tolist()
        gradients = [keras.ops.ones((8, 8)) if i in chosen else None for i in range(12)]

        @way
        def step(gradients=gradients):
            optimizer.apply(gradients, weights)

        step()
        traces = {id(p.update): p.update.run.traces for p in programs_of(optimizer)}
        compiled.append(sum(traces.values()))
    assert compiled[-1] == compiled[1] == 2


def test_a_set_that_comes_back_after_others_is_not_traced_again():
    weights, gradients = problem()
    optimizer = Adam(0.01)
    for chosen in ("01234", "012", "01234", "34", "01234"):
        given = [gradients[0][i] if str(i) in chosen else None for i in range(5)]
        optimizer.apply(given, weights)
    first, any_set = programs_of(optimizer)
    assert first.update is any_set.update  # of the same variables
    assert first.update.run.traces == 2


def test_stand_ins_share_the_memory_of_the_largest():
    weights, gradients = problem()
    optimizer = Adam(0.01)
    for chosen in ("01234", "1"):
        given = [gradients[0][i] if str(i) in chosen else None for i in range(5)]
        optimizer.apply(given, weights)
    kept = optimizer._engine.programs._missing_gradients
    assert [tuple(x.shape) for x in kept._zeros.values()] == [(27,)]
    shapes = {tuple(x.shape) for x in kept._views.values()}
    assert shapes == set(SHAPES.values()) - {(4,)}


def test_gradients_of_another_dtype_than_the_weights_are_taken():
    weights, gradients = problem("bfloat16")
    optimizer = Adam(0.01)
    for dtype, chosen in (("bfloat16", "01234"), ("float32", "012"), ("bfloat16", "1")):
        optimizer.apply(
            [
                tf.cast(gradients[0][i], dtype) if str(i) in chosen else None
                for i in range(5)
            ],
            weights,
        )
    assert all(np.isfinite(x.astype("float64")).all() for x in arrays(weights))
