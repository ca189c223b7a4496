"""Linear regression by four rules, each checked against its formula.

    python recipes/linear_regression.py

It trains θ on the mean squared error of Xθ with `tf_effopt.GradientDescent` (all
rows), `SGD`, `Adam` (with and without bias correction) and `RMSprop` (random
batches), and compares θ after every step with the formula written out in NumPy
in float64. A rule that leaves its formula ends the run with an error. Two custom
rules, as an article prints them, show how a rule is added, and why these two
don't train: see `recipes/article.md`. It writes loss.png, questions.png and
metrics.json.

Measured on 2 cores of a shared Intel Xeon, Python 3.11, TensorFlow 2.21, Keras
3.15.1, NumPy 2.4.6; seed 0, n = 1: 76 s with other work on the machine.

- Largest difference from NumPy at any of 240 steps: 2.3e-7 in float32, with
  `--dtype float64` 3.6e-15.
- The learning rate decides: for gradient descent 0.22 to 0.46 comes within twice
  the least-squares loss of 0.0095, 0.1 is too slow, 1.0 (in theory the limit) too
  much. A range test of 300 batches suggests 0.38 (final loss 0.0101), for SGD 0.11
  (0.0183), for Adam 0.34 (0.0117), for RMSprop 0.032 (0.0099).
- To within 25 % of the least-squares loss, at each one's fastest rate: gradient
  descent 117 steps and 59,904 rows read, SGD 204 steps and 6,528 rows.
- The same for Adam: 62 steps against SGD's 204 where the curvatures differ by 100;
  68 against 7 where they don't. Adam pays where scales differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import tf_effopt
from tf_effopt import hyperparameters
from tf_effopt.callbacks import LearningRateRangeTest

# The largest ‖θ − θ_NumPy‖ / ‖θ_NumPy‖ allowed at any step.
BOUNDS = {"float32": 2e-6, "float64": 1e-12}
SWEEP = [10 ** (k / 3) for k in range(-6, 4)]  # learning rates 0.01 to 10
REACHED = 1.25  # at the minimum: a loss within 25 % of it, to the end
THETA = np.array([2.0, -1.0, -2.0, 1.5])  # what the data is made from
EXPLODED = 1e4  # a run ends when its loss is so many times the first one


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run needs; each field is an option of the command."""

    steps: int = 240
    seed: int = 0
    learning_rate: float = 0.1
    adaptive_learning_rate: float = 0.03
    examples: int = 512
    batch_size: int = 32
    condition: float = 100.0
    dtype: str = "float32"
    output_dir: Path = Path("runs/linear_regression")


HELP = {
    "steps": "updates of each run",
    "seed": "of the data and the batches",
    "learning_rate": "of gradient descent and SGD",
    "adaptive_learning_rate": "of Adam and RMSprop",
    "examples": "rows of the data",
    "batch_size": "rows of a random batch; gradient descent takes all",
    "condition": "largest curvature of the loss over the smallest, at least 1",
    "dtype": "of weights and arithmetic: " + " or ".join(BOUNDS),
    "output_dir": "where the plots and metrics.json go",
}


# ------------------------------------------------- the formulas, in NumPy
#
# One step each, in float64: θ, the gradient g, the state s (0 at first), the
# step's number t, the learning rate η. Nothing here uses the library.


def numpy_gradient_descent(θ, g, s, t, η):
    return θ - η * g


def numpy_adam(θ, g, s, t, η, β1=0.9, β2=0.999, ε=1e-7):
    s["m"] = β1 * s["m"] + (1 - β1) * g
    s["v"] = β2 * s["v"] + (1 - β2) * g**2
    η = η * np.sqrt(1 - β2**t) / (1 - β1**t)
    return θ - η * s["m"] / (np.sqrt(s["v"]) + ε)


def numpy_adam_uncorrected(θ, g, s, t, η, β1=0.9, β2=0.999, ε=1e-7):
    s["m"] = β1 * s["m"] + (1 - β1) * g
    s["v"] = β2 * s["v"] + (1 - β2) * g**2
    return θ - η * s["m"] / (np.sqrt(s["v"]) + ε)


def numpy_rmsprop(θ, g, s, t, η, ρ=0.9, ε=1e-7):
    s["v"] = ρ * s["v"] + (1 - ρ) * g**2
    return θ - η * g / np.sqrt(s["v"] + ε)


