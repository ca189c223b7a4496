"""Every rule, with gradients of any form and size, against NumPy float64.

For each dtype of weights and each clipping, weights and slots are finite wherever
the float64 value fits their dtype, and close to it. `docs/numerical_range.md` lists
what differs, and so does `is_listed`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
from typing import NamedTuple

import keras
import ml_dtypes
import numpy as np
import pytest
from cases import BY_NAME, CASES, STAGES, by_name
from oracles import RULES, trajectory

SHAPES = [(5, 4), (4,), (1,), (3, 2, 2)]
# Powers of 2, so that no gradient is rounded: 1e-38 to 1e18, and to 1e38.
SIZES = [2.0**k for k in (-126, -100, -80, -60, -40, 0, 30, 60)]
LARGE_SIZES = [2.0**k for k in (90, 126)]
STEPS = 2
DTYPES = ("float32", "bfloat16", "float16")
CLIPPINGS = {
    "unclipped": {},
    "clipvalue": {"clipvalue": 0.5},
    "clipnorm": {"clipnorm": 0.5},
    "global_clipnorm": {"global_clipnorm": 0.5},
}


def rank_1(x):
    """Products that 16 bits hold, too."""
    return functools.reduce(np.multiply.outer, [2.0 ** -np.arange(n) for n in x.shape])


def zero_row(x):
    x[0] = 0
    return x


def zero_column(x):
    x[..., 0] = 0
    return x


def one_huge(x):
    x = x * 2.0**-30
    x.flat[-1] = 1.0
    return x


def alternating(x):
    return np.where(np.indices(x.shape).sum(0) % 2, -1.0, 1.0)


FORMS = {
    "zero row": zero_row,
    "zero column": zero_column,
    "all zero": np.zeros_like,
    "rank 1": rank_1,
    "one huge element": one_huge,
    "alternating signs": alternating,
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Each form in each shape, as tensors of a dtype hold it."""

    names: list[str]
    weights: list[np.ndarray]
    gradients: list[list[np.ndarray]]

    @classmethod
    def of(cls, size, dtype, are_zero=False):
        rng = np.random.default_rng(0)
        names, weights, forms = [], [], []
        for (form, make), shape in itertools.product(FORMS.items(), SHAPES):
            names.append(f"{form} {shape}")
            w = rng.uniform(0.5, 1, shape) * (not are_zero)
            weights.append(held(w, dtype))
            x = rng.uniform(0.3, 1, shape) * rng.choice([-1, 1], shape)
            forms.append(held(size * held(make(x), dtype), dtype))
        # Exact multiples: SOAP takes what differs, be it by rounding, for a direction.
        gradients = [[(-0.5) ** step * g for g in forms] for step in range(STEPS)]
        return cls(names, weights, [[held(g, dtype) for g in gs] for gs in gradients])


def held(x, dtype):
    """`x` in float64, as a tensor of `dtype` holds it, without subnormal numbers."""
    x = np.asarray(x, "float64")
    rounded = x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    rounded = rounded.astype("float64")
    _, smallest, _ = limits(dtype)
    return np.where(np.abs(rounded) < smallest, 0.0, rounded)


def limits(dtype):
    """The largest number, the smallest normal one, and the machine epsilon."""
    info = ml_dtypes.finfo(keras.backend.standardize_dtype(dtype))
    return float(info.max), float(info.smallest_normal), float(info.eps)


