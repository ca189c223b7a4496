"""`lazy=True`: only the rows of an embedding that were looked up move."""

from __future__ import annotations

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import CASES, arrays

ROWS, WIDTH = 6, 3
LOOKED_UP = [[4, 1, 4], [5, 4, 5]]
DECAY = {"weight_decay": 0.05}


def gradients() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=(len(ids), WIDTH)).astype("float32") for ids in LOOKED_UP]


def table() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(ROWS, WIDTH)).astype("float32")


def lazy_run(case) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    w = keras.Variable(table())
    optimizer = case.make(lazy=True, **DECAY)
    for ids, values in zip(LOOKED_UP, gradients(), strict=True):
        slices = tf.IndexedSlices(tf.constant(values), tf.constant(ids))
        optimizer.apply([slices], [w])
    (tensors,) = optimizer._engine.state
    slots = {symbol: slot.numpy() for symbol, slot in tensors["rule"].items()}
    return w.numpy(), slots


def run_row_by_row(case) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Each row a variable: without a gradient it stays as it is.

    But for the count of updates, which is one for all rows of a table.
    """
    variables = [keras.Variable(row) for row in table()]
    optimizer = case.make(**DECAY)
    for ids, values in zip(LOOKED_UP, gradients(), strict=True):
        sums = {}
        for i, g in zip(ids, values, strict=True):
            sums[i] = sums.get(i, 0) + g
        gs = [
            keras.ops.convert_to_tensor(sums[i]) if i in sums else None
            for i in range(ROWS)
        ]
        optimizer.apply(gs, variables)
        optimizer._engine.set_missed(None)
    state = optimizer._engine.state
    slots = {
        symbol: np.stack([tensors["rule"][symbol].numpy() for tensors in state])
        for symbol in state[0]["rule"]
    }
    return np.stack(arrays(variables)), slots


@pytest.mark.representatives("sgd", "adam", "radam")
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.make.func.elementwise], ids=cases.by_name
)
def test_rows_move_as_if_each_was_a_variable(case):
    w, slots = lazy_run(case)
    expected, expected_slots = run_row_by_row(case)
    np.testing.assert_allclose(w, expected, rtol=1e-6, atol=1e-7)
    assert slots.keys() == expected_slots.keys()
    for symbol, slot in expected_slots.items():
        np.testing.assert_allclose(slots[symbol], slot, rtol=1e-6, atol=1e-7)
    untouched = [0, 2, 3]
    np.testing.assert_array_equal(w[untouched], table()[untouched])
    assert not np.allclose(w[[1, 4, 5]], table()[[1, 4, 5]])
