"""The NumPy transcriptions, and the library, against the authors' own code."""

from __future__ import annotations

import golden_certificates
import numpy as np
import pytest
from golden_certificates import difference, library_run, library_traces, with_signs_of
from golden_traces import FOLDER, TRACE_NAMES, Trace, load_trace
from oracles import RULES, trajectory

BOUND = 1e-10
every_trace = pytest.mark.parametrize("name", TRACE_NAMES)


def run(trace: Trace, **changed) -> dict:
    """The transcription on the trace's problem, with some settings changed.

    Returns:
        A dict with what a trace calls `after`, `evaluated`, `slots`, `totals`.
    """
    after, evaluated, totals = [], [], {name: [] for name in trace.totals}
    moments = trajectory(
        trace.class_name,
        trace.settings | changed,
        trace.weights,
        trace.gradients,
        trace.learning_rates,
    )
    next(moments)
    for weights, states, _, shared in moments:
        after.append(weights)
        if trace.evaluated:
            evaluated.append(shared["averages"])
        for name, values in totals.items():
            values.append(shared[name])
    return {
        "after": after,
        "evaluated": evaluated,
        "slots": states,
        "totals": totals,
    }


def largest_difference(actual, expected) -> float:
    """The largest of any tensor after any step."""
    return max(
        difference(a, e)
        for actual_step, step in zip(actual, expected, strict=True)
        for a, e in zip(actual_step, step, strict=True)
    )


def differences(result, trace: Trace) -> dict[str, float]:
    """The largest relative difference in each kind of value."""
    found = {"after": largest_difference(result["after"], trace.after)}
    if trace.evaluated:
        found["evaluated"] = largest_difference(result["evaluated"], trace.evaluated)
    for actual, expected in zip(result["slots"], trace.slots, strict=True):
        for name, slot in expected.items():
            assert actual[name].shape == slot.shape
            ours = with_signs_of(slot, actual[name], name)
            found[name] = max(found.get(name, 0.0), difference(ours, slot))
    for name, values in trace.totals.items():
        found[name] = difference(result["totals"][name], values)
    return found


@every_trace
def test_transcription_follows_the_trace(name):
    trace = load_trace(name)
    assert len(trace.after) == len(trace.gradients) == len(trace.learning_rates) >= 20
    for kind, found in differences(run(trace), trace).items():
        assert found <= BOUND, f"{kind}: {found:.2e} of its norm"


# What the values of a trace can't show.
WITHOUT_EFFECT = {
    "learning_rate": "each step has its own",
    "epsilon_1": "made too small to see",
}


def other_than(value):
    """Another value of a setting, or of each argument of a stage."""
    if isinstance(value, list):
        return [[n, {k: other_than(x) for k, x in of.items()}] for n, of in value]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return value * 0.9 or 0.1


@every_trace
def test_every_argument_shows_in_the_trace(name):
    trace = load_trace(name)
    other = {
        "scale": {"original": "match_rms_adamw", "match_rms_adamw": "original"},
        "iteration": {
            "newton_schulz": "polar_express",
            "polar_express": "newton_schulz",
        },
    }
    for argument, value in trace.settings.items():
        if argument in WITHOUT_EFFECT:
            continue
        new = other[argument][value] if argument in other else other_than(value)
        after = run(trace, **{argument: new})["after"]
        assert largest_difference(after, trace.after) > 10 * BOUND, argument


def test_every_rule_has_a_trace():
    traced = {load_trace(name).class_name for name in TRACE_NAMES}
    assert traced == set(RULES)


def test_traces_have_what_tells_rules_apart():
    """A zero gradient, a changing rate; weight decay, and none."""
    decays = {}
    for name in TRACE_NAMES:
        trace = load_trace(name)
        assert any(all(np.all(g == 0) for g in step) for step in trace.gradients)
        rates = len(set(trace.learning_rates))
        assert rates > 1 or trace.provenance["constant_rate"]
        decays.setdefault(trace.class_name, set()).add(
            bool(trace.settings.get("weight_decay"))
        )
    assert all(len(seen) == 2 for seen in decays.values()), decays


# ------------------------------------------------------------------ the library

LIBRARY_BOUNDS = {"float32": 1e-5, "float64": 1e-10}
every_library_trace = pytest.mark.parametrize("name", library_traces())


@pytest.mark.representatives(
    "float32-adafactor",
    "float32-adam",
    "float32-adam_amsgrad",
    "float32-adamw",
    "float32-gradient_descent",
    "float32-lamb",
    "float32-lars",
    "float32-lion",
    "float32-muon",
    "float32-nadam",
    "float32-prodigy",
    "float32-radam",
    "float32-rmsprop",
    "float32-schedule_free_adamw",
    "float32-sgd_nesterov",
    "float32-yogi",
    "float64-soap",
)
@every_library_trace
@pytest.mark.parametrize("dtype", LIBRARY_BOUNDS)
def test_library_follows_the_trace(name, dtype):
    found = golden_certificates.differences(library_run(name, dtype), load_trace(name))
    for kind, value in found.items():
        assert value <= LIBRARY_BOUNDS[dtype], f"{kind}: {value:.2e} of its norm"


@pytest.mark.parametrize("name", [n for n in library_traces() if "lion" in n])
@pytest.mark.parametrize("dtype", LIBRARY_BOUNDS)
def test_only_rounding_turns_a_sign(name, dtype):
    """A step of the other sign was decided by a number next to 0."""
    trace, run = load_trace(name), library_run(name, dtype)
    beta_1, beta_2 = trace.settings["beta_1"], trace.settings["beta_2"]
    deciding = []
    for i, weight in enumerate(trace.weights):
        m, before, ours_before = np.zeros_like(weight), weight, weight
        for t, rate in enumerate(trace.learning_rates):
            g, after, ours = trace.gradients[t][i], trace.after[t][i], run.after[t][i]
            turned = np.abs((ours - ours_before) - (after - before)) > rate / 2
            deciding += np.ravel((beta_1 * m + (1 - beta_1) * g)[turned]).tolist()
            m = beta_2 * m + (1 - beta_2) * g
            before, ours_before = after, ours
    assert all(abs(c) < 1e-6 for c in deciding), deciding
    assert len(deciding) == 0


def test_library_has_the_rule_of_each_trace():
    assert library_traces() == TRACE_NAMES


@pytest.mark.slow  # It runs every trace.
def test_certificates_are_those_of_the_traces():
    """The committed table has the rows of today, and figures that still hold."""
    text = (FOLDER / "CERTIFICATES.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines()]
    committed = {(r[0], r[1]): r[2:] for r in rows if len(r) == 6 and r[0][0] == "`"}
    today = [golden_certificates.certificate(name) for name in library_traces()]
    assert set(committed) == {(c.rule, c.source) for c in today}
    for c in today:
        compared, steps, float32, float64 = committed[c.rule, c.source]
        assert (compared, steps) == (c.compared, str(c.steps))
        assert c.float32 <= 10 * float(float32)
        # Below this, nothing but the order of additions is seen.
        assert c.float64 <= 10 * max(float(float64), 1e-15)