def numpy_literal_rmsprop(θ, g, s, t, η, β2=0.9, ε=1e-7):
    s["g"] = β2 * s["g"] + (1 - β2) * g**2
    s["v"] = s["v"] + (np.sqrt(s["g"]) - s["v"]) / t
    return θ - η * s["g"] / (np.sqrt(s["v"]) + ε)


def numpy_literal_adam(θ, g, s, t, η, β1=0.9, β2=0.999, ε=1e-7):
    s["m"] = β1 * s["m"] + (1 - β1) * g
    s["v"] = β2 * s["v"] + (1 - β2) * g**2
    return θ - η / (np.sqrt(s["v"]) + ε) * np.where(s["m"] < 0, 0, s["m"])


# ------------------------------------------------------------ custom rules
#
# Two rules as an article prints them (recipes/article.md), to show how a rule
# is added, and by the plot why these two don't train.


def literal_rmsprop_rule(g, slots, *, t, learning_rate, beta_2, epsilon):
    """The mean of squares in the numerator: the gradient's sign is lost."""
    mean = beta_2 * slots["g"] + (1 - beta_2) * ops.square(g)
    v = slots["v"] + (ops.sqrt(mean) - slots["v"]) / t  # average of √g so far
    return -learning_rate * mean / (ops.sqrt(v) + epsilon), {"g": mean, "v": v}


class LiteralRMSprop(tf_effopt.Optimizer):
    """RMSprop as printed: every step lowers every weight."""

    rule = staticmethod(literal_rmsprop_rule)
    slots: ClassVar = {"g": "mean_square", "v": "average_root"}
    beta_2 = hyperparameters.DecayRate()
    epsilon = hyperparameters.Positive()

    def __init__(self, learning_rate=0.001, beta_2=0.9, epsilon=1e-7, **kwargs):
        super().__init__(learning_rate, **kwargs)
        self.beta_2 = beta_2
        self.epsilon = epsilon


def literal_adam_rule(g, slots, *, learning_rate, beta_1, beta_2, epsilon):
    """A "correction" that throws every negative moment away."""
    m = beta_1 * slots["m"] + (1 - beta_1) * g
    v = beta_2 * slots["v"] + (1 - beta_2) * ops.square(g)
    corrected = ops.where(m < 0, ops.zeros_like(m), m)
    return -learning_rate / (ops.sqrt(v) + epsilon) * corrected, {"m": m, "v": v}


class LiteralAdam(tf_effopt.Optimizer):
    """Adam as programmed there: weights fall or stay, and never rise."""

    rule = staticmethod(literal_adam_rule)
    slots: ClassVar = {"m": "momentum", "v": "velocity"}
    beta_1 = hyperparameters.DecayRate()
    beta_2 = hyperparameters.DecayRate()
    epsilon = hyperparameters.Positive()

    def __init__(
        self, learning_rate=0.001, beta_1=0.9, beta_2=0.999, epsilon=1e-7, **kwargs
    ):
        super().__init__(learning_rate, **kwargs)
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon


# ----------------------------------------------------------------- problem


