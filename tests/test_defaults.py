"""The table of what optimizers reach with their defaults, in a short run."""

from __future__ import annotations

import importlib.util
import pathlib
import re

import pytest

import tf_effopt

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def defaults():
    path = ROOT / "recipes" / "benchmarks" / "defaults.py"
    spec = importlib.util.spec_from_file_location("defaults", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_prints_a_row_for_each(defaults, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(defaults, "EPOCHS", 1)
    found = defaults.main(["--optimizer", "Adam", "ScheduleFreeAdamW", "--seeds", "2"])
    assert {name: len(values) for name, values in found.items()} == {
        "Adam": 2,
        "ScheduleFreeAdamW": 2,
    }
    rows = re.findall(
        r"^\| `(\w+)` \| .* % \[.*\] \|", capsys.readouterr().out, re.MULTILINE
    )
    assert rows == ["Adam", "ScheduleFreeAdamW"]
    assert all(value > 15 for values in found.values() for value in values)


def test_the_page_has_a_row_for_every_optimizer(defaults):
    page = (ROOT / "docs" / "accuracy.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert sorted(rows) == sorted(tf_effopt.optimizers.__all__)
