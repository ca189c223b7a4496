"""Runs Keras's own tests with the classes of `tf_effopt` in the place of Keras's.

    python tests/keras_suite --backend tensorflow jax torch

It ends with an error if a test fails that isn't in `differences.toml`, or one passes
that is. See docs/keras_tests.md, which `--write-docs` writes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from comparison import (
    AT_MOST,
    BACKENDS,
    HERE,
    Verdict,
    as_markdown,
    compare,
    differences,
)
from substitution import OURS, RESULTS

ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "keras_tests.md"
DEVICES = "--xla_force_host_platform_device_count=4"

# Which files run in one process. Those of distribution set up its devices.
PARTS: dict[str, list[list[str]]] = {
    "optimizers": [["optimizers"]],
    "training": [
        [
            "callbacks",
            "saving",
            "trainers/compile_utils_test.py",
            "trainers/trainer_test.py",
            "backend/jax/trainer_test.py",
        ]
    ],
    "distribution": [
        ["backend/tensorflow/distribute_test.py"],
        ["backend/tensorflow/optimizer_distribute_test.py"],
        ["backend/tensorflow/saved_model_test.py"],
        ["backend/jax/distribution_lib_test.py", "distribution"],
    ],
}


def keras_folder() -> Path:
    """Where the installed Keras has its tests."""
    found = importlib.util.find_spec("keras")
    if found is None:
        sys.exit("Keras isn't installed.")
    folder = Path(found.submodule_search_locations[0]) / "src"
    if not (folder / "optimizers" / "sgd_test.py").exists():
        sys.exit(f"The Keras in {folder.parent} has no tests.")
    return folder


def run(backend: str, tests: list[str], ours: bool) -> tuple[dict, dict]:
    """Runs tests in a fresh process; returns outcomes and messages by test."""
    folder = keras_folder()
    path = [str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")]
    with tempfile.TemporaryDirectory() as work:
        results = Path(work, "results.json")
        environment = {
            **os.environ,
            "KERAS_BACKEND": backend,
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "TF_CPP_MIN_LOG_LEVEL": "3",
            OURS: "1" if ours else "",
            RESULTS: str(results),
        }
        if backend == "jax" and any("distribution" in test for test in tests):
            environment["XLA_FLAGS"] = DEVICES
        options = (
            "-q -W ignore --tb=no --no-header --import-mode=importlib -c /dev/null"
        )
        process = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "substitution"]
            + ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
            + [*options.split(), f"--rootdir={folder}"]
            + [f"{folder}/{test}" for test in tests],
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if not results.exists():
            sys.exit(
                f"pytest died:\n{process.stdout[-4000:]}\n{process.stderr[-4000:]}"
            )
        found = json.loads(results.read_text())
    return found["outcomes"], found["why"]


def check(backend: str, part: str) -> Verdict:
    """Runs one part on one backend, compares, and prints what is wrong."""
    outcomes: dict[str, str] = {}
    messages: dict[str, str] = {}
    failed_with_keras: set[str] = set()
    started = time.monotonic()
    for files in PARTS[part]:
        files = [f for f in files if is_for(f, backend)]
        if not files:
            continue
        of, why = run(backend, files, ours=True)
        again = sorted(test for test, outcome in of.items() if outcome == "failed")
        if again:
            with_keras, _ = run(backend, again, ours=False)
            failed_with_keras |= {t for t, o in with_keras.items() if o == "failed"}
        outcomes.update(of)
        messages.update(why)
    failed = [test for test, outcome in outcomes.items() if outcome == "failed"]
    passed = sum(outcome == "passed" for outcome in outcomes.values())
    verdict = compare(backend, failed, failed_with_keras, outcomes, differences())
    print(
        f"{backend}, {part}: {passed} passed, {len(failed)} failed, "
        f"{len(verdict.keras_fails)} of them with Keras's classes, too, "
        f"{len(outcomes) - passed - len(failed)} skipped, "
        f"{time.monotonic() - started:.0f} s",
        flush=True,
    )
    for test in verdict.unexpected:
        print(f"  NOT LISTED {test}\n    {messages[test][:600]}")
    for test in verdict.no_longer:
        print(f"  LISTED, BUT PASSES {test}")
    return verdict


def is_for(file: str, backend: str) -> bool:
    """Whether a file is for all backends, or for this one."""
    return not file.startswith("backend/") or file.startswith(f"backend/{backend}/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--backend", nargs="+", choices=BACKENDS, default=["tensorflow"]
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--write-docs", action="store_true")
    options = parser.parse_args()
    listed = differences()
    if len(listed) > AT_MOST:
        sys.exit(f"The list has {len(listed)} entries; {AT_MOST} are allowed.")
    if options.write_docs:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(as_markdown(listed))
        return
    verdicts = [check(b, part) for b in options.backend for part in options.part]
    sys.exit(0 if all(verdict.is_good for verdict in verdicts) else 1)


if __name__ == "__main__":
    main()
