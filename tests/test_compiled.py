"""The update is one XLA program, in place, in float32, compiled once."""

from __future__ import annotations

import gc
import os
import pathlib
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import CASES, KINDS, by_name, programs_of, traces

from tf_effopt.runtime.flat_function import flattened
from tf_effopt.runtime.programs import plain

pytestmark = pytest.mark.fresh_programs

OPTIONS = {
    "plain": {},
    "all": {"global_clipnorm": 1.0, "weight_decay": 0.1, "use_ema": True},
    "accumulation": {"gradient_accumulation_steps": 2},
}
SHAPES = [(64, 32), (32,), ()]
COUNTS_READS_AND_WRITES = {
    "AssignAddVariableOp",
    "AssignVariableOp",
    "Cast",
    "Const",
    "LogicalNot",
    "NoOp",
    "Placeholder",
    "ReadVariableOp",
}


def built(case, shapes=SHAPES, **options):
    rng = np.random.default_rng(0)
    variables = [keras.Variable(rng.normal(size=s), dtype="float32") for s in shapes]
    gradients = [tf.constant(rng.normal(size=s).astype("float32")) for s in shapes]
    optimizer = case.make(**options)
    optimizer.build(variables)
    return optimizer, gradients


def hlo(optimizer, gradients) -> str:
    """Its compiled update, as XLA is given it."""
    (program,) = programs_of(optimizer)
    arguments = list(gradients), plain(optimizer._engine.scalars()), None, None
    state = program.flat_state
    function = program.update.run.of_flat_tensors(len(state), arguments)
    tensors, _ = flattened(arguments)
    return function.experimental_get_compiler_ir(*state, *tensors)(stage="hlo")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_a_step_is_one_compiled_program(case, options):
    optimizer, gradients = built(case, **options)
    step = tf.function(lambda: optimizer.apply(gradients))
    calls, outside = operations_of(step)
    assert [op.get_attr("_XlaMustCompile") for op in calls] == [True]
    # What is left outside counts steps, and reads and writes single numbers.
    model_slots = [x for own in optimizer._engine.model_state.values() for x in own]
    assert outside.count("AssignVariableOp") == len(model_slots)
    others = set(outside) - COUNTS_READS_AND_WRITES
    # Or it makes numbers of the counts of all variables, as vectors.
    assert ("Unpack" in others) == follows_counts(optimizer)
    assert follows_counts(optimizer) or not others


def operations_of(step):
    operations = step.get_concrete_function().graph.get_operations()
    calls = [op for op in operations if "PartitionedCall" in op.type]
    return calls, [op.type for op in operations if op not in calls]


def follows_counts(optimizer) -> bool:
    return getattr(optimizer.model_rule, "each_count", False)


WITH_COUNTS = [case for case in CASES if follows_counts(case.make())]


@pytest.mark.parametrize("case", WITH_COUNTS, ids=by_name)
def test_numbers_of_each_variable_are_made_together(case):
    def made(shapes):
        optimizer, gradients = built(case, shapes)
        _, outside = operations_of(tf.function(lambda: optimizer.apply(gradients)))
        return [x for x in outside if x not in ("Const", "Placeholder")]

    assert made(SHAPES) == made(SHAPES * 3)


@pytest.mark.representatives(*KINDS)
@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_the_program_has_no_float64(case):
    optimizer, gradients = built(case, **OPTIONS["all"])
    tf.function(lambda: optimizer.apply(gradients)).get_concrete_function()
    text = hlo(optimizer, gradients)
    assert "f32[64,32]" in text
    assert "f64[" not in text


ONE_STEP_OF_EACH = """
import keras, tensorflow as tf
import sys
from cases import CASES
for case in CASES:
    if case.name not in sys.argv[1:]:
        continue
    w = keras.Variable(tf.ones((64, 32)))
    optimizer = case.make(use_ema=True, global_clipnorm=1.0)
    optimizer.apply([tf.ones((64, 32))], [w])
    print(2 + len(optimizer._engine.state[0]["rule"]))
"""


OTHERS = tuple(case.name for case in CASES if case.name not in KINDS)


@pytest.mark.parametrize(
    "names",
    [KINDS, pytest.param(OTHERS, marks=pytest.mark.slow)],
    ids=["few", "others"],
)
def test_the_update_is_in_place(names, tmp_path):
    """XLA writes each weight, slot and average where it stood."""
    finished = subprocess.run(
        [sys.executable, "-c", ONE_STEP_OF_EACH, *names],
        check=True,
        cwd=pathlib.Path(__file__).parent,
        env=os.environ
        | {"XLA_FLAGS": f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    written = sorted(int(line) for line in finished.stdout.split())
    assert len(written) == len(names)
    updates = tmp_path.glob("*_inference__run_*.cpu_after_optimizations.txt")
    headers = [path.read_text().partition("\n")[0] for path in updates]
    aliased = sorted(len(re.findall(r"(?:may|must)-alias", h)) for h in headers)
    assert aliased == written


def test_float64_weights_are_the_only_reason_for_float64():
    optimizer = CASES[3].make()
    weights = keras.Variable(np.ones(3), dtype="float64")
    gradient = [tf.ones(3, "float64")]
    optimizer.apply(gradient, [weights])
    assert "f64[3]" in hlo(optimizer, gradient)


@pytest.mark.representatives(*KINDS)
@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_further_steps_trace_nothing(case):
    optimizer, gradients = built(case, clipnorm=1.0)
    for rate in (0.1, 0.2, 0.3):
        optimizer.learning_rate = rate
        optimizer.clipnorm = rate
        optimizer.apply(gradients)
    assert traces(optimizer) == [1]


def test_an_eager_step_calls_the_compiled_update_itself():
    """Not a function around it, which would be traced as well."""
    gc.collect()
    before = graphs_of_functions()
    optimizer, gradients = built(CASES[0])
    optimizer.apply(gradients)
    new = [x.name for x in graphs_of_functions() if x not in before]
    assert [name for name in new if not name.startswith("cond_")] == ["_run"]


def graphs_of_functions() -> list:
    return [x for x in gc.get_objects() if isinstance(x, tf.__internal__.FuncGraph)]


def test_autograph_rewrites_nothing_of_the_update(monkeypatch):
    """It would take as long as tracing the update itself."""
    optimizer, gradients = built(CASES[0])
    seen = []
    run = optimizer._engine.apply

    def recording(*args):
        seen.append(tf.__internal__.autograph.control_status_ctx().status.name)
        return run(*args)

    monkeypatch.setattr(optimizer._engine, "apply", recording)
    tf.function(lambda: optimizer.apply(gradients)).get_concrete_function()
    assert seen == ["DISABLED"]