class Runner:
    """One optimizer, compiled once, that starts anew for each problem."""

    def __init__(self, case, dtype, **stages):
        self.case, self.dtype, self.stages = case, dtype, stages
        self.variables = [
            keras.Variable(w, dtype=dtype, name=f"w{i}")
            for i, w in enumerate(Problem.of(1.0, dtype).weights)
        ]
        self.first = [v.numpy() for v in self.variables]
        self.optimizer = case.make(**stages)
        self.optimizer.build(self.variables)
        self.start = [v.numpy() for v in self.optimizer.variables]

    def restart(self, weights):
        for v, w in zip(self.variables, weights, strict=True):
            v.assign(w)
        for v, value in zip(self.optimizer.variables, self.start, strict=True):
            v.assign(value)
        state = self.optimizer._engine.state
        for w, tensors, old in zip(weights, state, self.first, strict=True):
            for slot in tensors["rule"].values():
                if slot.shape == w.shape and np.array_equal(slot.numpy(), old):
                    slot.assign(w)  # It starts at the weight.

    def run(self, problem):
        """For each tensor its numbers by name, after the last step."""
        self.restart(problem.weights)
        for gs in problem.gradients:
            gs = [keras.ops.cast(g, self.dtype) for g in gs]
            self.optimizer.apply(gs, self.variables)
        found = []
        for variable, tensors in zip(
            self.variables, self.optimizer._engine.state, strict=True
        ):
            own = {"weight": variable}
            if self.stages.get("use_ema"):
                own["average"] = tensors["ema"]["average"]
            for slot in tensors["rule"].values():
                own[slot.name.partition("_")[2]] = slot
            found.append(own)
        return found

    def expected(self, problem):
        """For each tensor by name the value in float64, and how far it has moved."""
        settings = dict(self.case.make.keywords) | self.stages
        rate = float(np.float32(settings["learning_rate"]))
        values = [{"weight": w, "average": w} for w in problem.weights]
        moved = [{} for _ in problem.names]
        with np.errstate(all="ignore"):
            moments = trajectory(
                self.case.make.func.__name__,
                settings,
                problem.weights,
                problem.gradients,
                [rate] * STEPS,
                problem.names,
            )
            for weights, states, averages, _ in moments:
                for i, state in enumerate(states):
                    now = {"weight": weights[i], "average": averages[i]} | state
                    for key, value in now.items():
                        value = np.array(value, "float64")
                        step = np.abs(value - values[i].get(key, 0.0)).max()
                        moved[i][key] = moved[i].get(key, 0.0) + step
                        values[i][key] = value
                        # The bases are made by the first update.
                        values[i].setdefault(f"first {key}", value)
        return values, moved


class Mistake(NamedTuple):
    """Of one tensor; `error` is infinite where a number isn't finite."""

    form: str
    key: str
    error: float
    scale: float


def mistakes(runner, size, are_zero):
    """What isn't finite, or isn't close, where the float64 value is representable."""
    problem = Problem.of(size, runner.dtype, are_zero)
    tolerance = max(2e-5, STEPS * limits(runner.dtype)[2])
    values, moved = runner.expected(problem)
    found = []
    for i, (name, own) in enumerate(
        zip(problem.names, runner.run(problem), strict=True)
    ):
        for key, variable in own.items():
            value = values[i][key]
            actual = np.asarray(keras.ops.cast(variable, "float64"))
            largest, smallest, _ = limits(variable.dtype)
            if not np.abs(value).max() <= largest:
                continue  # also NaN, where float64 doesn't hold it
            if not np.isfinite(actual).all():
                found.append(Mistake(name, key, np.inf, 0.0))
                continue
            if key.startswith("basis"):
                # Not column by column: eigenvalues may be equal.
                error = basis_error(
                    actual, values[i][key.replace("basis", "first statistics")]
                )
                scale = 1.0
            else:
                error = np.abs(actual - value).max()
                scale = max(np.abs(value).max(), moved[i][key])
            if error > tolerance * scale + 4 * smallest:
                found.append(Mistake(name, key, error, scale))
    return found


def basis_error(basis, statistics):
    """How far columns are from eigenvectors of unit length, by falling eigenvalue."""
    found = basis.T @ statistics @ basis / max(np.abs(statistics).max(), 1e-300)
    eigenvalues = np.diag(found)
    return max(
        np.abs(basis.T @ basis - np.eye(len(basis))).max(),
        np.abs(found - np.diag(eigenvalues)).max(),
        np.max(np.diff(eigenvalues), initial=0.0),
    )


# ------------------------------------------------- what the page lists

