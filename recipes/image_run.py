"""A run's folder: what is saved after each epoch, and the results at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

import tf_effopt
from recipes import checkpoint
from recipes.command_line import UsageError
from recipes.preemption import Preempted
from tf_effopt.runtime.keras_hooks import sync_state


class TrainingFailed(Exception):
    """Training can't go on; what was saved before stands."""


@dataclasses.dataclass(frozen=True)
class Devices:
    """What a run is on: it may go on elsewhere.

    Attributes:
        name: of the strategy, as on the command line.
        strategy: of `tf.distribute`.
    """

    name: str
    strategy: tf.distribute.Strategy

    @property
    def is_chief(self) -> bool:
        """Whether this process writes files; one of several workers does."""
        return self.strategy.extended.should_checkpoint

    @property
    def replicas(self) -> int:
        on_jax = keras.distribution.distribution()
        if on_jax is not None:
            return on_jax.device_mesh.devices.size
        return self.strategy.num_replicas_in_sync

    @property
    def several_workers(self) -> bool:
        return self.strategy.extended._in_multi_worker_mode()

    def agree_on(self, number: int) -> bool:
        """Whether all workers have this same number, below a million."""
        if not self.several_workers:
            return True
        x = [number, number**2]
        each = self.strategy.experimental_distribute_values_from_function(
            lambda _: tf.constant(x, tf.float64)
        )

        @tf.function
        def sums() -> tf.Tensor:
            def summed(mine: tf.Tensor) -> tf.Tensor:
                return tf.distribute.get_replica_context().all_reduce("SUM", mine)

            return self.strategy.run(summed, args=(each,))

        total, squares = self.strategy.experimental_local_results(sums())[0].numpy()
        # Equal exactly where all numbers are (Cauchy and Schwarz).
        return total**2 == squares * self.replicas

    def meet(self) -> None:
        """Waits until all workers are here."""
        self.agree_on(0)


# What is read of an epoch's record, and of a finished run's results.
RECORD = {"epoch": int} | dict.fromkeys(
    ("loss", "accuracy", "val_loss", "val_accuracy", "learning_rate", "seconds"), float
)
RESULTS = {
    "configuration": dict,
    "accuracy": float,
    "validation_examples": int,
    "steps": int,
    "seconds": float,
}


@dataclasses.dataclass
class Progress:
    """How far a run is; part of its checkpoint.

    Attributes:
        history: of each epoch its number, metrics, learning rate and seconds.
        batches: those done of the next epoch, if it was broken off.
        best: the highest validation accuracy so far, for early stopping.
        waited: epochs since then.
        stopped: whether training ended early.
    """

    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    batches: int = 0
    best: float = -1.0
    waited: int = 0
    stopped: bool = False

    @classmethod
    def read(cls, saved: Any) -> Progress:
        """Returns what a checkpoint's header holds.

        Raises:
            ValueError: it is that of another program, or of another version.
        """
        kinds = {name: type(x) for name, x in dataclasses.asdict(cls()).items()}
        checkpoint.check_parts(saved, kinds)
        for record in saved["history"]:
            checkpoint.check_parts(record, RECORD)
        if unknown := sorted(saved.keys() - kinds.keys()):
            raise ValueError(f"its progress has an unknown part {unknown[0]!r}")
        return cls(**saved)

    def __str__(self) -> str:
        more = f" and {self.batches} batches" if self.batches else ""
        return f"epoch {len(self.history)}{more}"


