"""The list of Keras's tests that ours don't pass: it is short, and true.

`python tests/keras_suite` runs Keras's tests; here are its parts, and the behaviour
that Keras's tests can't see because they call private methods.
"""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import cases
import keras
import numpy as np
import pytest

import tf_effopt

ROOT = Path(__file__).parents[1]
SUITE = ROOT / "tests" / "keras_suite"
sys.path.insert(0, str(SUITE))
comparison = importlib.import_module("comparison")
substitution = importlib.import_module("substitution")

LISTED = comparison.differences()


# ------------------------------------------------------------ the list


def test_the_list_is_short():
    assert 0 < len(LISTED) <= comparison.AT_MOST
    assert len({entry.test for entry in LISTED}) == len(LISTED)


@pytest.mark.skipif("dev" in keras.__version__, reason="Keras's nightly has no tests")
@pytest.mark.parametrize("entry", LISTED, ids=lambda entry: entry.test)
def test_each_difference_is_a_test_of_keras_and_has_one_of_ours(entry):
    file, cls, function = entry.test.split("::")
    theirs = Path(keras.__file__).parent / "src" / file
    tree = ast.parse(theirs.read_text())
    methods = [
        method.name
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == cls
        for method in node.body
        if isinstance(method, ast.FunctionDef)
    ]
    assert function.removesuffix("_*").removesuffix("*") in methods
    assert entry.reason.endswith(".")
    file, _, function = entry.ours.partition("::")
    assert f"\ndef {function}(" in (ROOT / file).read_text()
    assert set(entry.backends) <= set(comparison.BACKENDS)


def test_the_docs_show_the_list():
    page = (ROOT / "docs" / "keras_tests.md").read_text()
    assert page == comparison.as_markdown(LISTED), (
        "Run `python tests/keras_suite --write-docs`."
    )


# ------------------------------------------------------------ the comparison


def entry(test: str, *backends: str):
    return comparison.Difference(test, "A reason.", "t", backends or ("tensorflow",))


def test_what_is_not_listed_and_what_is_listed_in_vain():
    listed = [entry("a::T::known*"), entry("a::T::passes"), entry("a::T::jax", "jax")]
    listed += [entry("b::T::not_run")]
    verdict = comparison.compare(
        "tensorflow",
        failed=["a::T::known_1", "a::T::new", "a::T::theirs"],
        failed_with_keras=["a::T::theirs"],
        ran=["a::T::known_1", "a::T::known_2", "a::T::new", "a::T::passes"],
        listed=listed,
    )
    assert verdict.unexpected == ["a::T::new"]
    assert verdict.no_longer == ["a::T::passes"]
    assert verdict.keras_fails == ["a::T::theirs"]
    assert not verdict.is_good


def test_a_listed_test_that_fails_with_keras_is_listed_in_vain():
    verdict = comparison.compare(
        "tensorflow", ["a::T::x"], ["a::T::x"], ["a::T::x"], [entry("a::T::x")]
    )
    assert verdict.no_longer == ["a::T::x"]


def test_every_shared_class_is_ours_wherever_keras_has_it():
    """In another process, since it changes Keras."""
    program = (
        "import substitution, keras, tf_effopt\n"
        "before = keras.optimizers.Adagrad\n"
        "substitution.substitute()\n"
        "from keras.src.optimizers.adam import Adam\n"
        "from keras.src.optimizers.lamb import Lamb\n"
        "from keras.src.trainers import trainer\n"
        "assert Adam is keras.optimizers.Adam is tf_effopt.Adam\n"
        "assert Lamb is tf_effopt.Lamb\n"
        "assert trainer.LossScaleOptimizer is tf_effopt.LossScaleOptimizer\n"
        "assert type(keras.optimizers.get('adamw')) is tf_effopt.AdamW\n"
        "assert keras.optimizers.Adagrad is before\n"
        "assert issubclass(tf_effopt.Adam, keras.optimizers.Optimizer)\n"
        "print(sorted(substitution.shared_names()))\n"
    )
    path = f"{SUITE}:{ROOT}"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**substitution.os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    names = ast.literal_eval(done.stdout.splitlines()[-1])
    assert {"Adam", "Lamb", "LossScaleOptimizer", "SGD"} <= set(names)
    assert "Optimizer" not in names


