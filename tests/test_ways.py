"""Equal ways: each way to run gives the same weights and the same state."""

from __future__ import annotations

import collections
import importlib.util
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

HERE = pathlib.Path(__file__).parent
PROCESSES = {
    "tensorflow": ["eager", "graph", "fit", "fit_jit", "elsewhere", "one_device"],
    "mirrored": ["mirrored"],
    "jax": ["stateless", "fit"],
    "torch": ["fit"],
}
TOLERANCE = 2e-6


def run(process: str, chosen: str, folder: pathlib.Path, *arguments: str) -> dict:
    backend = "tensorflow" if process == "mirrored" else process
    output = folder / f"{process}_{chosen}.npz"
    ways = ",".join(PROCESSES[process])
    finished = subprocess.run(
        [sys.executable, "ways.py", ways, chosen, output, *arguments],
        check=False,
        cwd=HERE,
        env=os.environ | {"KERAS_BACKEND": backend, "CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    by_run = collections.defaultdict(dict)
    with np.load(output) as saved:
        for key in saved.files:
            way, name, what = key.split("|")
            by_run[way, name][what] = saved[key]
    return dict(by_run)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ways")


@pytest.fixture(
    scope="module", params=["few", pytest.param("others", marks=pytest.mark.slow)]
)
def chosen(request):
    return request.param


@pytest.fixture(scope="module")
def expected(chosen, folder):
    """Eagerly, one device, TensorFlow: what all others are compared with."""
    return run("tensorflow", chosen, folder)


def differences(found: dict, expected: dict) -> dict[str, float]:
    """The largest difference of each tensor, by run and tensor."""
    result = {}
    for (way, name), tensors in found.items():
        reference = expected["eager", name]
        # A backend's integers may be narrower; names and number may not differ.
        assert list(tensors) == list(reference), (way, name)
        for what, value in tensors.items():
            difference = np.max(np.abs(value - reference[what]), initial=0.0)
            result[f"{way} {name} {what}"] = float(difference)
    return result


def assert_equal_ways(found: dict, expected: dict, ways: list[str]) -> None:
    assert {way for way, _ in found} == set(ways)
    far = {k: d for k, d in differences(found, expected).items() if not d <= TOLERANCE}
    assert not far, f"{len(far)} tensors differ: {dict(list(far.items())[:5])}"


def test_the_training_moved_every_trained_weight(expected):
    of_a_way = [found for (way, _), found in expected.items() if way == "eager"]
    other, weights = of_a_way[0], of_a_way[-1]  # by two rules
    assert weights["weight/long"].shape == (4097,)
    assert weights["weight/scale"].shape == ()
    for name in ("long", "matrix", "row", "scale"):
        assert (
            np.max(np.abs(weights[f"weight/{name}"] - other[f"weight/{name}"])) > 1e-3
        )
    assert np.array_equal(weights["weight/frozen"], other["weight/frozen"])
    assert np.array_equal(weights["weight/unused"], other["weight/unused"])


def test_tensorflow_ways_are_equal(expected):
    assert_equal_ways(expected, expected, PROCESSES["tensorflow"])


def test_two_mirrored_replicas_are_equal(expected, chosen, folder):
    assert_equal_ways(run("mirrored", chosen, folder), expected, PROCESSES["mirrored"])


def test_jax_without_tensorflow_is_equal(expected, chosen, folder):
    found = run("jax", chosen, folder, "--without-tensorflow")
    assert_equal_ways(found, expected, PROCESSES["jax"])


@pytest.mark.torch
@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch isn't installed"
)
def test_torch_without_tensorflow_is_equal(expected, chosen, folder):
    found = run("torch", chosen, folder, "--without-tensorflow")
    assert_equal_ways(found, expected, PROCESSES["torch"])
