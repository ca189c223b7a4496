"""What one of Keras's backends saved trains on under another; PyTorch's compiler."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("across_backends.py")

COMPILED_STEP = """
import logging
import keras, numpy as np, torch
import tf_effopt

seen = []
handler = logging.Handler()
handler.emit = lambda record: seen.append(record.getMessage())
torch._dynamo.config.recompile_limit = 4
logging.getLogger("torch._dynamo").addHandler(handler)
x = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")
model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)])
model.compile(tf_effopt.Adam(1e-3), "mse", jit_compile=True)
for _ in range(8):
    model.train_on_batch(x, x[:, :1])
assert int(model.optimizer.iterations) == 8
assert not [m for m in seen if "recompile_limit" in m], seen
"""


def run(backend, *arguments):
    finished = subprocess.run(
        [sys.executable, *map(str, arguments)],
        check=False,
        env=os.environ | {"KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def needs(backend):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} isn't installed")


with_torch = pytest.mark.torch


@pytest.mark.representatives("tensorflow-torch")
@pytest.mark.parametrize(
    "saves, goes_on",
    [
        pytest.param("jax", "torch", marks=with_torch),
        pytest.param("torch", "jax", marks=with_torch),
        pytest.param("tensorflow", "torch", marks=with_torch),
        pytest.param("jax", "tensorflow", marks=pytest.mark.slow),
    ],
)
def test_a_file_of_another_backend_trains_on(saves, goes_on, tmp_path):
    needs(saves), needs(goes_on)
    run(saves, SCRIPT, "save", tmp_path)
    assert "same" in run(goes_on, SCRIPT, "go_on", tmp_path)


@with_torch
def test_torch_compiles_a_step_once():
    needs("torch")
    run("torch", "-c", COMPILED_STEP)


@pytest.mark.parametrize("backend", ["jax", pytest.param("torch", marks=with_torch)])
def test_odd_gradients(backend):
    needs(backend)
    run(backend, SCRIPT.with_name("odd_gradients.py"))