# They keep (1 - beta) g: less than the smallest normal number, at the smallest size.
MEANS = {"Adam", "AdamW", "Lamb", "Lion", "Muon", "Nadam", "Prodigy", "RMSprop"}
SMALLEST = SIZES[0]
LEAST_NORM = 1.1e-19  # Its square is the smallest normal number.
NOISE_OF_MUON = 1e-4  # of a step
# Of the learning rate: where a gradient has no part but rounding; and where it has a
# small one, or a later one has a part where the first has none.
NOISE_OF_SOAP, ANY_BASIS_OF_SOAP = 0.1, 2.0


def is_listed(runner, size, are_zero, mistake) -> bool:
    """Whether `docs/numerical_range.md` says that this differs, by so much."""
    rule = runner.case.make.func.__name__
    form, key, error, scale = mistake
    if not np.isfinite(error):
        return False
    if rule in MEANS and size == SMALLEST:
        return key in ("weight", "momentum")
    if rule == "Lamb":
        return key == "weight" and (size < 1e-25 or (are_zero and size < LEAST_NORM))
    if rule == "Lars":
        return are_zero and size < 10 * LEAST_NORM
    if rule == "Muon":
        return key == "weight" and error < NOISE_OF_MUON * scale
    if rule == "SOAP" and key == "weight":
        rate = runner.case.make.keywords["learning_rate"]
        is_any_basis = "huge" in form or "clipvalue" in runner.stages
        noise = ANY_BASIS_OF_SOAP if is_any_basis else NOISE_OF_SOAP
        return error < noise * rate + STEPS * limits(runner.dtype)[2] * scale
    return False


@pytest.mark.representatives(
    "sgd-float32-clipnorm",
    "adam-float32-unclipped",
    "adam-bfloat16-global_clipnorm",
    "adafactor-float32-unclipped",
    "muon-float16-clipvalue",
)
@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_gradients_of_any_form_and_size(case, dtype, clipping):
    runner = Runner(case, dtype, **CLIPPINGS[clipping])
    sizes = SIZES if clipping == "unclipped" else SIZES + LARGE_SIZES
    for size, are_zero in itertools.product(sizes, (False, True)):
        if size > limits(dtype)[0]:
            continue
        found = [
            mistake
            for mistake in mistakes(runner, size, are_zero)
            if not is_listed(runner, size, are_zero, mistake)
        ]
        assert not found, (size, are_zero, found[:5])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_average_of_weights(dtype):
    runner = Runner(BY_NAME["adam"], dtype, use_ema=True, ema_momentum=0.9)
    for size, are_zero in itertools.product(SIZES[1:], (False, True)):
        if size <= limits(dtype)[0]:
            found = mistakes(runner, size, are_zero)
            assert not found, (size, are_zero, found[:5])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", STAGES)
def test_stages(name, dtype):
    """Against their own float64: `tests/test_transforms.py` tests what that is."""
    case = BY_NAME["nesterov"]
    runner, reference = (
        Runner(case, of, **STAGES[name]()) for of in (dtype, "float64")
    )
    for size, are_zero in itertools.product(SIZES, (False, True)):
        if size > limits(dtype)[0]:
            continue
        problem = Problem.of(size, dtype, are_zero)
        found, values = runner.run(problem), reference.run(problem)
        for form, own, theirs in zip(problem.names, found, values, strict=True):
            for key, variable in own.items():
                actual = np.asarray(keras.ops.cast(variable, "float64"))
                value = theirs[key].numpy()
                assert np.isfinite(actual).all(), (size, form, key)
                if name == "gradient_noise":
                    continue  # Its random numbers depend on the dtype.
                scale = np.abs(value).max()
                error = np.abs(actual - value).max()
                # A weight's rounding enters its own norm, too.
                tolerance = max(2e-5, 2 * STEPS * limits(dtype)[2]) * scale
                assert error <= tolerance + 4 * limits(dtype)[1], (size, form, key)


def test_the_page_names_every_rule():
    page = pathlib.Path(__file__).parent.parent / "docs" / "numerical_range.md"
    text = page.read_text(encoding="utf-8")
    assert not [name for name in RULES if f"`{name}`" not in text]
