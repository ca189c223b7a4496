"""Optimizers of one structure share what is traced and compiled; others don't."""

from __future__ import annotations

import gc
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import CASES, KINDS, arrays, by_name, programs_of, traces

import tf_effopt
from tf_effopt.runtime import programs
from tf_effopt.transforms import AdaptiveClipping, GradientNoise

pytestmark = pytest.mark.fresh_programs

GRADIENT = np.linspace(-1.0, 2.0, 12).reshape(4, 3).astype("float32")
factor = 1.0


def variable(constraint=None, dtype="float32") -> keras.Variable:
    w = keras.Variable(np.ones((4, 3)), dtype=dtype, name="kernel")
    w.constraint = constraint
    return w


def stepped(optimizer, steps=3, **kind) -> np.ndarray:
    """A weight after some steps."""
    w = variable(**kind)
    for scale in (2.0, 0.5, -0.2)[:steps]:
        optimizer.apply([tf.constant(scale * GRADIENT, w.dtype)], [w])
    return arrays([w])[0].astype("float32")


@pytest.mark.representatives(*KINDS)
@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_a_second_optimizer_traces_nothing(case):
    first, second = case.make(global_clipnorm=1.0), case.make(global_clipnorm=1.0)
    expected = stepped(first)
    np.testing.assert_array_equal(stepped(second), expected)
    (one,), (other,) = programs_of(first), programs_of(second)
    assert one.update is other.update
    assert traces(second) == [1]


def test_in_an_eager_loop_in_a_graph_and_in_fit_it_is_the_same():
    def compiled():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        model.compile(tf_effopt.SGD(0.1), "mse", jit_compile=False)
        return model

    def step(model):
        variables = model.trainable_variables
        model.optimizer.apply([tf.ones(v.shape) for v in variables], variables)

    models = in_fit, eagerly, in_graph = compiled(), compiled(), compiled()
    in_fit.fit(np.ones((8, 4)), np.ones((8, 2)), verbose=0)
    for _ in range(2):
        step(eagerly)
    tf.function(lambda: step(in_graph))()
    assert len({programs_of(m.optimizer)[0].update for m in models}) == 1
    assert traces(in_graph.optimizer) == [1]


def test_numbers_are_those_of_each_optimizer():
    alone = stepped(tf_effopt.Adam(0.1, beta_1=0.5))
    stepped(tf_effopt.Adam(0.2, beta_1=0.9))
    np.testing.assert_array_equal(stepped(tf_effopt.Adam(0.1, beta_1=0.5)), alone)
    assert len(programs._shared) == 1


def max_norm(limit):
    return {"constraint": keras.constraints.MaxNorm(limit)}


DIFFERENT = {
    "option_of_the_rule": (
        lambda: tf_effopt.Adam(0.1, beta_2=0.1),
        lambda: tf_effopt.Adam(0.1, beta_2=0.1, amsgrad=True),
    ),
    "clipping": (
        lambda: tf_effopt.SGD(0.1, clipnorm=0.5),
        lambda: tf_effopt.SGD(0.1, clipvalue=0.5),
    ),
    "setting_of_a_transform": (
        lambda: tf_effopt.SGD(0.1, transforms=[AdaptiveClipping(0.01, exclude=[])]),
        lambda: tf_effopt.SGD(
            0.1, transforms=[AdaptiveClipping(0.01, exclude=["kernel"])]
        ),
    ),
    "seed": (
        lambda: tf_effopt.SGD(0.1, transforms=[GradientNoise(0.5, seed=1)]),
        lambda: tf_effopt.SGD(0.1, transforms=[GradientNoise(0.5, seed=2)]),
    ),
    "groups": (
        lambda: tf_effopt.SGD(0.1),
        lambda: tf_effopt.SGD(
            0.1, groups=[tf_effopt.Group("kernel", learning_rate_multiplier=0.5)]
        ),
    ),
    "accumulation": (
        lambda: tf_effopt.SGD(0.1, gradient_accumulation_steps=2),
        lambda: tf_effopt.SGD(0.1, gradient_accumulation_steps=3),
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_is_another_structure_is_another_program(name):
    one, other = DIFFERENT[name]
    alone = stepped(other())
    programs._shared.clear()
    assert np.abs(stepped(one()) - alone).max() > 1e-3
    np.testing.assert_array_equal(stepped(other()), alone)
    assert len(programs._shared) == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (max_norm(0.5), max_norm(1.0)),
        (max_norm(1.0), {}),
        ({"constraint": keras.constraints.NonNeg()}, max_norm(1.0)),
        ({"dtype": "bfloat16"}, {"dtype": "float32"}),
    ],
    ids=["norms", "none", "classes", "dtypes"],
)
def test_so_are_variables_of_another_kind(one, other):
    alone = stepped(tf_effopt.SGD(0.3), **other)
    programs._shared.clear()
    assert np.abs(stepped(tf_effopt.SGD(0.3), **one) - alone).max() > 1e-3
    np.testing.assert_array_equal(stepped(tf_effopt.SGD(0.3), **other), alone)


def global_rule(g, slots, *, learning_rate):
    return -factor * learning_rate * g, slots


class ByAGlobal(tf_effopt.Optimizer):
    """A rule that looks at a variable of its module, as in a notebook."""

    rule = staticmethod(global_rule)


def test_a_rule_of_a_user_is_traced_for_each_optimizer(monkeypatch):
    before = stepped(ByAGlobal(0.1), steps=1)
    monkeypatch.setitem(globals(), "factor", 3.0)
    after = stepped(ByAGlobal(0.1), steps=1)
    np.testing.assert_allclose(after - 1.0, 3.0 * (before - 1.0), rtol=1e-5)
    assert not programs._shared


class Halves(keras.constraints.Constraint):
    def __call__(self, w):
        return w * 0.5


def test_optimizers_variables_and_constraints_of_a_user_are_freed():
    def trained():
        optimizer, constraint = tf_effopt.SGD(0.1), Halves()
        stepped(optimizer, constraint=constraint)
        return weakref.ref(optimizer), weakref.ref(constraint)

    def of_our_own():
        optimizer, w = tf_effopt.Adam(0.1), variable()
        optimizer.apply([tf.constant(GRADIENT)], [w])
        return weakref.ref(optimizer), weakref.ref(w)

    references = [*trained(), *of_our_own()]
    gc.collect()
    assert [r() for r in references] == [None] * 4
    # What is left of them serves the next one.
    stepped(tf_effopt.Adam(0.1))
    assert len(programs._shared) == 1


def test_the_number_of_structures_that_are_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(programs, "MOST_SHARED", 2)
    for steps in (2, 3, 4):
        stepped(tf_effopt.SGD(0.1, gradient_accumulation_steps=steps))
    assert len(programs._shared) == 2
