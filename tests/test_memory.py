"""What an optimizer keeps: as many values as its docstring says."""

from __future__ import annotations

import re

import cases
import keras
import numpy as np
import pytest
from cases import CASES

import tf_effopt

SIZE = 1024 * 1024
# Class -> values per parameter, and values for the whole model, which its
# docstring has, too, and those that its arguments add.
KEPT = {
    "Adafactor": (2 / 1024, 0),
    "Adam": (2, 0),
    "AdamW": (2, 0),
    "GradientDescent": (0, 0),
    "Lamb": (2, 0),
    "Lars": (1, 0),
    "Lion": (1, 0),
    "Muon": (1, 0),
    "Nadam": (2, 1),
    "Prodigy": (4, 2),
    "RAdam": (2, 0),
    "RMSprop": (1, 0),
    "SGD": (0, 0),
    "SOAP": (6, 0),
    "ScheduleFreeAdamW": (2, 3),
    "Yogi": (2, 0),
}
ADDED = {
    ("Adam", "amsgrad"): 1,
    ("RMSprop", "momentum"): 1,
    ("RMSprop", "centered"): 1,
    ("SGD", "momentum"): 1,
}


def values_kept(optimizer: keras.optimizers.Optimizer) -> int:
    """For a matrix of `SIZE`, beside the step count and the learning rate."""
    optimizer.build([keras.Variable(np.zeros((1024, 1024), "float32"))])
    return sum(int(np.prod(v.shape)) for v in optimizer.variables) - 2


@pytest.mark.parametrize("case", CASES, ids=cases.by_name)
def test_state_is_as_large_as_promised(case):
    class_name = case.make.func.__name__
    per_parameter, in_all = KEPT[class_name]
    settings = case.make.keywords
    per_parameter += sum(
        more
        for (c, name), more in ADDED.items()
        if c == class_name and name in settings
    )
    assert values_kept(case.make()) == per_parameter * SIZE + in_all


@pytest.mark.parametrize("class_name", KEPT)
def test_docstring_says_what_is_kept(class_name):
    text = " ".join(getattr(tf_effopt, class_name).__doc__.split())
    per_parameter, in_all = KEPT[class_name]
    if class_name == "Adafactor":
        assert f"{per_parameter:.3f} for 1024 x 1024" in text
    elif (class_name, "momentum") in ADDED and not per_parameter:
        assert "Keeps 1 value per parameter with `momentum`, none without." in text
    elif not per_parameter:
        assert "Keeps no state." in text
    else:
        said = re.search(
            r"Keeps (\d+) values? per parameter(?:, and (\d+) in all)?", text
        )
        assert (int(said[1]), int(said[2] or 0)) == (per_parameter, in_all)


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_options_add_what_they_say(rounding):
    def kept(**options):
        return values_kept(tf_effopt.Lion(**options)) / SIZE

    assert kept(use_ema=True, rounding=rounding) == 2
    assert kept(gradient_accumulation_steps=2, rounding=rounding) == 2


def test_adafactor_is_sublinear():
    """At most 0.01 of the weights; Keras's keeps more than the weights."""
    assert values_kept(keras.optimizers.Adafactor()) / SIZE == pytest.approx(
        1.002, 1e-3
    )
    assert values_kept(tf_effopt.Adafactor()) <= 0.01 * SIZE


def test_adafactor_factors_only_where_it_saves():
    shapes = [(8,), (), (1, 8), (2, 2), (3, 4), (5, 2, 3)]
    optimizer = tf_effopt.Adafactor()
    optimizer.build([keras.Variable(np.zeros(s, "float32")) for s in shapes])
    kept = [
        sum(int(np.prod(v.shape)) for v in tensors["rule"].values())
        for tensors in optimizer._engine.state
    ]
    # SparseRows and columns of 3 x 4; of 5 x 3, twice.
    assert kept == [8, 1, 8, 4, 3 + 4, 2 * (5 + 3)]


def test_soap_keeps_two_matrices_for_each_short_axis():
    optimizer = tf_effopt.SOAP(max_precondition_dim=64)
    optimizer.build([keras.Variable(np.zeros(s)) for s in [(64, 100), (3, 2, 5), (9,)]])
    kept = [
        sum(int(np.prod(v.shape)) for v in tensors["rule"].values())
        for tensors in optimizer._engine.state
    ]
    assert kept == [2 * 6400 + 2 * 64**2, 2 * 30 + 2 * (9 + 4 + 25), 2 * 9]
