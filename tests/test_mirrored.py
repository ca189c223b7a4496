"""`fit` on two mirrored replicas equals `fit` on one device."""

from __future__ import annotations

import json
import math
import os
import pathlib
import subprocess
import sys

import keras
import pytest
from cases import STAGES

pytestmark = pytest.mark.versions

HERE = pathlib.Path(__file__).parent
TOLERANCE = 2e-6
SHARED = [
    "plain",
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "accumulation",
    "accumulation_and_clipping",
    "ema_overwrite",
    "repeated_ids",
    "infinite_in_keras_wrapper",
    "steps_per_execution",
]
# Of those Keras 3.15.1 fails all but the first; what later versions fix.
DEFECTS = SHARED[1:]
FIXED_IN = {"ema_overwrite": (3, 16)}
OURS = [
    "infinite_in_our_wrapper",
    "everything_in_our_wrapper_and_a_loop",
    "our_wrapper_around_keras",
    "lazy_rows",
    "lazy_rows_as_on_a_tpu",
    "bfloat16_replicas_stay_equal",
    "numbers_of_the_model",
    "groups",
    "divided_matrices",
    "divided_matrices_as_on_a_tpu",
    "weights_for_evaluation",
    "other_reductions",
    "training_loop_without_build",
    "optimizers_by_a_flag",
    "programs_per_replica",
    "what_each_replica_sends_in_fit",
    "mixed_strategies",
]
OURS += [f"stage_{name}" for name in STAGES]
FEW = [
    "plain",
    "accumulation_and_clipping",
    "ema_overwrite",
    "repeated_ids",
    "infinite_in_our_wrapper",
    "numbers_of_the_model",
    "training_loop_without_build",
    "programs_per_replica",
    "what_each_replica_sends_in_fit",
    "mixed_strategies",
    "stage_lookahead",
]
# Not compared with one device, but looked at by other tests.
LOOKED_AT = [
    "a_gradient_from_outside",
    "compressed_gradients",
    "measured_gradients",
    "what_each_replica_sends",
    "infinite_sum",
]


def keras_version() -> tuple[int, int]:
    major, minor = keras.__version__.split(".")[:2]
    return int(major), int(minor)


