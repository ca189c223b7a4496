"""Saves a trained model under one of Keras's backends, or trains it on under another.

python tests/across_backends.py save FOLDER
python tests/across_backends.py go_on FOLDER

`KERAS_BACKEND` says which. `go_on` trains what is in FOLDER, and prints "same" if the
weights, the state and the number of updates are those of training without a break.
"""

from __future__ import annotations

import pathlib
import re
import sys
import warnings

import keras
import numpy as np

import tf_effopt

RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 6)).astype("float32")
Y = (X[:, :2] * 2).astype("float32")


def groups() -> list[tf_effopt.Group]:
    return [
        tf_effopt.Group("bias", weight_decay=0.0),
        tf_effopt.Group(
            re.compile("HEAD", re.IGNORECASE), learning_rate_multiplier=0.5
        ),
    ]


OPTIMIZERS = {
    "AdamW": lambda: tf_effopt.AdamW(
        keras.optimizers.schedules.CosineDecay(0.05, 24),
        use_ema=True,
        clipnorm=1.0,
        gradient_accumulation_steps=2,
        groups=groups(),
    ),
    "SGD": lambda: tf_effopt.SGD(0.05, momentum=0.9, global_clipnorm=1.0),
    "ScheduleFreeAdamW": lambda: tf_effopt.ScheduleFreeAdamW(0.02, groups=groups()),
    "Muon": lambda: tf_effopt.Muon(0.02, exclude_layers=["head"]),
    "LossScaleOptimizer": lambda: tf_effopt.LossScaleOptimizer(
        tf_effopt.Adam(0.02), initial_scale=8.0
    ),
}


def network(optimizer: keras.optimizers.Optimizer) -> keras.Model:
    keras.utils.set_random_seed(1)
    inputs = keras.Input((6,))
    x = keras.layers.Dense(5, "tanh")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    rng = np.random.default_rng(2)
    model.set_weights([rng.normal(size=w.shape) * 0.5 for w in model.get_weights()])
    model.compile(optimizer, "mse")
    return model


def fit(model: keras.Model) -> None:
    # By batches, and not by `fit`: no average takes the weights' place in between.
    for start in range(0, 24, 4):
        model.train_on_batch(X[start : start + 4], Y[start : start + 4])


def result(model: keras.Model) -> list[np.ndarray]:
    optimizer = model.optimizer
    return [keras.ops.convert_to_numpy(v) for v in model.weights + optimizer.variables]


def save(folder: pathlib.Path) -> None:
    for name, make in OPTIMIZERS.items():
        model = network(make())
        fit(model)
        model.save(folder / f"{name}.keras")


def go_on(folder: pathlib.Path) -> None:
    for name, make in OPTIMIZERS.items():
        whole = network(make())
        fit(whole)
        fit(whole)
        model = keras.models.load_model(folder / f"{name}.keras")
        fit(model)
        for mine, expected in zip(result(model), result(whole), strict=True):
            np.testing.assert_allclose(
                mine, expected, rtol=2e-4, atol=2e-5, err_msg=name
            )
        assert int(model.optimizer.iterations) == int(whole.optimizer.iterations) > 0
    print("same")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    what, folder = sys.argv[1:]
    {"save": save, "go_on": go_on}[what](pathlib.Path(folder))
