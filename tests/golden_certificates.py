"""Holds the library against the golden traces, and writes the table of it.

python tests/golden_certificates.py > tests/golden/CERTIFICATES.md
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from golden_traces import TRACE_NAMES, Trace, load_trace

import tf_effopt

DTYPES = ("float32", "float64")


@dataclass
class Run:
    """What the library did, in the words of a `Trace`."""

    after: list[list[np.ndarray]] = field(default_factory=list)
    evaluated: list[np.ndarray] = field(default_factory=list)
    slots: list[dict[str, np.ndarray]] = field(default_factory=list)
    totals: dict[str, list[float]] = field(
        default_factory=lambda: collections.defaultdict(list)
    )


@contextlib.contextmanager
def floatx(dtype: str) -> Iterator[None]:
    """In which Keras keeps a learning rate."""
    before = keras.config.floatx()
    keras.config.set_floatx(dtype)
    try:
        yield
    finally:
        keras.config.set_floatx(before)


@functools.cache
def library_run(name: str, dtype: str) -> Run:
    """Runs the library's optimizer on a trace's problem, in `dtype`.

    `evaluated` are the weights to evaluate at after the last step.
    """
    trace, run = load_trace(name), Run()
    with floatx(dtype):
        optimizer = getattr(tf_effopt, trace.class_name)(**made(trace.settings))
        variables = [
            keras.Variable(w, dtype=dtype, name=f"w{i}")
            for i, w in enumerate(trace.weights)
        ]
        optimizer.build(variables)
        for gradients, rate in zip(trace.gradients, trace.learning_rates, strict=True):
            optimizer.learning_rate = rate
            optimizer.apply([keras.ops.convert_to_tensor(g, dtype) for g in gradients])
            run.after.append([numpy(v) for v in variables])
            for total in trace.totals:
                run.totals[total].append(float(numpy(named(optimizer, total))))
        run.slots = [
            {
                v.name.partition("_")[2]: numpy(v)
                for key, slots in tensors.items()
                if key != "weight"
                for v in slots.values()
            }
            for tensors in optimizer._engine.state
        ]
        if trace.evaluated:
            optimizer.use_evaluation_weights()
            run.evaluated = [numpy(v) for v in variables]
    return run


def made(settings: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's arguments, with the stages that a trace names."""
    settings = dict(settings)
    for argument in ("transforms", "averaging"):
        if argument in settings:
            settings[argument] = [
                getattr(getattr(tf_effopt, argument), name)(**arguments)
                for name, arguments in settings[argument]
            ]
    return settings


def numpy(variable: Any) -> np.ndarray:
    return variable.numpy().astype("float64")


def named(optimizer: Any, name: str) -> Any:
    (variable,) = [v for v in optimizer.variables if v.name == name]
    return variable


def difference(actual: Any, expected: Any) -> float:
    """|actual - expected| over |expected|."""
    error = np.linalg.norm(np.ravel(actual) - np.ravel(expected))
    norm = np.linalg.norm(np.ravel(expected))
    return float(error / norm) if norm else float(error and np.inf)


def with_signs_of(slot: np.ndarray, actual: np.ndarray, name: str) -> np.ndarray:
    """A basis whose columns look the way those of `slot` do; others as they are."""
    if not name.startswith("basis_"):
        return actual
    # The signs of an eigenvector's elements say no more than its own.
    return actual * np.sign(np.sum(actual * slot, axis=0))


def differences(run: Run, trace: Trace) -> dict[str, float]:
    """The largest relative difference of any tensor, in each kind of value."""
    found: dict[str, float] = collections.defaultdict(float)

    def compare(kind: str, actual: Any, expected: Any) -> None:
        assert np.shape(actual) == np.shape(expected), kind
        found[kind] = max(found[kind], difference(actual, expected))

    for actual_step, step in zip(run.after, trace.after, strict=True):
        for actual, expected in zip(actual_step, step, strict=True):
            compare("weights", actual, expected)
    if trace.evaluated:
        for actual, expected in zip(run.evaluated, trace.evaluated[-1], strict=True):
            compare("evaluation weights", actual, expected)
    for actual, expected in zip(run.slots, trace.slots, strict=True):
        assert set(actual) == set(expected)
        for name, slot in expected.items():
            compare(name, with_signs_of(slot, actual[name], name), slot)
    for name, values in trace.totals.items():
        for actual, expected in zip(run.totals[name], values, strict=True):
            compare(name, actual, expected)
    return dict(found)


def library_traces() -> list[str]:
    """Names of the traces whose rule the library has."""
    return [
        name for name in TRACE_NAMES if hasattr(tf_effopt, load_trace(name).class_name)
    ]


@dataclass(frozen=True)
class Certificate:
    """One row of the table."""

    rule: str
    source: str
    compared: str
    steps: int
    float32: float
    float64: float

    def row(self) -> str:
        cells = [self.rule, self.source, self.compared, str(self.steps)]
        cells += [f"{self.float32:.1e}", f"{self.float64:.1e}"]
        return f"| {' | '.join(cells)} |"


def rule_of(trace: Trace) -> str:
    """As a call, without what says nothing of the rule."""
    arguments = ", ".join(
        f"{k}={v!r}" for k, v in trace.settings.items() if k != "learning_rate"
    )
    return f"`{trace.class_name}({arguments})`"


def source_of(trace: Trace) -> str:
    made = trace.provenance
    version = made["version"].partition("+")[0]
    return f"{made['package']} {version}, `{made['reference']}`"


def certificate(name: str) -> Certificate:
    trace = load_trace(name)
    found = {d: differences(library_run(name, d), trace) for d in DTYPES}
    return Certificate(
        rule_of(trace),
        source_of(trace),
        ", ".join(found["float32"]),
        len(trace.after),
        *(max(found[d].values()) for d in DTYPES),
    )


HEADER = """\
# Certificates

Each rule of this package against another implementation of it, on the golden
traces of this folder, which have what that one did in float64. The differences
are relative, the norm of a tensor's difference over its norm: the largest of any
tensor, of weights after any step, of slots and model-wide numbers at the end.

    python tests/golden_certificates.py > tests/golden/CERTIFICATES.md

| rule | source | compared | steps | largest difference in float32 | in float64 |
|---|---|---|---|---|---|"""


def certificates() -> str:
    """The whole table, made now."""
    rows = [certificate(name).row() for name in library_traces()]
    return "\n".join([HEADER, *rows, ""])


if __name__ == "__main__":
    print(certificates(), end="")
