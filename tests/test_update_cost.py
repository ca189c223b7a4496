"""The benchmark of the update's cost: what it measures and writes."""

from __future__ import annotations

import collections
import importlib.util
import json
import pathlib
import shutil
import sys

import numpy as np
import pytest

pytest.importorskip("tensorflow")
pytest.importorskip("matplotlib")

ROOT = pathlib.Path(__file__).parents[1]
RECIPES = ROOT / "recipes" / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def recipes_on_path():
    # Not by monkeypatch: the workers inherit the path when they start.
    sys.path.insert(0, str(RECIPES))
    yield
    sys.path.remove(str(RECIPES))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A quick run: `(what main returned, the directory it wrote to)`."""
    import update_cost

    directory = tmp_path_factory.mktemp("results")
    argv = ["--quick", "--repeats", "2", "--output-dir", str(directory)]
    argv += ["--workload", "resnet50", "embedding"]
    argv += ["--optimizer", "sgd", "momentum", "adam", "adam_lazy"]
    return update_cost.main(argv), directory


def entries(results, competitor):
    return {
        (r["workload"], r["optimizer"]): r["competitors"][competitor]
        for r in results["results"]
    }


# ------------------------------------------------------------------- workloads


@pytest.mark.parametrize(
    "name, tensors, parameters",
    [
        ("resnet50", 214, 25_583_592),
        ("transformer", 148, 124_439_808),
        ("matrices", 72, 84_934_656),
        ("layer", 6, 7_077_888),
        ("digits", 11, 53_226),
        ("small_transformer", 76, 1_271_808),
        ("one_tensor", 1, 100_000_000),
        ("embedding", 1, 12_800_000),
        ("mirrored", 214, 25_583_592),
    ],
)
def test_workloads_have_the_shapes_that_they_name(name, tensors, parameters):
    import workloads

    workload = workloads.all_workloads()[name]
    assert len(workload.shapes) == tensors
    assert workload.parameters == parameters


def test_embedding_ids_repeat():
    import workloads

    ids = workloads.all_workloads()["embedding"].ids()
    assert len(ids) == 256
    assert len(set(ids.tolist())) == 192


@pytest.mark.parametrize(
    "name, expected",
    [
        ("digits", ["soap"]),
        ("small_transformer", ["soap"]),
        ("layer", ["soap_768"]),
        ("matrices", []),
        ("one_tensor", []),
    ],
)
def test_soap_is_measured_where_its_first_update_ends_in_time(name, expected):
    import update_cost

    workload = update_cost.all_workloads()[name]
    cases = update_cost.cases_of(workload, update_cost.all_cases())
    assert [case.name for case in cases if case.rule == "SOAP"] == expected


def test_a_sample_is_a_full_cycle_of_calls():
    import update_cost

    cases = update_cost.all_cases()
    calls = {name: cases[name].calls for name in ("adam", "adam_accumulation", "soap")}
    assert calls == {"adam": 1, "adam_accumulation": 4, "soap": 10}


# ------------------------------------------------------------------ a quick run


def test_every_case_is_measured(results):
    measured = [(r["workload"], r["optimizer"]) for r in results[0]["results"]]
    expected = [("resnet50", name) for name in ("sgd", "momentum", "adam")]
    assert measured == [*expected, ("embedding", "adam"), ("embedding", "adam_lazy")]
    for competitor in ("tf_effopt graph", "tf_effopt eager", "Keras graph"):
        for entry in entries(results[0], competitor).values():
            assert len(entry["milliseconds"]) == 2
            assert min(entry["milliseconds"]) <= entry["median"]
            assert entry["first_call_seconds"] > 0


@pytest.mark.parametrize(
    "competitor",
    ["tf_effopt graph", "tf_effopt eager", "Keras graph", "optax jit", "torch fused"],
)
def test_state_bytes_per_parameter_are_exact(results, competitor):
    expected = {"sgd": 0, "momentum": 4, "adam": 8, "adam_lazy": 8}
    for (workload, optimizer), entry in entries(results[0], competitor).items():
        if "error" not in entry:
            assert entry["state_bytes_per_parameter"] == expected[optimizer], workload


def test_all_libraries_do_the_same_update(results):
    for result in results[0]["results"]:
        after = {
            name: entry["first_weights"]
            for name, entry in result["competitors"].items()
            if "error" not in entry
        }
        for name, weights in after.items():
            np.testing.assert_allclose(
                weights, after["Keras eager"], atol=2e-6, err_msg=name
            )


def test_missing_packages_are_reported(results):
    packages = {"optax jit": ("jax", "optax"), "torch fused": ("torch",)}
    for competitor, needed in packages.items():
        if all(map(importlib.util.find_spec, needed)):
            entry = entries(results[0], competitor)["resnet50", "adam"]
            assert entry["state_bytes_per_parameter"] == 8
        else:
            reported = {e["error"] for e in entries(results[0], competitor).values()}
            assert reported == {"not installed"}


def test_array_passes_are_the_fewest_possible(results):
    passes = {
        r["optimizer"]: r["array_passes"]
        for r in results[0]["results"]
        if r["workload"] == "resnet50"
    }
    assert passes == {"sgd": 3, "momentum": 5, "adam": 7}


def test_files_hold_the_results(results):
    returned, directory = results
    assert json.loads((directory / "update_cost.json").read_text()) == returned
    assert returned["command"].startswith("python recipes/benchmarks/update_cost.py")
    assert returned["software"]["tensorflow"]["versions"]["keras"]
    assert returned["machine"]["cores"] >= 1

    text = (directory / "update_cost.md").read_text()
    assert "quick run" in text
    assert "## ResNet-50 (5 tensors" in text
    assert "Adam, lazy" in text
    verdicts = collections.Counter(goal["passed"] for goal in returned["goals"])
    # A quick run leaves 6 goals out, and one for each library that isn't there.
    absent = [n for n in ("optax", "torch") if importlib.util.find_spec(n) is None]
    assert text.count("not measured") == verdicts[None] == 6 + len(absent)
    assert (directory / "update_cost.png").read_bytes().startswith(b"\x89PNG")


def test_goals_compare_medians():
    import report

    def result(**medians):
        names = {"ours": "tf_effopt graph", "graph": "Keras graph", "xla": "Keras XLA"}
        competitors = {names[k]: {"median": v} for k, v in medians.items()}
        return {"workload": "resnet50", "optimizer": "adam", "competitors": competitors}

    goals = report.check_goals([result(ours=10.0, graph=23.0, xla=9.9)])
    adam = {g["goal"]: g["passed"] for g in goals if g["optimizer"] == "adam"}
    assert adam["tf_effopt graph at least 2.3 times as fast as Keras graph"] is True
    assert adam["tf_effopt graph no slower than Keras XLA"] is False
    assert adam["tf_effopt graph at most 1.1 times the time of optax jit"] is None


def test_a_run_without_competitors(monkeypatch):
    import update_cost

    monkeypatch.setattr(update_cost, "is_installed", lambda package: False)
    workload = update_cost.all_workloads()["resnet50"].tiny()
    copy = update_cost.CopyBandwidth(megabytes=1)
    cases = [update_cost.all_cases()["adam"]]
    [result] = update_cost.measure_workload(workload, cases, 1, copy, {})
    errors = {entry["error"] for entry in result["competitors"].values()}
    assert errors == {"not installed"}


# ------------------------------------------------------------- another version


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A checkout of another version, which has another number and no AdamW."""
    checkout = tmp_path_factory.mktemp("other")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "tf_effopt", checkout / "tf_effopt", ignore=ignored)
    with (checkout / "tf_effopt" / "__init__.py").open("a") as file:
        file.write('\n__version__ = "0.0.7"\ndel AdamW\n')
    return checkout


