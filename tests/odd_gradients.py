"""What a step does with odd gradients on Keras's JAX or PyTorch backend.

    KERAS_BACKEND=jax python tests/odd_gradients.py

`test_across_backends.py` runs it; it fails where something is wrong.
"""

from __future__ import annotations

import keras
import numpy as np

from tf_effopt import SGD, Adam, LossScaleOptimizer

BACKEND = keras.backend.backend()


def nothing_to_do(make) -> None:
    """No gradients and no variables, then a step."""
    w, optimizer = keras.Variable([1.0]), make()
    optimizer.apply([], [])
    optimizer.build([])
    assert not optimizer.built
    scale = float(optimizer.scale_loss(1.0))
    optimizer.apply([keras.ops.convert_to_tensor([2.0 * scale])], [w])
    optimizer.apply([], [])
    np.testing.assert_allclose(keras.ops.convert_to_numpy(w), [0.9], rtol=1e-5)
    assert int(optimizer.iterations) == 1


def nothing_to_train(make) -> None:
    """A model whose layers are all frozen, in `fit`; then it is unfrozen."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    before = model.get_weights()
    model.trainable = False
    x = np.ones((8, 3), "float32")
    model.compile(make(), "mse")
    model.fit(x, x[:, :1] * 9, verbose=0)
    model.evaluate(x, x[:, :1], verbose=0)
    assert int(model.optimizer.iterations) == 0
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    model.trainable = True
    model.compile(model.optimizer, "mse")
    model.fit(x, x[:, :1] * 9, verbose=0, epochs=2)
    assert int(model.optimizer.iterations) == 2
    assert not np.array_equal(before[0], model.get_weights()[0])


TABLE = np.arange(8, dtype="float32").reshape(4, 2)
ROWS, VALUES = [2, 0, 2], np.array([[1, 2], [3, 4], [5, 6]], "float32")
RIGHT = TABLE.copy()
np.subtract.at(RIGHT, ROWS, 0.5 * VALUES)


def sparse_gradients():
    """The same rows, one of them twice, in each form that the backend has."""
    if BACKEND == "jax":
        from jax.experimental import sparse

        indices = np.array(ROWS)[:, None]
        yield sparse.BCOO((keras.ops.array(VALUES), indices), shape=(4, 2))
        yield sparse.BCSR.from_bcoo(
            sparse.BCOO.fromdense(keras.ops.array((TABLE - RIGHT) * 2))
        )
    else:
        import torch

        rows = torch.sparse_coo_tensor([ROWS], torch.tensor(VALUES), (4, 2))
        yield rows
        yield rows.to_dense().to_sparse_csr()


def rows_only(make) -> None:
    """Sparse gradients, eagerly and, on JAX, in a compiled step without state."""
    for gradient in sparse_gradients():
        w, optimizer = keras.Variable(TABLE), make()
        optimizer.apply([gradient], [w])
        np.testing.assert_allclose(keras.ops.convert_to_numpy(w), RIGHT, rtol=1e-6)
        if BACKEND != "jax":
            continue
        import jax

        w, optimizer = keras.Variable(TABLE), make()
        optimizer.build([w])
        step = jax.jit(optimizer.stateless_apply)
        state = [v.value for v in optimizer.variables]
        (after,), state = step(state, [gradient], [w.value])
        np.testing.assert_allclose(after, RIGHT, rtol=1e-6)


def main() -> None:
    rows_only(lambda: SGD(0.5))
    rows_only(lambda: LossScaleOptimizer(SGD(0.5), initial_scale=1.0))
    for make in (lambda: Adam(0.1), lambda: LossScaleOptimizer(Adam(0.1))):
        nothing_to_do(make)
        nothing_to_train(make)


if __name__ == "__main__":
    main()