@pytest.mark.slow
@pytest.mark.parametrize("part", ["optimizers", "distribution"])
def test_keras_tests_pass_but_for_the_list(part):
    command = [sys.executable, str(SUITE), "--backend", "tensorflow", "--part", part]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


# ------------------------------------- what Keras's tests ask of private methods


def step(optimizer, weight, gradient, steps: int = 1) -> np.ndarray:
    variable = keras.Variable(np.array(weight, "float32"))
    for _ in range(steps):
        optimizer.apply([keras.ops.convert_to_tensor(gradient, "float32")], [variable])
    return keras.ops.convert_to_numpy(variable)


@pytest.mark.filterwarnings("ignore:Muon")
def test_a_step_of_muon_by_apply():
    muon = tf_effopt.Muon(0.5, weight_decay=0.0)
    weight = step(muon, [[1.0, 2.0], [3.0, 4.0]], [[1.0, 6.0], [7.0, 2.0]])
    # What Keras's test expects of `update_step`, from its first three digits.
    expected = [[0.988775, 1.887053], [2.873428, 3.97035]]
    np.testing.assert_allclose(weight, expected, atol=1e-2)


def test_a_step_of_muons_adamw_by_apply():
    settings = {"adam_lr_ratio": 1.0, "adam_weight_decay": 0.0}
    muon = tf_effopt.Muon(0.5, **settings)
    weight = step(muon, [1.0, 2.0, 3.0, 4.0], [1.0, 6.0, 7.0, 2.0])
    np.testing.assert_allclose(weight, [0.5, 1.5, 2.5, 3.5], rtol=1e-4)


def test_the_decay_of_muons_adamw():
    muon = tf_effopt.Muon(1.0, adam_weight_decay=0.01, adam_lr_ratio=1.0)
    weight = step(muon, 2.0, 0.0)
    np.testing.assert_allclose(weight, 2.0 - 2.0 * 0.01, rtol=1e-6)


def test_lamb_decays_inside_the_trust_ratio():
    """Without a gradient the step is the decay, scaled to the weight's norm."""
    lamb = tf_effopt.Lamb(learning_rate=0.1, weight_decay=0.004)
    np.testing.assert_allclose(step(lamb, [2.0, 1.0], [0.0, 0.0]), [1.8, 0.9], 1e-6)


def test_adafactor_keeps_the_rate_without_relative_step():
    """Keras's own test, by the paper's algorithm in float64."""
    settings = {"epsilon_1": 1e-15, "epsilon_2": 1e-4, "clip_threshold": 0.9}
    settings |= {"beta_2_decay": -0.65, "relative_step": False}
    adafactor = tf_effopt.Adafactor(0.5, **settings)
    x, v = np.ones(10), np.zeros(10)
    variable = keras.Variable(x.astype("float32"))
    for t, g in enumerate([np.full(10, 0.01)] + 5 * [np.arange(0.1, 1.1, 0.1)], 1):
        beta = 1 - t**-0.65
        v = beta * v + (1 - beta) * (g**2 + 1e-15)
        u = g / np.sqrt(v)
        u /= max(1.0, np.sqrt(np.mean(u**2)) / 0.9)
        x = x - 0.5 * max(1e-4, np.sqrt(np.mean(x**2))) * u
        adafactor.apply([keras.ops.convert_to_tensor(g, "float32")], [variable])
        np.testing.assert_allclose(variable.numpy(), x, rtol=1e-5)


def test_the_product_of_nadams_momenta_has_kerass_name():
    nadam = tf_effopt.Nadam()
    nadam.build([keras.Variable([1.0])])
    (product,) = [v for v in nadam.variables if v.name == "u_product"]
    assert float(product.numpy()) == 1.0


def test_a_saved_model_names_our_module(tmp_path):
    model = cases.compiled_model(tf_effopt.Adam(0.01))
    model.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        config = json.loads(archive.read("config.json"))
    saved = config["compile_config"]["optimizer"]
    assert saved["registered_name"] == "tf_effopt>Adam"
    assert saved["module"].split(".")[0] == "tf_effopt"
