"""The recipe of the article's linear regression, in a short run."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

FILE = Path(__file__).parents[1] / "recipes" / "linear_regression.py"


def load():
    spec = importlib.util.spec_from_file_location("linear_regression", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


recipe = load()


@pytest.fixture(autouse=True)
def _floatx():
    before = keras.config.floatx()
    yield
    recipe.use_dtype(before)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("linear_regression")
    patch = pytest.MonkeyPatch()
    patch.setattr(recipe, "SWEEP", [0.01, 0.1, 0.3, 3.0])
    metrics = recipe.main(["--steps", "120", "--output-dir", str(folder)])
    patch.undo()
    return folder, metrics


def path_of(metrics: dict, name: str) -> np.ndarray:
    return np.array(metrics["rules"][name]["theta"])


def test_every_rule_follows_its_formula(output):
    _, metrics = output
    differences = {n: r["difference"] for n, r in metrics["rules"].items()}
    assert len(differences) == 7
    assert max(differences.values()) <= 2e-6, differences


def test_float64_follows_to_rounding():
    config = recipe.parse(["--steps", "30", "--dtype", "float64"])
    recipe.use_dtype("float64")
    problem = recipe.Problem.make(config, config.condition)
    shipped, literal = recipe.entries(config)
    for entry in shipped + literal:
        result = recipe.compare(recipe.Trainer(entry, problem, config), 30)
        assert result["difference"] <= 1e-12, entry.name


def test_a_wrong_rule_ends_in_an_error(tmp_path, monkeypatch, capsys):
    def wrong(θ, g, s, t, η):
        return θ - 1.001 * η * g

    monkeypatch.setattr(recipe, "numpy_rmsprop", wrong)
    with pytest.raises(SystemExit, match="more than 2e-06: RMSprop") as error:
        recipe.main(["--steps", "3", "--output-dir", str(tmp_path)])
    assert error.value.code != 0
    assert "RMSprop" in capsys.readouterr().out  # the table came first


def test_shipped_rules_descend(output):
    _, metrics = output
    for name, result in metrics["rules"].items():
        if not name.startswith("literal"):
            assert result["losses"][-1] < 0.8 * result["losses"][0], name


def test_literal_rmsprop_lowers_every_weight_and_climbs(output):
    _, metrics = output
    assert (np.diff(path_of(metrics, "literal RMSprop"), axis=0) < 0).all()
    losses = metrics["rules"]["literal RMSprop"]["losses"]
    assert losses[-1] > 1000 * losses[0]


def test_literal_adam_never_raises_a_weight(output):
    _, metrics = output
    θ = path_of(metrics, "literal adam")
    assert (np.diff(θ, axis=0) <= 0).all()
    positive = recipe.THETA > 0
    assert (np.abs(θ[-1, positive]) < 1e-3).all()  # where they must rise: stuck
    assert (θ[-1, ~positive] < -0.3).all()
    # Adam itself raises them.
    assert (path_of(metrics, "Adam")[-1, positive] > 0.3).all()


def test_the_learning_rate_decides(output):
    _, metrics = output
    final = metrics["answers"]["sweep"]["GradientDescent"]["final_losses"]
    start = metrics["rules"]["GradientDescent"]["losses"][0]
    assert final[2] < final[1] < final[0] < start < final[3]
    assert metrics["answers"]["largest_stable_rate"] == pytest.approx(1, rel=1e-5)


def test_range_test_suggests_a_rate_that_trains(output):
    _, metrics = output
    for name, result in metrics["answers"]["range_test"].items():
        start = metrics["rules"][name]["losses"][0]
        assert result["final_loss_there"] < 0.1 * start, name


def test_files(output):
    folder, _ = output
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["versions"]["keras"] == keras.__version__
    for name in ("loss.png", "questions.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG"), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stepz", "3"], "unrecognized arguments: --stepz"),
        (["--steps", "0"], "--steps must be at least 2"),
        (["--batch-size", "600"], "--batch-size: 1 to --examples"),
        (["--learning-rate", "x"], "invalid float value: 'x'"),
        (["--dtype", "int8"], "--dtype must be one of float32, float64"),
        (["--condition", "0.5"], "--condition must be at least 1"),
    ],
)
def test_wrong_options_are_usage_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        recipe.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
