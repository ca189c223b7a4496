"""A pytest plugin: the classes of `tf_effopt` in the place of Keras's of the same name.

Loaded by `python tests/keras_suite`, with `-p substitution`, before Keras's test files
are imported, which then import ours.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import types
from typing import Any

# Keras's `Optimizer` stays: it is the base of ours, which asks for a rule
# where Keras's asks for `update_step`.
OURS = "KERAS_SUITE_OURS"
RESULTS = "KERAS_SUITE_RESULTS"
RESULTS_FILE = os.environ.get(RESULTS)  # Some of Keras's tests clear the environment.


def shared_names() -> list[str]:
    """The optimizers that Keras and `tf_effopt` both have."""
    import keras

    import tf_effopt

    return [
        name
        for name in tf_effopt.__all__
        if name != "Optimizer"
        and isinstance(getattr(tf_effopt, name), type)
        and hasattr(keras.optimizers, name)
    ]


def keep_those_of_torch(theirs: dict[str, type]) -> None:
    """Keras's `Optimizer.__new__` on PyTorch makes other classes of Keras's.

    It must know them by Keras's classes, as it does for a user of ours.
    """
    names = "adadelta adagrad adam adamax adamw lion nadam optimizer rmsprop sgd"
    package = "keras.src.backend.torch.optimizers.torch_"
    *_, module = [importlib.import_module(package + name) for name in names.split()]
    del module
    from keras.src import optimizers
    from keras.src.backend.torch.optimizers import torch_optimizer

    kept = types.SimpleNamespace(**{**vars(optimizers), **theirs})
    torch_optimizer.optimizers = kept


def substitute() -> None:
    """Puts ours wherever a module of Keras has its class of that name."""
    import keras

    import tf_effopt

    theirs = {name: getattr(keras.optimizers, name) for name in shared_names()}
    if keras.backend.backend() == "torch":
        keep_those_of_torch(theirs)
    ours = {cls: getattr(tf_effopt, name) for name, cls in theirs.items()}
    modules = [m for name, m in sys.modules.items() if name.split(".")[0] == "keras"]
    for module in modules:
        if module.__name__.startswith("keras.src.backend.torch.optimizers"):
            continue
        for name, value in list(vars(module).items()):
            if isinstance(value, type) and value in ours:
                setattr(module, name, ours[value])
    from keras.src import optimizers

    # The names that `keras.optimizers.get("adam")` knows.
    for name, cls in list(optimizers.ALL_OBJECTS_DICT.items()):
        optimizers.ALL_OBJECTS_DICT[name] = ours.get(cls, cls)
    optimizers.ALL_OBJECTS.clear()
    optimizers.ALL_OBJECTS.update(optimizers.ALL_OBJECTS_DICT.values())


def pytest_configure(config: Any) -> None:
    for mark in ("requires_trainable_backend", "multi_device"):
        config.addinivalue_line("markers", f"{mark}: as in Keras's conftest")
    import keras  # noqa: F401

    if os.environ.get(OURS):
        substitute()


class Outcomes:
    """Which test had which outcome, for the process that started this one."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}
        self.why: dict[str, str] = {}

    def note(self, report: Any) -> None:
        if report.failed:
            self.of[report.nodeid] = "failed"
            crash = getattr(report.longrepr, "reprcrash", None)
            why = crash.message if crash else str(report.longrepr)
            self.why.setdefault(report.nodeid, why)
        elif report.skipped or getattr(report, "when", None) == "call":
            self.of.setdefault(report.nodeid, report.outcome)


outcomes = Outcomes()


def pytest_runtest_logreport(report: Any) -> None:
    outcomes.note(report)


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        outcomes.note(report)


def pytest_sessionfinish() -> None:
    if RESULTS_FILE:
        with open(RESULTS_FILE, "w") as file:
            json.dump({"outcomes": outcomes.of, "why": outcomes.why}, file)
