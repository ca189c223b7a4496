"""Whether XLA can compile an update, which is found before the first step."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Hashable
from typing import Any

import tensorflow as tf

from tf_effopt.engine import stages
from tf_effopt.engine.counts import uses_counts
from tf_effopt.engine.inputs import Inputs
from tf_effopt.engine.plan import Plan, Scalars, TrainedVariable, smallest_of_each
from tf_effopt.runtime.structure import is_own, structure
from tf_effopt.state.variables import shape_of

MOST_TRIALS = 256  # of which the results are kept

# What can't be compiled, and why; None for what can. All optimizers with the same
# functions share one trial.
_failures: collections.OrderedDict[Hashable, str | None] = collections.OrderedDict()


def update_failure(
    device: str,
    plan: Plan,
    variables: list[TrainedVariable],
    state: list[dict],
    model: dict,
) -> str | None:
    """Why XLA can't compile the update of these variables, or None if it can.

    Args:
        state: for each variable its `tf.Variable`s.
        model: the state of the rules for the whole model.
    """
    if _is_known_to_compile(device, variables, plan):
        return None
    chosen = smallest_of_each(
        variables, lambda v: structure((v.constraint, v.rule, v.dtype))
    )
    key = device, frozenset(chosen), structure(_functions_of(plan))
    if key not in _failures:
        _failures[key] = device_failure(device) or _trial(
            device, sorted(chosen.values()), plan, variables, state, model
        )
    _failures.move_to_end(key)
    while len(_failures) > MOST_TRIALS:
        _failures.popitem(last=False)
    return _failures[key]


@functools.cache
def device_failure(device: str) -> str | None:
    """Why XLA can't run on `device`, or None if it can."""
    with tf.init_scope(), tf.device(device):
        try:
            function = tf.function(lambda x: x + 1, jit_compile=True)
            # The function itself may be told to run eagerly, without XLA.
            function.get_concrete_function(tf.zeros(()))(tf.zeros(()))
        except (tf.errors.OpError, ValueError) as error:
            return str(error)
    return None


def _is_known_to_compile(
    device: str, variables: list[TrainedVariable], plan: Plan
) -> bool:
    """Whether no trial is needed: the tests compile all of this package's on a CPU."""
    if tf.DeviceSpec.from_string(device).device_type != "CPU" or device_failure(device):
        return False
    rules = [(v.rule.function, v.constraint) for v in variables]
    return is_own(structure((rules, _functions_of(plan))))


def _functions_of(plan: Plan) -> list[Callable]:
    return [x.function for x in plan.functions()]


def _trial(
    device: str,
    chosen: list[int],
    plan: Plan,
    variables: list[TrainedVariable],
    state: list[dict],
    model: dict,
) -> str | None:
    trained = [variables[i] for i in chosen]
    wide = any(v.compute_dtype == "float64" for v in variables)
    last = max(v.index for v in variables)

    def update(state: list[dict], gradients: list[Any]) -> Any:
        scalars = Scalars(
            tf.zeros((), "int64"),
            tf.zeros(()),
            tf.zeros((len(plan.numbers), 2), "float64" if wide else "float32"),
            tf.nest.map_structure(lambda x: tf.zeros(x.shape, x.dtype), model),
            tf.zeros(last + 1, "int64") if uses_counts(plan, trained) else None,
        )
        after, outcome = stages.step(Inputs(plan, trained, state, gradients, scalars))
        return after, outcome.counted, outcome.model

    with tf.init_scope(), tf.device(device):
        zeros = tf.nest.map_structure(
            lambda x: tf.zeros(shape_of(x), x.dtype), [state[i] for i in chosen]
        )
        gradients = [tf.zeros(v.shape, v.dtype) for v in trained]
        try:
            compiled = tf.function(update, jit_compile=True, autograph=False)
            compiled.get_concrete_function(zeros, gradients)(zeros, gradients)
        except tf.errors.OpError as error:
            return error.message
    return None
