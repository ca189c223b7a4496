"""Imports, trains, saves and loads in an environment without TensorFlow.

    KERAS_BACKEND=jax python tests/without_tensorflow.py

And says what is missing where no backend is installed.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile

import keras
import numpy as np

import tf_effopt


def main() -> None:
    if importlib.util.find_spec("tensorflow") is not None:
        raise SystemExit("TensorFlow is installed here: this shows nothing.")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 4)).astype("float32")
    y = x @ rng.normal(size=(4, 1)).astype("float32")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=tf_effopt.AdamW(0.1, global_clipnorm=1.0), loss="mse")
    first, last = model.fit(x, y, epochs=30, verbose=0).history["loss"][::29]
    if not last < 0.1 * first:
        raise SystemExit(f"The loss went from {first} to {last} only.")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.keras")
        model.save(path)
        loaded = keras.models.load_model(path)
    for a, b in zip(model.optimizer.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_array_equal(np.asarray(a.value), np.asarray(b.value))
    # Keras's default backend is TensorFlow, which isn't here.
    finished = subprocess.run(
        [sys.executable, "-c", "import tf_effopt"],
        check=False,
        env=os.environ | {"KERAS_BACKEND": "tensorflow"},
        capture_output=True,
        text=True,
    )
    if finished.returncode == 0 or "tf_effopt[cpu]" not in finished.stderr:
        raise SystemExit(f"No word of the extras in:\n{finished.stderr}")
    print(f"trained, saved and loaded on {keras.backend.backend()}; loss {last:.2e}")


if __name__ == "__main__":
    main()
