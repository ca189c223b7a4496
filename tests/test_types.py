"""What a type checker says of calls."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("mypy")
ROOT = pathlib.Path(__file__).parents[1]

CALLS = """\
import keras
import tf_effopt

decay = keras.optimizers.schedules.CosineDecay(0.1, 10)
tf_effopt.Adam(1e-3, beta_1=0.8, clipnorm=1.0, name="mine")
tf_effopt.AdamW(decay, 0.05, averaging=tf_effopt.averaging.Lookahead(period=3))
tf_effopt.AdamW(1e-3, decay, transforms=[tf_effopt.transforms.MARS(0.1)])
"""
WRONG = {
    'tf_effopt.Adam(1e-3, beta_1="x")': 'Argument "beta_1" to "Adam" has incompatible',
    'tf_effopt.Adam(1e-3, clipnorm="x")': 'Argument "clipnorm" to "Adam" has incompat',
    "tf_effopt.SGD(0.1, nesterov=3)": 'Argument "nesterov" to "SGD" has incompatible',
    'tf_effopt.averaging.Lookahead("x")': 'Argument 1 to "Lookahead" has incompatible',
    "tf_effopt.averaging.Lookahead(perod=3)": 'Unexpected keyword argument "perod"',
}


def test_calls_are_checked(tmp_path):
    """Those that are right pass; each wrong one is an error, in its line."""
    file = tmp_path / "calls.py"
    file.write_text("\n".join([CALLS.rstrip(), *WRONG, ""]))
    # Keras itself has no annotations.
    options = ["--ignore-missing-imports", "--follow-imports=silent"]
    finished = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "--cache-dir", tmp_path, file],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    first = CALLS.count("\n") + 1
    errors = [x for x in finished.stdout.splitlines() if ": error: " in x]
    assert len(errors) == len(WRONG), finished.stdout
    for i, (error, message) in enumerate(zip(errors, WRONG.values(), strict=True)):
        assert f"calls.py:{first + i}: error: {message}" in error