@dataclasses.dataclass(frozen=True)
class Problem:
    """Data `X` of shape (examples, 4) and `y` of shape (examples, 1)."""

    X: np.ndarray
    y: np.ndarray

    @classmethod
    def make(cls, config: Config, condition: float) -> Problem:
        """Features whose scales differ, a noisy target with both signs."""
        rng = np.random.default_rng(config.seed)
        scales = np.geomspace(1, condition**-0.5, 4)
        # Orthogonal columns: the curvatures are exactly the scales' squares.
        X = np.linalg.qr(rng.normal(size=(config.examples, 4)))[0]
        X = X * np.sqrt(config.examples) * scales
        y = X @ THETA + 0.1 * rng.normal(size=config.examples)
        # Rounded once, so that float32 and float64 train on the same numbers.
        return cls(X.astype("float32"), y[:, None].astype("float32"))

    def loss(self, θ: np.ndarray) -> float:
        """Mean squared error on all data, in float64."""
        with np.errstate(over="ignore"):
            return float(np.mean((self.X @ θ - self.y.astype("float64")) ** 2))

    @property
    def minimum(self) -> float:
        return self.loss(np.linalg.lstsq(*self._float64(), rcond=None)[0])

    @property
    def largest_stable_rate(self) -> float:
        """2 / L, with L the largest curvature of the loss."""
        X, _ = self._float64()
        return 2 / np.linalg.eigvalsh(2 / len(X) * X.T @ X)[-1]

    def batches(self, size: int, seed: int) -> Iterator[tuple]:
        """All data in batches of `size`, in a fresh random order each epoch."""
        rng = np.random.default_rng(seed)
        while True:
            order = rng.permutation(len(self.y))
            for rows in np.split(order, range(size, len(order), size)):
                yield self.X[rows], self.y[rows]

    def _float64(self) -> tuple[np.ndarray, np.ndarray]:
        return self.X.astype("float64"), self.y.astype("float64")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One rule: its optimizer, its transcription, its data and its rate."""

    name: str
    make: Callable[..., keras.optimizers.Optimizer]
    transcription: Callable[..., np.ndarray]
    full_batch: bool
    learning_rate: float


def entries(config: Config) -> tuple[list[Entry], list[Entry]]:
    """The package's rules, and the literal ones."""
    η, adaptive = config.learning_rate, config.adaptive_learning_rate

    def uncorrected(rate: float) -> tf_effopt.Adam:
        return tf_effopt.Adam(rate, bias_correction=False)

    shipped = [
        Entry(
            "GradientDescent",
            tf_effopt.GradientDescent,
            numpy_gradient_descent,
            True,
            η,
        ),
        Entry("SGD", tf_effopt.SGD, numpy_gradient_descent, False, η),
        Entry("Adam", tf_effopt.Adam, numpy_adam, False, adaptive),
        Entry(
            "Adam, no bias correction",
            uncorrected,
            numpy_adam_uncorrected,
            False,
            adaptive,
        ),
        Entry("RMSprop", tf_effopt.RMSprop, numpy_rmsprop, False, adaptive),
    ]
    literal = [
        Entry(
            "literal RMSprop", LiteralRMSprop, numpy_literal_rmsprop, False, adaptive
        ),
        Entry("literal adam", LiteralAdam, numpy_literal_adam, True, adaptive),
    ]
    return shipped, literal


# ------------------------------------------------------------------ running


class Trainer:
    """A linear model of Keras and one optimizer, reset for each run.

    Every run starts at θ = 0. Changing the learning rate compiles nothing, so
    a whole sweep runs one compiled step.
    """

    def __init__(self, entry: Entry, problem: Problem, config: Config):
        self.entry, self.problem = entry, problem
        self.batch_size = config.examples if entry.full_batch else config.batch_size
        self.seed = config.seed
        dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
        self.model = keras.Sequential([keras.Input((problem.X.shape[1],)), dense])
        self.model.compile(optimizer=entry.make(entry.learning_rate), loss="mse")
        optimizer = self.model.optimizer
        optimizer.build(self.model.trainable_variables)
        self.variables = self.model.variables + optimizer.variables
        self.start = [np.array(ops.convert_to_numpy(v)) for v in self.variables]

    def run(self, steps: int, learning_rate: float) -> np.ndarray:
        """Trains; returns θ after each step, from the start on."""
        for variable, value in zip(self.variables, self.start, strict=True):
            variable.assign(value)
        self.model.optimizer.learning_rate = learning_rate
        path = [self.theta()]
        stop_at = EXPLODED * self.problem.loss(path[0])
        for X, y in self.batches(steps):
            self.model.train_on_batch(X, y)
            path.append(self.theta())
            # `not <`, since a loss that isn't a number is no loss, either.
            if not self.problem.loss(path[-1]) < stop_at:
                break
        return np.array(path)

    def transcribed(self, path: np.ndarray, learning_rate: float) -> np.ndarray:
        """The same run, by the formula in NumPy."""
        # As the optimizer keeps it, in the dtype of the weights.
        η = float(np.asarray(learning_rate, keras.config.floatx()))
        θ, state = np.zeros(path[0].shape), defaultdict(float)
        own = [θ]
        for t, (X, y) in enumerate(self.batches(len(path) - 1), start=1):
            X, y = X.astype("float64"), y.astype("float64")
            g = 2 / len(y) * X.T @ (X @ θ - y)
            θ = self.entry.transcription(θ, g, state, t, η)
            own.append(θ)
        return np.array(own)

    def range_test(self) -> LearningRateRangeTest:
        """The learning-rate range test, on the start's weights."""
        self.run(0, self.entry.learning_rate)
        # Full batches have no noise: above its limit, gradient descent starts to
        # diverge from rounding errors, which takes steps to show. 50 a decade do.
        test = LearningRateRangeTest(1e-4, 100.0, steps=300)
        self.model.fit(
            self.batches(test.steps),
            steps_per_epoch=test.steps,
            shuffle=False,  # The batches are shuffled.
            callbacks=[test],
            verbose=0,
        )
        return test

    def batches(self, steps: int) -> Iterator[tuple]:
        batches = self.problem.batches(self.batch_size, self.seed)
        yield from itertools.islice(batches, steps)  # `fit` takes generators only

    def theta(self) -> np.ndarray:
        return self.model.get_weights()[0].astype("float64")


