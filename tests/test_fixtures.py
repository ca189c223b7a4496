"""Files that version 0.1.0 wrote load in each form, and go on as they did there.

`fixtures/make_files.py` tells what is in them. Where 0.1.0 got to is compared to a few
units in the last place of float32, not bit for bit as `make_files.py` does: XLA and
oneDNN add up in another order on a CPU with AVX-512 than on one with AVX2, and each
TensorFlow has its kernels. What a file holds is compared bit for bit.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
from fixtures import loading
from fixtures.scenarios import BY_NAME, ON_JAX, SCENARIOS, Scenario

FOLDER = pathlib.Path(__file__).parent / "fixtures" / "v0_1_0"
RELATIVE, ABSOLUTE = 2e-6, 5e-7

every_scenario = pytest.mark.parametrize(
    "scenario", SCENARIOS, ids=lambda scenario: scenario.name
)
# Muon says, as it should, by which names it goes.
pytestmark = pytest.mark.filterwarnings("ignore:muon goes by")

# Of those whose optimizers differ in what they save, one each.
REPRESENTATIVES = (
    "accumulation",
    "groups_overlap",
    "groups_regex",
    "groups_objects",
    "loss_scale",
    "muon_roles",
    "skip_spikes",
)


@pytest.fixture(scope="module")
def expected():
    """Scenario -> "weights", "state" and "losses" -> where 0.1.0 got to."""
    found: dict[str, dict[str, np.ndarray]] = {}
    with np.load(FOLDER / "expected.npz") as file:
        for key, values in file.items():
            name, kind = key.split("/")
            found.setdefault(name, {})[kind] = values
    return found


def assert_reached(
    scenario: Scenario,
    model: keras.Model,
    reached: dict[str, np.ndarray],
    expected: dict[str, np.ndarray],
) -> None:
    np.testing.assert_allclose(reached["losses"], expected["losses"], rtol=RELATIVE)
    weights = loading.split(reached["weights"], model.weights)
    state = loading.split(reached["state"], model.optimizer.variables)
    old_weights = loading.split(expected["weights"], model.weights)
    old_state = loading.split(expected["state"], model.optimizer.variables)
    if scenario.name == "compensated":
        # A narrow weight may be rounded the other way, which its compensation holds.
        for values, rest in ((weights, state), (old_weights, old_state)):
            lost = [x for name, x in rest.items() if "compensation" in name]
            for name, compensation in zip(list(values), lost, strict=True):
                values[name] = values[name] + compensation
        state, old_state = (
            {name: x for name, x in rest.items() if "compensation" not in name}
            for rest in (state, old_state)
        )
    for found, old in ((weights, old_weights), (state, old_state)):
        for name, values in found.items():
            # Of a sum the largest terms' rounding stays in its smallest results.
            size = np.abs(old[name]).max(initial=0.0)
            np.testing.assert_allclose(
                values,
                old[name],
                rtol=RELATIVE,
                atol=ABSOLUTE * size,
                err_msg=f"{scenario.name}: {name}",
            )


@pytest.mark.representatives(
    "accumulation",
    "adafactor",
    "averages",
    "carry_over",
    "groups_overlap",
    "groups_regex",
    "loss_scale",
    "muon_roles",
    "schedule",
    "skipped_steps",
)
@every_scenario
def test_files_continue_as_they_did(scenario, expected):
    """A whole model; then, into the same one, its weights and a checkpoint."""
    stem = FOLDER / scenario.name
    model = loading.load_model(scenario, stem)
    saved = built_values(model)
    reached = loading.train_on(scenario, model)
    assert_reached(scenario, model, reached, expected[scenario.name])

    model.load_weights(loading.weights_file(scenario, stem))
    assert_identical(model, saved)
    status = loading.checkpoint_of(model).read(f"{stem}.ckpt")
    status.assert_consumed().assert_existing_objects_matched()
    assert_identical(model, saved)
    again = loading.train_on(scenario, model)
    for kind, values in again.items():
        np.testing.assert_array_equal(values, reached[kind], kind)


def built_values(model: keras.Model) -> dict[str, np.ndarray]:
    """Weights and state, once what waits for `build` is in place, too."""
    loading.build(model)
    return loading.values_of(model)


def assert_identical(model: keras.Model, saved: dict[str, np.ndarray]) -> None:
    for kind, values in built_values(model).items():
        np.testing.assert_array_equal(values, saved[kind], kind)


@every_scenario
def test_each_form_gives_a_new_model_the_same_values(scenario):
    stem = FOLDER / scenario.name
    saved = built_values(loading.load_model(scenario, stem))
    for form in loading.forms_of("tensorflow"):
        model = loading.FORMS[form](scenario, stem)
        assert_identical(model, saved)


@pytest.mark.representatives("groups_overlap", "muon_roles")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            s.name, marks=[] if s.name in REPRESENTATIVES else pytest.mark.slow
        )
        for s in SCENARIOS
    ],
)
def test_a_new_model_continues_as_it_did(name, expected):
    """The settings, too, are what they were: here they come from today's code."""
    scenario, stem = BY_NAME[name], FOLDER / name
    model = loading.weights_before_build(scenario, stem)
    reached = loading.train_on(scenario, model)
    assert_reached(scenario, model, reached, expected[name])