class Run:
    """The files of a run, and its state between two epochs.

    Args:
        folder: for all of its files.
        configuration: all that decides on the result, as JSON can hold it.
    """

    def __init__(self, folder: Path, configuration: dict[str, Any]):
        self.folder = folder
        self.configuration = json.loads(json.dumps(configuration))
        self.checkpoint = folder / "checkpoint.npz"
        self.metrics = folder / "metrics.json"
        self.curves = folder / "curves.png"
        self.model = folder / "model.keras"
        self.logs = folder / "tensorboard"
        self.progress = Progress()
        self.best_weights: dict[str, np.ndarray] = {}
        self.metrics_so_far: dict[str, np.ndarray] = {}  # of an epoch broken off
        self.saved: dict[str, np.ndarray] = {}
        self.devices = Devices("none", tf.distribute.get_strategy())

    @property
    def epochs(self) -> int:
        return len(self.progress.history)

    def is_left(self, epochs: int) -> bool:
        """Whether training isn't through, of so many epochs."""
        return self.epochs < epochs and not self.progress.stopped

    def clear(self) -> None:
        """Deletes the files that a run writes, and nothing else.

        Raises:
            UsageError: one of them can't be deleted.
        """
        if not self.devices.is_chief:
            return
        for path in (self.metrics, self.checkpoint, self.curves, self.model):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise UsageError(
                    f"--overwrite can't delete {path} ({error.strerror}). Move it "
                    "away, or pass another --output-dir."
                ) from error

    def finished(self) -> dict[str, Any] | None:
        """The results, if this run is through: they are written last.

        None, too, if the model or the curves were deleted since then and there is the
        checkpoint to make them from.
        """
        if not self.metrics.exists():
            return None
        try:
            results = json.loads(self.metrics.read_text())
            checkpoint.check_parts(results, RESULTS)
        except (OSError, ValueError) as error:
            raise checkpoint.unreadable(
                self.metrics, "the results of a run", error
            ) from error
        checkpoint.check_same_run(
            self.metrics, results["configuration"], self.configuration
        )
        whole = self.model.exists() and self.curves.exists()
        return results if whole or not self.checkpoint.exists() else None

    def standing(self) -> str:
        """Says what the checkpoint's file holds.

        Which may be less than `progress`: a write may have been broken off, or another
        worker's, and before `restore` the file may hold more.
        """
        try:
            saved = self._read()
        except checkpoint.CheckpointError as error:
            return str(error)
        if saved is None:
            return "There is no checkpoint yet."
        return f"The checkpoint of {saved[1]} stands: {self.checkpoint}"

    def _read(self) -> tuple[dict[str, Any], Progress, dict[str, np.ndarray]] | None:
        """Returns the checkpoint's configuration, progress and arrays."""
        saved = checkpoint.read(self.checkpoint)
        if saved is None:
            return None
        header, arrays = saved
        try:
            checkpoint.check_parts(header, {"configuration": dict, "progress": dict})
            progress = Progress.read(header["progress"])
        except ValueError as error:
            raise checkpoint.unreadable(
                self.checkpoint, "a checkpoint", error
            ) from error
        return header["configuration"], progress, arrays

    def restore(self, model: keras.Model) -> None:
        """Takes up what the checkpoint holds, if there is one."""
        if not self.devices.agree_on(checkpoint.fingerprint(self.checkpoint)):
            raise checkpoint.CheckpointError(
                f"The workers don't find the same checkpoint in {self.folder}: "
                "--output-dir must be one folder that all of them share, such as a "
                "network disk. Received: --output-dir on this worker with "
                f"{self.checkpoint.name if self.checkpoint.exists() else 'none'}."
            )
        saved = self._read()
        if saved is None:
            return
        configuration, self.progress, arrays = saved
        checkpoint.check_same_run(self.checkpoint, configuration, self.configuration)
        self.best_weights = _taken(arrays, "best/")
        self.metrics_so_far = _taken(arrays, "metrics/")
        checkpoint.restore(checkpoint.training_state(model), arrays)

    def save(self, model: keras.Model) -> None:
        header = {
            "configuration": self.configuration,
            "progress": dataclasses.asdict(self.progress),
        }
        # On all workers: some values are sums over them.
        self.saved = checkpoint.values(checkpoint.training_state(model))
        arrays = dict(self.saved)
        arrays |= {f"best/{k}": v for k, v in self.best_weights.items()}
        if self.progress.batches:
            arrays |= checkpoint.values(checkpoint.metrics_state(model))
        if self.devices.is_chief:
            with writing(self.checkpoint):
                checkpoint.write(self.checkpoint, header, arrays)

    def take_up_saved(self, model: keras.Model) -> None:
        """Takes up what was saved last, from memory: it may not be on disk yet."""
        checkpoint.restore(checkpoint.training_state(model), self.saved)

    def write_results(
        self, model: keras.Model, measured: dict[str, Any]
    ) -> dict[str, Any]:
        """Writes the model, the curves and, last, metrics.json; returns the latter."""
        history = self.progress.history
        results = {
            **measured,
            "steps": int(_number(model.optimizer.iterations)),
            "epochs": len(history),
            "seconds": sum(epoch["seconds"] for epoch in history),
            "parameters": model.count_params(),
            "history": history,
            "configuration": self.configuration,
            "strategy": self.devices.name,
            "replicas": self.devices.replicas,
            "versions": versions(),
            "hardware": hardware(),
        }
        if not self.devices.is_chief:
            return results
        for path, write in (
            (self.model, model.save),
            (self.curves, lambda aside: plot(history, aside)),
            (self.metrics, lambda x: x.write_text(json.dumps(results, indent=2))),
        ):
            with writing(path), checkpoint.written_aside(path) as aside:
                write(aside)
        return results


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within, an error is that of writing a file: there is no space, say."""
    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        # TensorFlow says around it which of its operations this was.
        why = re.sub(r"\{\{.*?\}\} | \[Op:.*", "", str(error))
        raise TrainingFailed(
            f"{path} can't be written ({why}). Fix that, and run the same command "
            "again to go on."
        ) from error


class Saving(keras.callbacks.Callback):
    """Records epochs, stops early if asked to, and saves the checkpoint.

    Args:
        run: whose checkpoint it is.
        patience: epochs without a better accuracy to wait for; None: no early stop.
        is_time_to_save: called after each batch: whether to save and end now.
    """

    def __init__(
        self, run: Run, patience: int | None, is_time_to_save: Callable[[], bool]
    ):
        super().__init__()
        self.run, self.patience = run, patience
        self.is_time_to_save = is_time_to_save
        self.ends = False

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        if self.run.devices.is_chief:
            with writing(self.run.logs):
                history = self.run.progress.history
                self.curves = TensorBoardCurves(self.run.logs, history)
        self.started = time.perf_counter()
        self.before = self.run.progress.batches

    def on_train_batch_end(
        self, batch: int, logs: dict[str, float] | None = None
    ) -> None:
        if self.run.metrics_so_far:
            sync_state(self.model)
            state = checkpoint.metrics_state(self.model)
            so_far = {f"metrics/{k}": v for k, v in self.run.metrics_so_far.items()}
            checkpoint.check_fit(state, so_far)
            for name, value in so_far.items():
                self._add(state[name], value)
            self.run.metrics_so_far = {}
        self.ends = self.ends or self.is_time_to_save()
        if self.ends and batch + 1 < self.params["steps"]:
            self.run.progress.batches = self.before + batch + 1
            sync_state(self.model)
            self.run.save(self.model)
            raise Preempted

    def _add(self, variable: keras.Variable, value: np.ndarray) -> None:
        """Adds to what a metric has summed up, on one of the replicas."""
        if keras.backend.backend() == "jax":
            variable.assign(variable + value)
        elif self.run.devices.is_chief:
            local = self.run.devices.strategy.experimental_local_results
            local(variable.value)[0].assign_add(value)

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        if not math.isfinite(logs["loss"]):
            raise TrainingFailed(
                f"The loss is {logs['loss']} in epoch {epoch + 1}. Try a lower "
                "--learning-rate, with another --output-dir or --overwrite."
            )
        now = time.perf_counter()
        record = {
            "epoch": epoch + 1,
            **{name: float(value) for name, value in logs.items()},
            "learning_rate": _number(self.model.optimizer.learning_rate),
            "seconds": now - self.started,
        }
        self.started = now
        self.run.progress.history.append(record)
        self.run.progress.batches = 0
        if self.patience is not None:
            self._stop_early(self.run.progress, record["val_accuracy"])
        self.run.save(self.model)
        if self.run.devices.is_chief:
            with writing(self.run.logs):
                self.curves.add(record)
        if self.ends:
            raise Preempted

    def _stop_early(self, progress: Progress, accuracy: float) -> None:
        progress.waited += 1
        if accuracy > progress.best:
            progress.best, progress.waited = accuracy, 0
            weights = checkpoint.model_state(self.model)
            self.run.best_weights = checkpoint.values(weights)
        if progress.waited >= self.patience:
            progress.stopped = self.model.stop_training = True


class TensorBoardCurves:
    """TensorBoard's files, written without the `tensorboard` package.

    They are written anew from the history whenever a run is taken up: no epoch
    stands in them twice, none is missing.
    """

    def __init__(self, folder: Path, history: list[dict[str, float]]):
        for path in folder.glob("*/events.out.tfevents.*"):
            path.unlink()
        self.writers = {
            name: tf.summary.create_file_writer(str(folder / name))
            for name in ("train", "validation")
        }
        for record in history:
            self.add(record)

    def add(self, record: dict[str, float]) -> None:
        metadata = tf.compat.v1.SummaryMetadata(
            plugin_data={"plugin_name": "scalars"}, data_class="DATA_CLASS_SCALAR"
        )
        for name, value in record.items():
            if name in ("epoch", "seconds"):
                continue
            writer = self.writers["validation" if name.startswith("val_") else "train"]
            tag = "epoch_" + name.removeprefix("val_")
            with writer.as_default(step=record["epoch"]):
                tf.summary.write(tag, np.float32(value), metadata=metadata)
        for writer in self.writers.values():
            writer.flush()


def plot(history: list[dict[str, float]], path: Path) -> None:
    """Draws loss and accuracy against the epoch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    epochs = [record["epoch"] for record in history]
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for key, label in ((name, "training"), (f"val_{name}", "validation")):
            values = [record[key] for record in history]
            axes.plot(epochs, values, marker=".", label=label)
        axes.set(xlabel="epoch", ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def _taken(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Takes the arrays of a prefix out, under their names without it."""
    names = [name for name in arrays if name.startswith(prefix)]
    return {name.removeprefix(prefix): arrays.pop(name) for name in names}


def _number(variable: Any) -> float:
    return float(keras.ops.convert_to_numpy(variable))  # mirrored, too


def versions() -> dict[str, str]:
    modules = (tf_effopt, keras, tf, tfds, np)
    found = {module.__name__: module.__version__ for module in modules}
    found["backend"] = keras.backend.backend()
    return {"python": platform.python_version(), **found}


def hardware() -> dict[str, Any]:
    return {
        "machine": platform.machine(),
        "cpu_cores": os.cpu_count(),
        "gpus": len(tf.config.list_physical_devices("GPU")),
    }