def run(package: str, output: pathlib.Path, *scenarios: str) -> dict:
    finished = subprocess.run(
        [sys.executable, "mirrored.py", package, output, *scenarios],
        check=False,
        cwd=HERE,
        env=os.environ | {"KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    output = tmp_path_factory.mktemp("mirrored") / "ours.json"
    return run("tf_effopt", output, *FEW, *LOOKED_AT)


@pytest.fixture(scope="module")
def others_of_ours(tmp_path_factory):
    others = set(SHARED + OURS) - set(FEW)
    output = tmp_path_factory.mktemp("mirrored") / "others.json"
    return run("tf_effopt", output, *others)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return run("keras.optimizers", tmp_path_factory.mktemp("mirrored") / "keras.json")


def holds(result: dict) -> bool:
    return "error" not in result and (
        result["difference"] <= TOLERANCE and result["replicas"] == 0.0
    )


@pytest.mark.representatives(*FEW)
@pytest.mark.parametrize("scenario", SHARED + OURS)
def test_equals_one_device(request, scenario):
    found = request.getfixturevalue("ours" if scenario in FEW else "others_of_ours")
    assert holds(found[scenario]), found[scenario]


@pytest.mark.parametrize("scenario", SHARED)
def test_the_checks_find_the_defects_of_keras(theirs, scenario):
    """What Keras fails, version by version: the checks would see it in ours, too."""
    is_correct = scenario not in DEFECTS or keras_version() >= FIXED_IN.get(
        scenario, (math.inf,)
    )
    assert holds(theirs[scenario]) == is_correct, theirs[scenario]


def test_infinite_gradient_halves_our_scale(ours):
    result = ours["infinite_in_our_wrapper"]
    assert result["scale"] == 8.0 / 4  # one bad step in each of two epochs
    assert result["iterations"] == 2 * 64 // 16 - 2
    assert result["skipped"] == 2


@pytest.mark.slow
def test_matrices_are_divided_among_replicas(others_of_ours):
    result = others_of_ours["divided_matrices"]
    assert sorted(result["of_two"]) == [[1, 8, 16], [2, 16, 16]]
    assert sorted(result["of_one"]) == [[1, 8, 16], [3, 16, 16]]


def test_a_gradient_from_outside_counts_for_each_replica(ours):
    assert ours["a_gradient_from_outside"]["weights"] == [-4.0, -8.0, -12.0]


def test_gradients_are_sent_in_16_bits(ours):
    result = ours["compressed_gradients"]
    # 1.003 is 1 in bfloat16, a third is 0.333984375.
    assert result["dense"] == [2.0, 2.0, 0.66796875]
    assert result["table"] == [[0, 0], [2.0, 4.0], [0, 0], [6.0, 8.0]]


@pytest.mark.parametrize("way", ["eager", "graph"])
def test_each_replica_feeds_its_own_error_back(ours, way):
    # 0.4 and 1.3 become 0 and 1; then 0.8 and 1.6 become 1 and 2.
    result = ours["what_each_replica_sends"][way]
    assert result["weights"] == [-4.0, -4.0]
    assert result["errors"] == pytest.approx([-0.2, -0.4], abs=1e-6)
    assert result["saved"] == pytest.approx(-0.6, abs=1e-6)
    assert result["skipped"] == 0
    bad = ours["what_each_replica_sends"][f"{way}, not finite"]
    assert bad["weights"] == bad["errors"] == [0.0, 0.0]
    assert bad["skipped"] == 2


def test_a_checkpoint_divides_the_error_among_replicas(ours):
    result = ours["what_each_replica_sends"]
    assert result["restored on two"] == pytest.approx([-0.3, -0.3], abs=1e-6)
    assert result["restored on one"] == pytest.approx([-0.6], abs=1e-6)


def test_one_compiled_program_per_replica(ours):
    result = ours["programs_per_replica"]
    assert result["programs"] == result["devices"] == 2
    assert result["traces"] == [1, 1]
    assert result["compiled"] == [True, True]


def test_the_cpu_measures_the_gradient_once_for_all_replicas(ours):
    """The matrix, and the vectors together."""
    result = ours["measured_gradients"]
    assert set(result["once"].values()) == {2}, result
    assert set(result["by each"].values()) == {0}, result


def test_an_infinite_sum_of_finite_gradients_is_skipped(ours):
    assert ours["infinite_sum"] == {"changed": [], "skipped": 1}


def test_mixing_strategies_says_what_to_do(ours):
    errors = ours["mixed_strategies"]["errors"]
    assert len(errors) == 3
    assert "strategy.scope()" in errors[0]
    assert all("strategy.run" in error for error in errors[1:])


ODD_REPLICAS = """
import json, keras, numpy as np, tensorflow as tf
from tf_effopt import SGD

replicas = {replicas}
cpu = tf.config.list_physical_devices("CPU")[0]
parts = [tf.config.LogicalDeviceConfiguration()] * replicas
tf.config.set_logical_device_configuration(cpu, parts)
found = {{}}
for name, reduction in (
    ("default", None),
    ("hierarchical", tf.distribute.HierarchicalCopyAllReduce()),
    ("one device", tf.distribute.ReductionToOneDevice()),
):
    strategy = tf.distribute.MirroredStrategy(cross_device_ops=reduction)
    with strategy.scope():
        w = keras.Variable(0.0)
        optimizer = SGD(1.0)
        optimizer.build([w])

    @tf.function
    def step(gradients):
        def of_replica():
            own = tf.distribute.get_replica_context().replica_id_in_sync_group
            optimizer.apply([gradients[own]], [w])
        strategy.run(of_replica)

    powers = 2.0 ** np.arange(replicas)
    step(tf.constant(powers, "float32"))
    last_is_bad = np.where(np.arange(replicas) < replicas - 1, 1.0, np.nan)
    step(tf.constant(last_is_bad, "float32"))
    found[name] = [float(w.numpy()), int(optimizer.skipped_steps)]
print(json.dumps(found))
"""


@pytest.mark.representatives("3")
@pytest.mark.parametrize("replicas", [3, 5])
def test_an_odd_number_of_replicas_counts_the_last_one(replicas):
    """TensorFlow's hierarchical copy leaves it out."""
    finished = subprocess.run(
        [sys.executable, "-c", ODD_REPLICAS.format(replicas=replicas)],
        check=False,
        env=os.environ | {"KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    found = json.loads(finished.stdout.splitlines()[-1])
    expected = [-(2.0**replicas - 1), 1]
    assert found == dict.fromkeys(["default", "hierarchical", "one device"], expected)
