"""A SavedModel that trains on, in a process that knows nothing of this package."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from typing import Any

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import X, Y

import tf_effopt

LOADED = """
import sys
import numpy as np
import tensorflow as tf
folder = sys.argv[1]
loaded = tf.saved_model.load(folder)
x, y = (tf.constant(np.load(f"{folder}/assets/{name}.npy")) for name in "xy")
for _ in range(3):
    loaded.signatures["train"](x=x, y=y)
np.save(f"{folder}/after.npy", loaded.signatures["infer"](x=x)["y"].numpy())
assert "tf_effopt" not in sys.modules
"""


class Trained(tf.Module):
    """A model, its optimizer, and a function that trains."""

    def __init__(self, model: keras.Model, optimizer: Any):
        super().__init__()
        self.model, self.optimizer = model, optimizer

    @tf.function(
        input_signature=[tf.TensorSpec((None, 4)), tf.TensorSpec((None, 2))],
        autograph=False,
    )
    def train(self, x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self.model(x) - y) ** 2)
        weights = self.model.trainable_variables
        gradients = tape.gradient(loss, weights)
        self.optimizer.apply_gradients(zip(gradients, weights, strict=True))
        return {"loss": loss}

    @tf.function(input_signature=[tf.TensorSpec((None, 4))], autograph=False)
    def infer(self, x):
        return {"y": self.model(x)}


def exported(module: Trained, folder: pathlib.Path) -> None:
    functions = {name: getattr(module, name) for name in ("train", "infer")}
    signatures = {k: f.get_concrete_function() for k, f in functions.items()}
    tf.saved_model.save(module, str(folder), signatures=signatures)


MAKE = {
    "sgd": lambda: tf_effopt.SGD(0.1, momentum=0.9),
    "everything": lambda: tf_effopt.AdamW(
        0.01,
        clipnorm=0.5,
        use_ema=True,
        ema_overwrite_frequency=2,
        gradient_accumulation_steps=2,
        transforms=[tf_effopt.transforms.ZClip()],
        groups=[tf_effopt.Group("first", learning_rate_multiplier=0.5)],
    ),
    "prodigy": lambda: tf_effopt.Prodigy(),
    "loss_scale": lambda: tf_effopt.LossScaleOptimizer(tf_effopt.Adam(0.01)),
}
OPTIONS = [
    pytest.param(x, marks=() if x == "everything" else pytest.mark.slow) for x in MAKE
]


@pytest.mark.parametrize("name", OPTIONS)
def test_an_exported_function_trains_on_in_another_process(name, tmp_path):
    module = Trained(cases.small_model(), MAKE[name]())
    module.train(X, Y)
    exported(module, tmp_path)
    np.save(tmp_path / "assets" / "x.npy", X)
    np.save(tmp_path / "assets" / "y.npy", Y)
    finished = subprocess.run(
        [sys.executable, "-c", LOADED, str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    for _ in range(3):
        module.train(X, Y)
    found = np.load(tmp_path / "after.npy")
    np.testing.assert_allclose(found, module.infer(X)["y"], rtol=1e-5, atol=1e-6)


def test_an_exported_function_of_a_compiled_model_trains(tmp_path):
    """Momentum by NumPy, in float64; the optimizer is below the model."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, use_bias=False)])
    model.compile(tf_effopt.SGD(0.1, momentum=0.9), "mse")
    kernel = model.get_weights()[0].astype("float64")
    exported(Trained(model, model.optimizer), tmp_path)
    loaded = tf.saved_model.load(str(tmp_path))
    velocity = np.zeros_like(kernel)
    for _ in range(4):
        loaded.signatures["train"](x=tf.constant(X), y=tf.constant(Y))
        gradient = 2 * X.T @ (X @ kernel - Y) / Y.size
        velocity = 0.9 * velocity - 0.1 * gradient
        kernel = kernel + velocity
    found = loaded.signatures["infer"](x=tf.constant(X))["y"]
    np.testing.assert_allclose(found, X @ kernel, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_has_no_more_than_before(tmp_path):
    """What a SavedModel has besides is no part of it."""
    optimizer, weight = tf_effopt.Adam(0.1), keras.Variable([1.0])
    optimizer.apply([np.ones(1, "float32")], [weight])
    path = tf.train.Checkpoint(optimizer=optimizer).write(str(tmp_path / "state"))
    names = [name for name, _ in tf.train.list_variables(path)]
    assert not [name for name in names if "_engine" in name]
    other = keras.optimizers.Adam(0.1)
    other.build([weight])
    tf.train.Checkpoint(optimizer=other).read(path).assert_consumed()


def test_all_that_the_engine_keeps_is_exported():
    optimizer = tf_effopt.Adam(0.1)
    optimizer.build([keras.Variable([1.0])])
    kept = optimizer._engine.untracked_variables()
    children = optimizer._trackable_children("savedmodel")
    assert {"_pairs", "_skipped"} <= set(kept)
    assert all(any(x is child for child in children.values()) for x in kept.values())


def test_a_trained_model_is_exported_for_inference(tmp_path):
    model = cases.train(cases.compiled_model(tf_effopt.Adam(0.01)), 1)
    model.export(tmp_path / "model", verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "model"))
    np.testing.assert_allclose(loaded.serve(X), model(X), rtol=1e-5, atol=1e-6)