@pytest.fixture(scope="module")
def compared(other, tmp_path_factory):
    import against
    import update_cost

    directory = tmp_path_factory.mktemp("compared")
    argv = ["--quick", "--repeats", "2", "--output-dir", str(directory)]
    argv += ["--workload", "resnet50", "--optimizer", "momentum", "adamw"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(against, "PROCESSES", 1)
        return update_cost.main([*argv, "--against", str(other)]), directory


def test_both_versions_run_in_blocks(compared, other):
    results, _ = compared
    sides = results["software"]
    assert sides["other"]["versions"]["tf_effopt"] == "0.0.7"
    assert pathlib.Path(sides["other"]["tf_effopt_file"]).is_relative_to(other)
    assert pathlib.Path(sides["this"]["tf_effopt_file"]).is_relative_to(ROOT)
    ran = [r for r in results["results"] if "error" not in r]
    assert [(r["optimizer"], r["way"]) for r in ran] == [
        ("momentum", "graph"),
        ("momentum", "eager"),
    ]
    for result in ran:
        for side in ("this", "other"):
            assert [len(block) for block in result[side]["blocks"]] == [5, 5]
            assert len(result[side]["first_call_seconds"]) == 1
            assert result[side]["state_bytes"] > 0
        ratio = result["ratio"]
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
        assert result["passed"] is (ratio["low"] < 1.03)


def test_what_the_other_version_has_not_got_is_named(compared):
    results, directory = compared
    left_out = {
        (r["optimizer"], r["error"]) for r in results["results"] if "error" in r
    }
    assert left_out == {("adamw", "the other version: no such rule")}
    text = (directory / "against.md").read_text()
    assert "- left out: AdamW, graph: the other version: no such rule" in text
    assert "| SGD, momentum | graph |" in text
    assert "quick run" in text
    assert json.loads((directory / "against.json").read_text()) == results


@pytest.mark.parametrize("folder", ["", "absent"])
def test_a_folder_without_a_checkout_is_refused(folder, tmp_path, capsys):
    import update_cost

    with pytest.raises(SystemExit) as failure:
        update_cost.main(["--against", str(tmp_path / folder)])
    assert failure.value.code == 2
    message = capsys.readouterr().err
    assert "holds tf_effopt/__init__.py" in message
    assert str(tmp_path / folder) in message


def test_a_version_that_does_not_start_is_named(tmp_path):
    import against

    with pytest.raises(SystemExit, match="doesn't start: failed: OSError: no disk"):
        against.check_start({"error": "failed: OSError: no disk"}, tmp_path)


def test_a_process_that_imports_another_version_ends_the_run(tmp_path):
    import against

    answer = {"tf_effopt_file": str(ROOT / "tf_effopt" / "__init__.py")}
    against.check_start(answer, ROOT)
    with pytest.raises(SystemExit, match="would compare a version with itself"):
        against.check_start(answer, tmp_path)


@pytest.mark.parametrize(
    "n, low, high, coverage",
    [
        # From tables of the sign test: from the 4th of 15, and of 25 from the 8th.
        (15, 4, 12, 0.965),
        (25, 8, 18, 0.957),
        (6, 1, 6, 0.969),
        (5, 1, 5, 0.938),
        (1, 1, 1, 0.0),
    ],
)
def test_the_interval_is_that_of_the_sign_test(n, low, high, coverage):
    import against

    found = against.interval(
        [float(x) for x in np.random.default_rng(0).permutation(n)]
    )
    assert (found["low"], found["high"]) == (low - 1, high - 1)
    assert found["median"] == (n - 1) / 2
    assert round(found["coverage"], 3) == coverage


def test_a_version_that_is_slower_is_one_whose_whole_interval_is():
    import against

    def verdict(ratios):
        sides = {"this": ratios, "other": [1.0] * len(ratios)}
        result = {
            side: {"blocks": [[x] for x in values], "first_call_seconds": values}
            for side, values in sides.items()
        }
        against.summarize(result)
        return result["passed"]

    assert verdict([1.02] * 4 + [1.1] * 11) is True
    assert verdict([1.02] * 3 + [1.1] * 12) is False


# ------------------------------------------------------------- the command line


def test_every_public_optimizer_is_a_case():
    import update_cost

    import tf_effopt

    rules = {case.rule for case in update_cost.all_cases().values()}
    assert {"SGD", "Adam", "AdamW", "GradientDescent", "RMSprop"} <= rules
    assert rules <= set(tf_effopt.__all__) - {"Optimizer", "LossScaleOptimizer"}


@pytest.mark.parametrize(
    "argv",
    [
        ["--optimiser", "adam"],
        ["--optimizer", "adem"],
        ["--workload", "resnet51"],
        ["--repeats", "0"],
    ],
)
def test_what_is_not_known_fails(argv, capsys):
    import update_cost

    with pytest.raises(SystemExit) as failure:
        update_cost.main(argv)
    assert failure.value.code == 2
    assert argv[-1] in capsys.readouterr().err