def relative_difference(path: np.ndarray, own: np.ndarray) -> float:
    """The largest ‖θ − θ_NumPy‖ / ‖θ_NumPy‖ over all steps after the start."""
    difference = np.linalg.norm((path - own)[1:], axis=(1, 2))
    return float(np.max(difference / np.linalg.norm(own[1:], axis=(1, 2))))


def compare(trainer: Trainer, steps: int) -> dict[str, Any]:
    """Runs one rule at its rate, beside its transcription."""
    rate = trainer.entry.learning_rate
    began = time.perf_counter()
    path = trainer.run(steps, rate)
    seconds = time.perf_counter() - began
    own = trainer.transcribed(path, rate)
    return {
        "learning_rate": rate,
        "steps": len(path) - 1,
        "difference": relative_difference(path, own),
        "losses": [trainer.problem.loss(θ) for θ in path],
        "theta": path[..., 0].tolist(),
        "seconds": seconds,
    }


def sweep(trainer: Trainer, steps: int, rates: list[float]) -> dict[str, Any]:
    """The same number of steps at each learning rate."""
    losses = []
    for rate in rates:
        path = trainer.run(steps, rate)
        losses.append([trainer.problem.loss(θ) for θ in path])
    final = [run[-1] for run in losses]
    best = int(np.argmin(np.nan_to_num(final, nan=np.inf)))
    usable = [
        rate
        for rate, loss in zip(rates, final, strict=True)
        if loss < 2 * trainer.problem.minimum
    ]
    needed = [steps_to_minimum(run, trainer.problem.minimum) for run in losses]
    fastest = min(
        (i for i, n in enumerate(needed) if n is not None),
        key=lambda i: needed[i],
        default=best,
    )
    return {
        "learning_rates": rates,
        "final_losses": final,
        "best_rate": rates[best],
        "best_final_loss": final[best],
        "usable_rates": usable,
        "steps_needed": needed,
        "fastest_rate": rates[fastest],
        "fastest_steps": needed[fastest],
        "fastest_losses": losses[fastest],
    }


def steps_to_minimum(losses: list[float], minimum: float) -> int | None:
    """The step from which on the loss stays within 25 % of the minimum."""
    away = [i for i, loss in enumerate(losses) if not loss <= REACHED * minimum]
    first = away[-1] + 1 if away else 0
    return first if first < len(losses) else None


def answers(
    trainers: dict[str, Trainer], round_ones: dict[str, Trainer], config: Config
) -> dict[str, Any]:
    """What runs say to the article's three questions."""
    sweeps = {
        name: sweep(trainer, config.steps, SWEEP) for name, trainer in trainers.items()
    }
    return {
        "sweep": sweeps,
        "range_test": {
            name: _range_test_result(trainer, config)
            for name, trainer in trainers.items()
        },
        "largest_stable_rate": trainers["SGD"].problem.largest_stable_rate,
        "condition_1": {
            name: sweep(trainer, config.steps, SWEEP[2:])
            for name, trainer in round_ones.items()
        },
    }


def _range_test_result(trainer: Trainer, config: Config) -> dict[str, Any]:
    test = trainer.range_test()
    path = trainer.run(config.steps, test.suggestion)
    return {
        "learning_rates": test.learning_rates,
        "losses": test.losses,
        "suggestion": test.suggestion,
        "final_loss_there": trainer.problem.loss(path[-1]),
    }


# ------------------------------------------------------------------- output

