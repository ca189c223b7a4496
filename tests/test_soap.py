"""SOAP: its bases, and Adam where there are none."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from cases import traces
from keras import ops

import tf_effopt
from tf_effopt.engine import linalg

pytestmark = pytest.mark.fresh_programs

SETTINGS = {"learning_rate": 0.02, "beta_1": 0.9, "beta_2": 0.99, "epsilon": 1e-4}


def gradients(shape, steps, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype("float32") for _ in range(steps)]


def run(optimizer, start, gs, dtype="float32"):
    """The weights after each update."""
    w = keras.Variable(start, dtype=dtype)
    after = []
    for g in gs:
        optimizer.apply([ops.convert_to_tensor(g, dtype)], [w])
        after.append(w.numpy())
    return after


def slots_of(optimizer) -> dict[str, np.ndarray]:
    (tensors,) = optimizer._engine.state
    return {symbol: v.numpy() for symbol, v in tensors["rule"].items()}


@pytest.mark.parametrize("shape", [(4, 5), (7,), (), (2, 3, 4)])
def test_without_a_basis_it_is_adam_from_the_second_gradient_on(shape):
    gs = gradients(shape, 25)
    start = np.ones(shape, "float32")
    soap = tf_effopt.SOAP(
        **SETTINGS, weight_decay=0.0, max_precondition_dim=1, precondition_frequency=2
    )
    ours = run(soap, start, gs)
    adam = run(tf_effopt.Adam(**SETTINGS), start, gs[1:])
    np.testing.assert_array_equal(ours[0], start)
    np.testing.assert_allclose(ours[1:], adam, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(3,), (3, 4)])
def test_without_a_basis_small_elements_move_as_in_adam(shape):
    g = np.resize(np.array([1.0, 1e-5, 1e-7], "float32"), shape)
    settings = SETTINGS | {"epsilon": 1e-12}
    soap = tf_effopt.SOAP(**settings, weight_decay=0.0, max_precondition_dim=1)
    ours = run(soap, np.zeros(shape, "float32"), [g] * 4)
    adam = run(tf_effopt.Adam(**settings), np.zeros(shape, "float32"), [g] * 3)
    np.testing.assert_allclose(ours[1:], adam, rtol=1e-5)


def test_gradients_along_the_axes_make_it_adam():
    """The bases are then a permutation of the identity's columns."""
    ours, adam = along_the_axes("float64")
    np.testing.assert_allclose(ours, adam, rtol=0, atol=1e-9)


def test_gradients_along_the_axes_make_it_adam_but_for_rounding():
    """A factorization may round a basis by one unit in the last place."""
    ours, adam = along_the_axes("float32")
    is_along = np.eye(4, dtype=bool)
    np.testing.assert_allclose(ours[:, is_along], adam[:, is_along], rtol=0, atol=1e-6)
    # Elsewhere, where no gradient is, a basis that is wrong by a unit in the last place
    # adds so much of the largest gradient, 9, over `epsilon`.
    share = 9 * np.finfo("float32").eps / SETTINGS["epsilon"]
    moves = np.abs(np.diff(ours[:, ~is_along], axis=0))
    assert moves.max() <= share * SETTINGS["learning_rate"]


def along_the_axes(dtype):
    """The weights under SOAP from the second update on, and under Adam."""
    scales = np.array([3.0, 1.0, 2.0, 0.5])
    rng = np.random.default_rng(0)
    gs = [
        np.diag(scales),
        *(np.diag(scales * (2 + rng.normal(size=4))) for _ in range(8)),
    ]
    start = np.ones((4, 4))
    soap = tf_effopt.SOAP(**SETTINGS, weight_decay=0.0, precondition_frequency=2)
    ours = run(soap, start, gs, dtype)
    adam = run(tf_effopt.Adam(**SETTINGS), start, gs[1:], dtype)
    return np.array(ours[1:]), np.array(adam)


def test_a_rotation_of_the_problem_rotates_the_weights():
    """What Adam hasn't got: rows turned by U, columns by V."""
    rng = np.random.default_rng(1)
    U, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    V, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    gs = gradients((4, 4), 30)
    start = rng.normal(size=(4, 4))

    def last(optimizer, turned):
        found = run(
            optimizer(**SETTINGS),
            U @ start @ V if turned else start,
            [U @ g @ V if turned else g for g in gs],
            "float64",
        )[-1]
        return U.T @ found @ V.T if turned else found

    def difference(optimizer):
        return np.max(np.abs(last(optimizer, True) - last(optimizer, False)))

    assert difference(tf_effopt.SOAP) < 1e-9
    assert difference(tf_effopt.Adam) > 1e-2


def test_bases_stay_orthonormal_and_find_the_eigenvectors():
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.normal(size=(24, 24)))
    scales = 1.3 ** -np.arange(24.0)
    gs = [(left * scales) @ rng.normal(size=(24, 6)) for _ in range(400)]
    optimizer = tf_effopt.SOAP(shampoo_beta=0.99, precondition_frequency=1)
    run(optimizer, np.zeros((24, 6)), gs)
    slots = {k: x.astype("float64") for k, x in slots_of(optimizer).items()}
    for basis in (slots["Q0"], slots["Q1"]):
        assert np.max(np.abs(basis.T @ basis - np.eye(len(basis)))) < 2e-6
    inside = slots["Q0"].T @ slots["L0"] @ slots["Q0"]
    values = np.diag(inside)
    assert np.linalg.norm(inside - np.diag(values)) < 0.05 * np.linalg.norm(inside)
    assert np.all(values[1:] < 1.1 * values[:-1])


