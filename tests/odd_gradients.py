"""What a step does with odd gradients on Keras's JAX or PyTorch backend.

    KERAS_BACKEND=jax python tests/odd_gradients.py

`test_across_backends.py` runs it; it fails where something is wrong.
"""

from __future__ import annotations

import keras
import numpy as np

from tf_effopt import Adam, LossScaleOptimizer

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


def main() -> None:
    for make in (lambda: Adam(0.1), lambda: LossScaleOptimizer(Adam(0.1))):
        nothing_to_do(make)
        nothing_to_train(make)


if __name__ == "__main__":
    main()