@pytest.mark.representatives("groups_regex", "loss_scale")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            s.name, marks=[] if s.name in REPRESENTATIVES else pytest.mark.slow
        )
        for s in SCENARIOS
    ],
)
def test_what_is_loaded_and_saved_again_continues_as_it_did(name, expected, tmp_path):
    scenario = BY_NAME[name]
    model = loading.load_model(scenario, FOLDER / name)
    saved = built_values(model)
    model.save(tmp_path / f"{name}.keras")
    again = loading.load_model(scenario, tmp_path / name)
    assert_identical(again, saved)
    reached = loading.train_on(scenario, again)
    assert_reached(scenario, again, reached, expected[name])


# ------------------------------------------------------------- Keras's JAX backend


@pytest.mark.representatives("muon", "schedule")
@pytest.mark.parametrize("name", ON_JAX)
def test_a_file_of_jax_continues_on_tensorflow(name, expected):
    scenario = BY_NAME[name]
    model = loading.load_model(scenario, FOLDER / f"jax_{name}")
    model.compile(model.optimizer, loss="mse", jit_compile=False)
    reached = loading.train_on(scenario, model)
    assert_reached(scenario, model, reached, expected[f"jax_{name}"])


@pytest.mark.slow
def test_files_of_jax_continue_on_jax(expected, tmp_path):
    pytest.importorskip("jax")
    path = tmp_path / "reached.npz"
    subprocess.run(
        [sys.executable, __file__, str(path)],
        env=os.environ | {"KERAS_BACKEND": "jax"},
        check=True,
    )
    with np.load(path) as file:
        for key, values in file.items():
            _, name, kind = key.split("/")
            old = expected[f"jax_{name}"][kind]
            atol = ABSOLUTE * np.abs(old).max(initial=0.0)
            np.testing.assert_allclose(
                values, old, rtol=RELATIVE, atol=atol, err_msg=key
            )


def continue_on_jax(path: pathlib.Path) -> None:
    """What the test above runs: a whole model, and its weights."""
    reached = {}
    for name in ON_JAX:
        for form in loading.forms_of("jax"):
            keras.utils.clear_session()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = loading.FORMS[form](BY_NAME[name], FOLDER / f"jax_{name}")
                found = loading.train_on(BY_NAME[name], model)
            for kind, values in found.items():
                reached[f"{form}/{name}/{kind}"] = values
    np.savez(path, **reached)


# ---------------------------------------------------------------- what there is


def test_the_files_are_those_of_the_scenarios():
    found = {path.name.partition(".")[0] for path in FOLDER.iterdir()}
    names = {s.name for s in SCENARIOS} | {f"jax_{name}" for name in ON_JAX}
    assert found == names | {"expected"}


def test_files_have_no_mark_of_a_later_format():
    """They are 0.1.0's: what they don't say has the meaning that it had there."""
    for scenario in SCENARIOS:
        config = loading.config_of_optimizer(FOLDER / scenario.name)["config"]
        assert "format" not in json.dumps(config), scenario.name


if __name__ == "__main__":
    continue_on_jax(pathlib.Path(sys.argv[1]))