@pytest.mark.representatives("rank_one", "overflow")
@pytest.mark.parametrize(
    "gs",
    [
        [np.zeros((5, 3))] * 8,
        [np.zeros((5, 3))] * 3 + gradients((5, 3), 5),
        [np.ones((5, 3))] * 8,
        [1e-30 * g for g in gradients((5, 3), 8)],
        [1e25 * g for g in gradients((5, 3), 8)],
    ],
    ids=["zero", "zero_first", "rank_one", "underflow", "overflow"],
)
def test_any_finite_gradient_leaves_weights_finite_and_bases_orthonormal(gs):
    optimizer = tf_effopt.SOAP(precondition_frequency=2)
    after = run(optimizer, np.ones((5, 3)), gs)
    assert np.all(np.isfinite(after))
    for k, n in enumerate((5, 3)):
        basis = slots_of(optimizer)[f"Q{k}"]
        np.testing.assert_allclose(basis.T @ basis, np.eye(n), atol=2e-6)


def test_rounding_does_not_choose_a_basis():
    """Where the first gradient says nothing, a change of 1e-7 changes nothing."""
    rng = np.random.default_rng(0)
    g = rng.normal(size=(30, 2)) @ rng.normal(size=(2, 40))

    def bases(noise):
        optimizer = tf_effopt.SOAP()
        run(optimizer, np.zeros(g.shape), [g * (1 + noise * rng.normal(size=g.shape))])
        return slots_of(optimizer)

    one, other = bases(0.0), bases(1e-7)
    for k in range(2):
        np.testing.assert_allclose(one[f"Q{k}"], other[f"Q{k}"], atol=1e-5)


def test_rounding_moves_nothing():
    """A gradient of rank one has no share in 24 of 25 directions, but in float32."""
    rng = np.random.default_rng(0)
    row, column = rng.integers(1, 20, size=(2, 5))
    gs = [np.outer(row, column) * x for x in rng.integers(1, 9, size=40)]  # exact
    start = np.zeros((5, 5))

    def last(dtype):
        optimizer = tf_effopt.SOAP(learning_rate=0.01, precondition_frequency=3)
        return run(optimizer, start, gs, dtype)[-1]

    # As it stands in the paper, rounding moves the weights by 24 learning rates.
    assert np.max(np.abs(last("float32") - last("float64"))) < 0.01


def test_frequency_may_change_while_training():
    gs = gradients((4, 3), 12)
    optimizer = tf_effopt.SOAP(precondition_frequency=2)
    w = keras.Variable(np.ones((4, 3), "float32"))
    changed = []
    for t, g in enumerate(gs, 1):
        before = slots_of(optimizer)["Q0"] if t > 1 else np.zeros((4, 4))
        optimizer.apply([ops.convert_to_tensor(g)], [w])
        if np.any(slots_of(optimizer)["Q0"] != before):
            changed.append(t)
        if t == 5:
            optimizer.precondition_frequency = 5
    assert changed == [1, 3, 5, 6, 11]
    assert traces(optimizer) == [1]


@pytest.mark.representatives("None")
@pytest.mark.parametrize("frequency", [3, None])
def test_a_tensor_whose_first_gradient_comes_late_trains_as_a_new_one(frequency):
    def make():
        return tf_effopt.SOAP(precondition_frequency=frequency, weight_decay=0.0)

    early, late, alone = (keras.Variable(np.ones((3, 3), "float32")) for _ in range(3))
    optimizer, new = make(), make()
    optimizer.build([early, late])
    for t, g in enumerate(gradients((3, 3), 6)):
        before = late.numpy()
        g = ops.convert_to_tensor(g + 1)
        optimizer.apply([g, g if t >= 4 else None], [early, late])
        if t >= 4:
            new.apply([g], [alone])
        # The first update of a tensor makes its bases and leaves the weights.
        assert np.all(late.numpy() != before) == (t > 4)
        np.testing.assert_allclose(late.numpy(), alone.numpy(), rtol=1e-6)
    assert max(np.mean(early.numpy()), np.mean(late.numpy())) < 1


def test_equal_shapes_are_factorized_together():
    shapes = []

    def function(a, b):
        shapes.append(a.shape)
        return a + b, 2 * a

    xs = [np.full(shape, i) for i, shape in enumerate([(2, 2), (3, 3), (2, 2)])]
    found = linalg.together(function, xs, xs)
    assert shapes == [(2, 2, 2), (1, 3, 3)]
    for i, (x, (total, double)) in enumerate(zip(xs, found, strict=True)):
        assert total.shape == double.shape == x.shape
        assert np.all(ops.convert_to_numpy(total) == 2 * i)


def test_orthonormal_columns_keep_their_direction():
    rng = np.random.default_rng(0)
    signs = np.array([1.0, -1.0, 1.0, -1.0])
    columns = np.diag(signs) + 0.1 * rng.normal(size=(4, 4))
    columns[:, 2] = 0.0
    (q,) = ops.convert_to_numpy(linalg.orthonormal(columns[None]))
    np.testing.assert_allclose(q.T @ q, np.eye(4), atol=1e-12)
    along = np.sum(q * columns, axis=0)
    assert np.all(along[[0, 1, 3]] > 0.5)
    assert abs(along[2]) < 1e-12
