"""Loads saved models in a process that knows nothing of them, and trains on.

    python tests/resumed.py FOLDER

reads each `FOLDER/*.keras` and the batch in `FOLDER/batch.npz`, and writes what
weights and state are after three more steps to `FOLDER/*.npz`.
"""

from __future__ import annotations

import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import tf_effopt  # noqa: F401 - which is how Keras finds its classes

STEPS = 3


def train(model: keras.Model, x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    """Weights and the optimizer's state after so many steps."""
    for _ in range(STEPS):
        model.train_on_batch(x, y)
    return [
        keras.ops.convert_to_numpy(v).copy()
        for v in model.weights + model.optimizer.variables
    ]


def main(folder: pathlib.Path) -> None:
    with np.load(folder / "batch.npz") as batch:
        x, y = batch["x"], batch["y"]
    for path in sorted(folder.glob("*.keras")):
        values = train(keras.models.load_model(path), x, y)
        np.savez(path.with_suffix(".npz"), *values)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
