"""The learning-rate range test."""

from __future__ import annotations

import math
import numbers
import warnings
from pathlib import Path
from typing import Any

import keras

from tf_effopt.runtime import keras_hooks


class LearningRateRangeTest(keras.callbacks.Callback):
    """Finds a learning rate by a short run in which it grows batch by batch.

    Too low a rate learns nothing in the time, too high a one diverges; between
    them the loss falls. From `low` to `high` the rate grows by the same factor
    each batch. At the end weights, optimizer state, random seeds, metrics and
    learning rate are again what they were, bit for bit, so that training can
    start.

    The variant: Smith's test with the exponential growth that has become the
    practice (the paper's growth is linear); the loss is an exponential moving
    average, corrected for its start at 0, of each batch's own loss (`fit` logs
    the mean of the epoch so far; this callback resets the metrics each batch).

    Works with every optimizer of Keras and of this package whose learning rate
    is a number, inside a `LossScaleOptimizer`, under `tf.distribute`
    strategies that `fit` supports, and on Keras's TensorFlow, JAX and PyTorch
    backends. On JAX it makes `fit` hand its state over after each batch, which
    costs little but isn't free. With `compile(steps_per_execution=n)` a rate
    holds for n batches, and a step here is n batches.

    Keeps a copy of the model's and the optimizer's variables on the host.

    When not to use it: in the run that trains. It stops `fit`; other callbacks
    see its weights; a data iterator isn't wound back. The result holds for the
    batch size, the initial weights and the seconds of training that it saw:
    with warm-up or another batch size, test again or sweep.

    Reference: Smith, "Cyclical Learning Rates for Training Neural Networks",
    2017, https://arxiv.org/abs/1506.01186, §3.3

    Args:
        low: float above 0, the first learning rate.
        high: float above `low`, the last.
        steps: int of at least 2, the number of batches, and of rates. Where
            batches have no noise, as full ones, too high a rate takes many
            steps to show: there take 50 for each factor of 10 from `low` to
            `high`.
        smoothing: float in [0, 1), share of the average loss kept per batch.
        explosion: float above 1. The test stops when the average loss is above
            `explosion` times the best so far, or isn't finite. (For a negative
            best: above it by `explosion - 1` times its size.)

    Attributes:
        learning_rates: list of floats, the rates visited.
        losses: list of floats, the average loss after a batch at each rate.
        exploded: whether the loss exploded before `high`. Where it didn't, a
            higher rate might do, too.

    Raises:
        ValueError: an argument is out of its range; the optimizer's learning
            rate isn't a number; `fit` has fewer than `steps` batches.
        RuntimeError: another callback changes the learning rate, too.

    Example:

    >>> import keras, numpy as np, tf_effopt
    >>> x = np.random.default_rng(0).normal(size=(320, 3)).astype("float32")
    >>> y = x @ np.array([[1.0], [-2.0], [3.0]], "float32") + 0.1
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile(optimizer=tf_effopt.SGD(0.01), loss="mse")
    >>> test = tf_effopt.callbacks.LearningRateRangeTest(1e-4, 10, steps=60)
    >>> history = model.fit(x, y, epochs=6, verbose=0, callbacks=[test])
    >>> test.exploded, 0.005 < test.suggestion < 0.5
    (True, True)
    >>> model.optimizer.learning_rate = test.suggestion
    """

    def __init__(
        self,
        low: float = 1e-6,
        high: float = 10.0,
        steps: int = 100,
        smoothing: float = 0.8,
        explosion: float = 4.0,
    ):
        super().__init__()
        _check("low", low, _is_number(low) and low > 0, "a number above 0")
        _check("high", high, _is_number(high) and high > low, f"above low={low}")
        whole = isinstance(steps, numbers.Integral) and not isinstance(steps, bool)
        _check("steps", steps, whole and steps >= 2, "an integer of at least 2")
        inside = _is_number(smoothing) and 0 <= smoothing < 1
        _check("smoothing", smoothing, inside, "in [0, 1)")
        above = _is_number(explosion) and explosion > 1
        _check("explosion", explosion, above, "a number above 1")
        self.low = float(low)
        self.high = float(high)
        self.steps = int(steps)
        self.smoothing = float(smoothing)
        self.explosion = float(explosion)
        self._snapshot: list[tuple[Any, Any]] = []
        self._start()

    def _start(self) -> None:
        self.learning_rates: list[float] = []
        self.losses: list[float] = []
        self.exploded = False
        self._average = 0.0
        self._finished = False

    # ------------------------------------------------------------ in `fit`

    def on_train_begin(self, logs: dict | None = None) -> None:
        _check_learning_rate_is_a_number(self.model.optimizer)
        self._check_enough_batches()
        self._start()
        variables = self.model.variables + self.model.optimizer.variables
        # A copy: a backend's array may be a view of memory that training reuses.
        self._snapshot = [
            (v, keras.ops.convert_to_numpy(v.value).copy()) for v in variables
        ]

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        if self._finished:
            return
        # On JAX an assignment reaches `fit`'s loop only after the state was taken.
        keras_hooks.sync_state(self.model)
        self.model.reset_metrics()
        self.model.optimizer.learning_rate = self._rate(len(self.losses))

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if self._finished:
            return
        keras_hooks.sync_state(self.model)
        rate = self._rate(len(self.losses))
        self._check_rate_was(rate)
        if "loss" not in (logs or {}):
            self.restore()
            raise ValueError(
                "The learning-rate range test needs each batch's loss: a custom "
                "`train_step` must return it as 'loss'. Received: "
                f"{sorted(logs or {})}"
            )
        self._record(rate, float(logs["loss"]))
        if self.exploded or len(self.losses) == self.steps:
            self._finished = True
            self.model.stop_training = True

    def on_train_end(self, logs: dict | None = None) -> None:
        self.restore()
        if not self._finished:
            warnings.warn(
                f"The data ended after {len(self.losses)} of {self.steps} steps of "
                f"the learning-rate range test: no rate above "
                f"{self.learning_rates[-1] if self.losses else self.low:.3g} was "
                "tried. Pass `fit` more `epochs`, or the test fewer `steps`.",
                stacklevel=2,
            )

    def restore(self) -> None:
        """Puts back what the model and the optimizer were before the test.

        `fit` calls it at its end. Call it if `fit` was interrupted.
        """
        for variable, value in self._snapshot:
            variable.assign(value)
        self._snapshot = []

    def _rate(self, step: int) -> float:
        share = step / (self.steps - 1)
        return self.low * (self.high / self.low) ** share

    def _record(self, rate: float, loss: float) -> None:
        if not math.isfinite(loss):
            self.exploded = True
            return
        kept = self.smoothing
        self._average = kept * self._average + (1 - kept) * loss
        loss = self._average / (1 - kept ** (len(self.losses) + 1))
        self.learning_rates.append(rate)
        self.losses.append(loss)
        best = min(self.losses)
        self.exploded = loss > best + (self.explosion - 1) * abs(best)

    # -------------------------------------------------------------- results

    @property
    def suggestion(self) -> float:
        """A tenth of the rate at which the average loss was lowest.

        There, the loss still fell fast; the rate of the lowest loss itself is
        at the edge: the next rates raised the loss.

        Raises:
            RuntimeError: the test hasn't run, or the loss never fell.
        """
        if not self.losses:
            raise RuntimeError(
                "There is no suggestion yet: pass the test to `fit` first, "
                "`model.fit(..., callbacks=[test])`. If it ran, its first loss "
                f"wasn't finite: lower `low`. Received: low={self.low}"
            )
        lowest = self.losses.index(min(self.losses))
        if lowest == 0:
            raise RuntimeError(
                "The loss never fell below that of the first batch, so there is "
                "no rate to suggest. Lower `low`, or raise `steps` so that each "
                f"rate has more batches. Received: low={self.low}, "
                f"steps={self.steps}"
            )
        return self.learning_rates[lowest] / 10

    def plot(self, path: str | Path) -> Path:
        """Draws the average loss against the learning rate into a file.

        Args:
            path: where to write it; its suffix is the format: `.png` (also
                without one), `.svg`.

        Returns:
            The path.

        Raises:
            RuntimeError: the test hasn't run, or the loss never fell.
            ImportError: matplotlib isn't installed.
        """
        suggestion = self.suggestion
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError(
                "`plot` needs matplotlib: `pip install matplotlib`. Without it, "
                "read `learning_rates` and `losses`."
            ) from None
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.plot(self.learning_rates, self.losses, linewidth=2)
        axes.axvline(
            suggestion,
            color="0.4",
            linestyle="--",
            label=f"suggestion {suggestion:.2g}",
        )
        axes.set_xscale("log")
        if min(self.losses) > 0:
            axes.set_yscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("average loss")
        axes.set_title("Learning-rate range test")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        path = Path(path)
        path = path if path.suffix else path.with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        return path

    # --------------------------------------------------------------- checks

    def _check_enough_batches(self) -> None:
        epochs, batches = self.params.get("epochs"), self.params.get("steps")
        if not epochs or not batches:
            return  # Data of unknown length: `on_train_end` tells.
        a_step = getattr(self.model, "steps_per_execution", 1)
        available = epochs * math.ceil(batches / a_step)
        if available < self.steps:
            raise ValueError(
                f"The learning-rate range test takes {self.steps} steps"
                + (f" of {a_step} batches" if a_step > 1 else "")
                + f", but this `fit` has {available}. Pass "
                f"`epochs={math.ceil(epochs * self.steps / available)}` to `fit` "
                f"or `steps={available}` to the test."
            )

    def _check_rate_was(self, rate: float) -> None:
        now = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))
        if not math.isclose(now, rate, rel_tol=1e-6):
            raise RuntimeError(
                "The learning rate changed during a batch of the learning-rate "
                "range test. Leave out other callbacks that set it, such as "
                f"LearningRateScheduler. Expected: {rate:.6g}. Received: {now:.6g}."
            )


def _check_learning_rate_is_a_number(optimizer: Any) -> None:
    innermost = optimizer
    while hasattr(innermost, "inner_optimizer"):
        innermost = innermost.inner_optimizer
    rate = getattr(innermost, "_learning_rate", None)
    if isinstance(innermost, keras.optimizers.MultiOptimizer):
        received = "a MultiOptimizer, which has one learning rate per part"
    elif isinstance(rate, keras.Variable):
        return
    else:
        received = f"{type(innermost).__name__} with a {type(rate).__name__}"
    raise ValueError(
        "The learning-rate range test needs an optimizer whose learning rate is a "
        "number, since it sets it. For the test, `compile` with a number such as "
        f"`learning_rate=1e-3`, then again as before. Received: {received}."
    )


def _is_number(value: Any) -> bool:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and math.isfinite(value)


def _check(name: str, value: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"`{name}` must be {expected}. Received: {name}={value!r}")