COLORS = {
    "GradientDescent": "#4477AA",
    "SGD": "#66CCEE",
    "Adam": "#EE6677",
    "Adam, no bias correction": "#AA3377",
    "RMSprop": "#228833",
    "literal RMSprop": "#CCBB44",
    "literal adam": "#222222",
}


def plot_losses(results: dict, problem: Problem, path: Path) -> None:
    """Loss against step; the literal rules' losses; and their weights."""
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    shipped, literal, weights = figure.subplots(1, 3)
    for axes in (shipped, literal):
        _loss_axes(axes, "step")
        _minimum(axes, problem)
    for name, result in results.items():
        label = f"{name}, {result['learning_rate']:g}"
        if not name.startswith("literal"):
            _line(shipped, name, result["losses"], label)
    shipped.set_title("The four rules, and their learning rates")
    for name in ("Adam", "RMSprop", "literal adam", "literal RMSprop"):
        _line(literal, name, results[name]["losses"])
    literal.set_title("The literal forms don't train")
    literal.set_ylim(problem.minimum / 2, 30 * results["Adam"]["losses"][0])
    _plot_weights(weights, results)
    for axes in (shipped, literal, weights):
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def _plot_weights(axes: Axes, results: dict) -> None:
    """The paths of a weight whose best value is positive, and of a negative one."""
    up, down = int(np.argmax(THETA)), int(np.argmin(THETA))
    for name in ("Adam", "literal adam", "literal RMSprop"):
        θ = np.array(results[name]["theta"])
        _line(axes, name, θ[:, up])
        _line(axes, name, θ[:, down], label="_", linestyle=":")
    axes.plot([], [], ":", color="0.35", label="dotted: a weight that should fall")
    for best, side, offset in ((THETA[up], "bottom", 4), (THETA[down], "top", -4)):
        axes.axhline(best, color="0.5", linestyle="--", linewidth=1)
        axes.annotate(
            f"best value {best:g}",
            xy=(results["Adam"]["steps"], best),
            xytext=(0, offset),
            textcoords="offset points",
            ha="right",
            va=side,
            color="0.35",
            fontsize=9,
        )
    axes.set_ylim(2.2 * THETA.min(), 2.2 * THETA.max())
    axes.set_xlabel("step")
    axes.set_ylabel("weight")
    axes.set_title("Why: literal weights only fall")
    _tidy(axes)


def plot_answers(found: dict, problem: Problem, path: Path) -> None:
    """The learning rate decides; gradient descent and SGD; SGD and Adam."""
    figure = Figure(figsize=(12, 9), layout="constrained")
    (rates, test), (cost, scales) = figure.subplots(2, 2)
    _plot_sweep(rates, found, problem)
    _plot_range_tests(test, found)
    _plot_cost(cost, found)
    _plot_scales(scales, found)
    for axes in (rates, cost, scales):
        _minimum(axes, problem)
    for axes in (rates, test, cost, scales):
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def _plot_sweep(axes: Axes, found: dict, problem: Problem) -> None:
    _loss_axes(axes, "learning rate")
    axes.set_xscale("log")
    axes.set_ylabel(f"loss after {found['config']['steps']} steps")
    axes.set_title("The learning rate decides: a sweep")
    for name, result in found["sweep"].items():
        final = np.nan_to_num(result["final_losses"], nan=np.inf)
        x = result["learning_rates"]
        _line(axes, name, np.minimum(final, 1e9), x=x, marker="o", markersize=4)
    start = problem.loss(np.zeros((len(THETA), 1)))
    axes.set_ylim(problem.minimum / 2, 30 * start)
    limit = found["largest_stable_rate"]
    axes.axvline(limit, color="0.5", linestyle=":", label="2 / largest curvature")


def _plot_range_tests(axes: Axes, found: dict) -> None:
    _loss_axes(axes, "learning rate of the batch")
    axes.set_xscale("log")
    axes.set_ylabel("average loss")
    axes.set_title("Range tests; the dots are the suggested rates")
    for name, result in found["range_test"].items():
        _line(axes, name, result["losses"], x=result["learning_rates"])
        at = np.searchsorted(result["learning_rates"], result["suggestion"])
        axes.plot(result["suggestion"], result["losses"][at], "o", color=COLORS[name])


