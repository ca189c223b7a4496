"""A saved model goes on in a fresh process as if it had never stopped."""

from __future__ import annotations

import functools
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import resumed
from cases import BY_NAME, KINDS, TRANSFORMS, X, Y, compiled_model

import tf_effopt

HERE = pathlib.Path(__file__).parent
OPTIONS = {
    # Saved between the first and the second gradient of an update.
    "accumulation": {"gradient_accumulation_steps": 2},
    "averages": {"use_ema": True, "ema_overwrite_frequency": 2},
    "groups": {
        "groups": [
            tf_effopt.Group("kernel", learning_rate_multiplier=0.5, weight_decay=0.1),
            tf_effopt.Group("bias", frozen=True),
        ]
    },
    "schedule": {
        "learning_rate": keras.optimizers.schedules.CosineDecay(0.1, 8),
    },
}


def adam(**options) -> tf_effopt.Optimizer:
    return tf_effopt.Adam(**{"learning_rate": 0.01} | options)


OPTIMIZERS = {
    **{
        name: functools.partial(case.make, weight_decay=0.1, use_ema=True)
        for name, case in BY_NAME.items()
    },
    **{
        f"transform_{name}": lambda make=make: adam(transforms=[make()])
        for name, make in TRANSFORMS.items()
    },
    **{
        f"option_{name}": lambda options=options: adam(**options)
        for name, options in OPTIONS.items()
    },
    "loss_scale": lambda: tf_effopt.LossScaleOptimizer(adam(), initial_scale=8.0),
}


FEW = [
    *KINDS,
    "transform_zclip",
    "option_accumulation",
    "option_schedule",
    "loss_scale",
]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return values(FEW, tmp_path_factory.mktemp("few"))


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    return values(OPTIMIZERS.keys() - set(FEW), tmp_path_factory.mktemp("others"))


def values(names, folder):
    """Name -> weights and state of the uninterrupted run, and of the other one."""
    np.savez(folder / "batch.npz", x=X, y=Y)
    uninterrupted = {}
    for name in names:
        # One layer: nearly all of the time is the compiler's.
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        compiled_model(OPTIMIZERS[name](), model)
        resumed.train(model, X, Y)
        model.save(folder / f"{name}.keras")
        uninterrupted[name] = resumed.train(model, X, Y)
    finished = subprocess.run(
        [sys.executable, "resumed.py", folder],
        check=False,
        cwd=HERE,
        env=os.environ | {"KERAS_BACKEND": "tensorflow"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]

    def read(name):
        with np.load(folder / f"{name}.npz") as file:
            return [file[key] for key in file.files]

    return {name: (values, read(name)) for name, values in uninterrupted.items()}


@pytest.mark.representatives(*FEW)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_goes_on_with_the_same_bits(name, request):
    found = request.getfixturevalue("few" if name in FEW else "others")
    uninterrupted, other = found[name]
    assert len(uninterrupted) == len(other)
    for a, b in zip(uninterrupted, other, strict=True):
        np.testing.assert_array_equal(a, b)