def _plot_cost(axes: Axes, found: dict) -> None:
    _loss_axes(axes, "rows of data read")
    axes.set_xscale("log")
    axes.set_title("Gradient descent and SGD, at their fastest rates")
    for name, rows in _rows_a_step(found).items():
        result = found["sweep"][name]
        x = rows * np.arange(len(result["fastest_losses"]))
        label = f"{name}, rate {result['fastest_rate']:.2g}, {rows} rows a step"
        _line(axes, name, result["fastest_losses"][1:], label, x=x[1:])
    axes.set_ylim(top=2)  # room for the legend


def _plot_scales(axes: Axes, found: dict) -> None:
    _loss_axes(axes, "step")
    axes.set_title("SGD and Adam, at their fastest rates")
    for name in ("SGD", "Adam"):
        for key, style in (("sweep", "-"), ("condition_1", ":")):
            result = found[key][name]
            condition = found["config"]["condition"] if key == "sweep" else 1
            label = f"{name}, {result['fastest_rate']:.2g}, condition {condition:g}"
            _line(axes, name, result["fastest_losses"], label, linestyle=style)


def _loss_axes(axes: Axes, x: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel("loss (mean squared error)")
    axes.set_yscale("log")
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _line(
    axes: Axes, name: str, losses: Any, label: str = "", x: Any = None, **style: Any
) -> None:
    x = range(len(losses)) if x is None else x
    style = {"linewidth": 1.8, "color": COLORS[name], "label": label or name} | style
    if name == "GradientDescent":  # SGD often lies upon it
        style |= {"linestyle": (0, (4, 2)), "zorder": 3}
    axes.plot(x, losses, **style)


def _minimum(axes: Axes, problem: Problem) -> None:
    axes.axhline(
        problem.minimum,
        color="0.5",
        linestyle="--",
        linewidth=1,
        label="least squares",
    )


def rules_table(results: dict, problem: Problem, bound: float) -> str:
    """Each rule's last loss, and how far it is from its formula."""
    lines = [f"{'rule':26}{'rate':>6}{'steps':>7}{'last loss':>11}{'difference':>12}"]
    for name, r in results.items():
        lines.append(
            f"{name:26}{r['learning_rate']:6.3g}{r['steps']:7d}"
            f"{r['losses'][-1]:11.4g}{r['difference']:12.1e}"
        )
    lines += [
        f"Least squares: loss {problem.minimum:.4g}. Difference: the largest",
        f"‖θ − θ_NumPy‖ / ‖θ_NumPy‖ of any step; allowed: {bound:.0e}.",
    ]
    return "\n".join(lines)


def answers_table(found: dict) -> str:
    """The answers to the article's questions."""
    return "\n".join(["", *_learning_rate_table(found), "", *_comparisons(found)])


def _learning_rate_table(found: dict) -> list[str]:
    lines = [
        "Why does the learning rate decide?",
        "  rule               best    loss  usable rates   range test    loss",
    ]
    for name, r in found["sweep"].items():
        t, usable = found["range_test"][name], r["usable_rates"] or [np.nan]
        lines.append(
            f"  {name:16}{r['best_rate']:7.2g}{r['best_final_loss']:8.4f}"
            f"{usable[0]:8.2g} to {usable[-1]:<5.2g}"
            f"{t['suggestion']:10.2g}{t['final_loss_there']:8.4f}"
        )
    limit = found["largest_stable_rate"]
    return [
        *lines,
        "Usable: the last loss is at most twice that of least squares. In theory,",
        f"gradient descent diverges above {limit:.2g}, 2 / largest curvature.",
    ]


def _comparisons(found: dict) -> list[str]:
    sweeps, round_ones = found["sweep"], found["condition_1"]
    lines = [
        "Gradient descent or SGD? To stay within 25 % of the least-squares loss, at",
        "each one's fastest rate of the sweep:",
    ]
    for name, rows in _rows_a_step(found).items():
        needed = sweeps[name]["fastest_steps"]
        read = "" if needed is None else f", {needed * rows:,} rows read"
        lines.append(f"  {name:16}{_steps(sweeps[name])}{read}")
    lines += ["SGD or Adam? The same, by how much the features' scales differ:"]
    for condition, results in (
        (found["config"]["condition"], sweeps),
        (1, round_ones),
    ):
        each = ", ".join(f"{n} {_steps(results[n])}" for n in ("SGD", "Adam"))
        lines.append(f"  condition {condition:<6g}{each}")
    return lines


def _steps(result: dict) -> str:
    needed = result["fastest_steps"]
    return "no rate got there" if needed is None else f"{needed} steps"


def _rows_a_step(found: dict) -> dict[str, int]:
    config = found["config"]
    return {"GradientDescent": config["examples"], "SGD": config["batch_size"]}


# --------------------------------------------------------------------- main


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the recipe; returns what it writes to metrics.json."""
    config = parse(arguments)
    began = time.perf_counter()
    use_dtype(config.dtype)
    keras.utils.set_random_seed(config.seed)
    problem = Problem.make(config, config.condition)
    shipped, literal = entries(config)
    trainers = {e.name: Trainer(e, problem, config) for e in shipped + literal}
    results = {name: compare(t, config.steps) for name, t in trainers.items()}
    bound = BOUNDS[config.dtype]
    print(rules_table(results, problem, bound), flush=True)
    check(results, bound)

    asked = ("GradientDescent", "SGD", "Adam", "RMSprop")
    easy = Problem.make(config, condition=1.0)
    round_ones = {
        name: Trainer(trainers[name].entry, easy, config) for name in ("SGD", "Adam")
    }
    found = answers({name: trainers[name] for name in asked}, round_ones, config)
    found["config"] = dataclasses.asdict(config) | {
        "output_dir": str(config.output_dir)
    }

    print(answers_table(found))
    metrics = {
        "rules": results,
        "answers": found,
        "least_squares_loss": problem.minimum,
        "bound": bound,
        "seconds": time.perf_counter() - began,
        "versions": _versions(),
    }
    write(metrics, problem, config)
    print(f"\n{metrics['seconds']:.0f} s. Plots and metrics.json: {config.output_dir}")
    return metrics


def check(results: dict, bound: float) -> None:
    """Ends the program if a rule left its formula."""
    wrong = [name for name, r in results.items() if not r["difference"] <= bound]
    if wrong:
        sys.exit(
            f"These rules left their formula by more than {bound:.0e}: "
            f"{', '.join(wrong)}. The table above tells how far."
        )


def use_dtype(name: str) -> None:
    """Makes it the dtype of weights, arithmetic and learning rates."""
    keras.config.set_floatx(name)
    keras.config.set_dtype_policy(name)  # Keras keeps an earlier one otherwise


def write(metrics: dict, problem: Problem, config: Config) -> None:
    """Writes metrics.json and the two plots."""
    folder = config.output_dir
    # JSON has no infinity: an overflowed loss becomes null.
    text = json.dumps(_without_infinities(metrics), indent=1)
    (folder / "metrics.json").write_text(text)
    plot_losses(metrics["rules"], problem, folder / "loss.png")
    plot_answers(metrics["answers"], problem, folder / "questions.png")


def parse(arguments: list[str] | None = None) -> Config:
    """Reads the command's options; a wrong one ends the program with usage."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for field in dataclasses.fields(Config):
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=type(field.default),
            default=field.default,
            help=HELP[field.name],
        )
    config = Config(**vars(parser.parse_args(arguments)))
    made = _make_folder(config.output_dir)
    for holds, expected in (
        (made, f"--output-dir {config.output_dir} can't be made"),
        (config.steps >= 2, "--steps must be at least 2"),
        (config.seed >= 0, "--seed must be at least 0"),
        (config.learning_rate > 0, "--learning-rate must be above 0"),
        (config.adaptive_learning_rate > 0, "--adaptive-learning-rate: above 0"),
        (config.examples >= 8, "--examples must be at least 8"),
        (1 <= config.batch_size <= config.examples, "--batch-size: 1 to --examples"),
        (config.condition >= 1, "--condition must be at least 1"),
        (config.dtype in BOUNDS, f"--dtype must be one of {', '.join(BOUNDS)}"),
    ):
        if not holds:
            parser.error(f"{expected}. Received: {' '.join(arguments or sys.argv[1:])}")
    return config


def _make_folder(folder: Path) -> bool:
    """Makes a folder before the work whose results go there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return True


def _versions() -> dict[str, str]:
    backend = keras.backend.backend()
    return {
        "tf_effopt": tf_effopt.__version__,
        "keras": keras.__version__,
        backend: sys.modules[backend].__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _without_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_infinities(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_infinities(v) for v in value]
    finite = not isinstance(value, float) or np.isfinite(value)
    return value if finite else None


if __name__ == "__main__":
    main()
