"""Trains an image classifier with an optimizer of tf_effopt.

    python recipes/image_classification.py
    python recipes/image_classification.py --dataset fashion_mnist --model resnet
    python recipes/image_classification.py --optimizer SGD --set momentum=0.9
    python recipes/image_classification.py --strategy mirrored --replicas 2
    python -m tf_effopt.distribute.launch --workers 2 recipes/image_classification.py --strategy multi_worker

The first trains on scikit-learn's handwritten digits, without any download.
Another dataset is prepared by TensorFlow Datasets, from the internet or, with
`--data-dir`, from a folder where it is prepared already or that has the files
which TFDS would download.

The same command goes on after an interruption, of whatever kind, and ends with
the same bits: after each epoch one file, checkpoint.npz, holds all there is.
`python tests/resume_kills.py --kills 20` checks it.

Measured: Python 3.11, TensorFlow 2.21.0 (tensorflow-cpu), Keras 3.15.1,
TensorFlow Datasets 4.9.10; 2 CPU cores (AMD EPYC with AVX-512 and bfloat16).
Accuracy is that of the last epoch's weights on images that weren't trained on:
digits' 360, Fashion-MNIST's test split of 10,000, whose result chose neither an
epoch nor anything else in a run.

    dataset       model   precision       strategy  n  accuracy, mean [range]  seconds
    digits         mlp     float32         none      3  98.43 % [98.33, 98.61]  3-4
    digits         cnn     float32         none      3  98.89 % [98.61, 99.17]  5-6
    digits         resnet  float32         none      3  99.91 % [99.72, 100.0]  9-12
    fashion_mnist  cnn     float32         none      1  91.89 %                 51
    fashion_mnist  cnn     mixed_float16   none      1  91.90 %                 148
    fashion_mnist  cnn     float32         mirrored  1  91.93 %                 63
    fashion_mnist  cnn     mixed_bfloat16  none      1  91.75 %                 41

by `--dataset`, `--model`, `--precision` and `--strategy` as in the line (seeds 0, 1
and 2 where n is 3, else 0), all else by default.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")  # or jax; data are TensorFlow's
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# So that this file runs as a script and as a module.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import keras
import tensorflow as tf

import tf_effopt
from recipes import checkpoint, image_data, image_models, preemption
from recipes.command_line import (
    UsageError,
    flag,
    make_optimizer,
    optimizer_class,
    option,
    parse,
)
from recipes.image_run import Devices, Run, Saving, TrainingFailed

FAILED, MISUSED, INTERRUPTED, PREEMPTED = 1, 2, 130, 143  # exit codes


@dataclasses.dataclass(frozen=True)
class Config:
    """The options; each field is one `--option` of the command line."""

    dataset: str = option(
        "digits", "digits, fashion_mnist, cifar10, or another image set of TFDS"
    )
    data_dir: str | None = option(
        None, "folder of prepared TFDS sets, or of the set's manual files"
    )
    image_size: int | None = option(None, "scale images to this height and width")
    augmentation: str = option(
        "auto", "random shifts and flips, where usual", choices=("auto", "none")
    )
    model: str = option("cnn", "the network", choices=("mlp", "cnn", "resnet"))
    optimizer: str = option("AdamW", "any optimizer of tf_effopt")
    set: tuple[str, ...] = option(
        (),
        "an argument of the optimizer, as beta_2=0.99; may be repeated",
        metavar="KEY=VALUE",
    )
    learning_rate: float | None = option(None, "the peak; None: see LEARNING_RATES")
    schedule: str = option("cosine", "after warm-up", choices=("constant", "cosine"))
    warmup: float = option(0.05, "share of the steps in which the rate rises")
    epochs: int | None = option(None, "passes over the data; None: see EPOCHS")
    batch_size: int | None = option(None, "over all replicas; None: see BATCH_SIZES")
    early_stopping: int | None = option(
        None,
        "stop after so many epochs without a better validation accuracy, and keep "
        "the best weights",
        metavar="PATIENCE",
    )
    strategy: str = option(
        "none",
        "tf.distribute's; with KERAS_BACKEND=jax: data_parallel, on all devices",
        choices=("auto", "none", "mirrored", "multi_worker", "tpu", "data_parallel"),
    )
    replicas: int | None = option(
        None, "with mirrored; None: all GPUs, or 2 logical CPU devices"
    )
    tpu: str = option("local", "with tpu: its name, or local on a TPU VM")
    precision: str = option(
        "float32",
        "of the layers' arithmetic; weights stay float32",
        choices=("float32", "mixed_bfloat16", "mixed_float16"),
    )
    seed: int = option(0, "of everything random")
    output_dir: str | None = option(None, "None: runs/<dataset>-<model>-<optimizer>")
    overwrite: bool = option(False, "start anew, whatever the output folder holds")

    def computation(self) -> dict[str, Any]:
        """What a run must share to be taken up again: all but places and devices."""
        free = ("data_dir", "output_dir", "overwrite", "strategy", "replicas", "tpu")
        fields = dataclasses.asdict(self)
        return {name: fields[name] for name in fields if name not in free}


# Defaults that do well on 2 CPU cores; other sets get the last argument of `get`
# in `resolved`, other optimizers their own default.
EPOCHS = {"digits": 30, "fashion_mnist": 6}
BATCH_SIZES = {"digits": 32}
LEARNING_RATES = {"Adam": 2e-3, "AdamW": 2e-3, "SGD": 0.1, "GradientDescent": 0.1}
AUGMENTATIONS = {
    "digits": image_data.Augmentation(shift=1),
    "mnist": image_data.Augmentation(shift=2),
    "fashion_mnist": image_data.Augmentation(shift=1, flip=True),
    "cifar10": image_data.Augmentation(shift=4, flip=True),
    "cifar100": image_data.Augmentation(shift=4, flip=True),
}


def resolved(config: Config) -> Config:
    """Fills in what depends on the dataset and the optimizer, and checks all.

    Raises:
        UsageError: a value is out of its range.
    """
    arguments = inspect.signature(optimizer_class(config.optimizer)).parameters
    own_rate = arguments["learning_rate"].default
    name = f"{config.dataset}-{config.model}-{config.optimizer}".replace("/", "_")
    defaults = {
        "epochs": EPOCHS.get(config.dataset, 20),
        "batch_size": BATCH_SIZES.get(config.dataset, 128),
        "learning_rate": LEARNING_RATES.get(config.optimizer, own_rate),
        "output_dir": str(Path("runs", name)),
    }
    unset = {k: v for k, v in defaults.items() if getattr(config, k) is None}
    config = dataclasses.replace(config, **unset)
    for field in ("epochs", "batch_size", "replicas", "image_size", "early_stopping"):
        value = getattr(config, field)
        if value is not None and value < 1:
            raise UsageError(f"{flag(field)} must be at least 1. Received: {value}")
    if not 0 <= config.warmup <= 1:
        raise UsageError(f"--warmup must be in [0, 1]. Received: {config.warmup}")
    if not 0 <= config.seed < 2**31:
        raise UsageError(f"--seed must be in [0, 2**31). Received: {config.seed}")
    if config.replicas is not None and config.strategy != "mirrored":
        raise UsageError(
            f"--replicas needs --strategy mirrored. Received: {config.replicas}"
        )
    return config


# ------------------------------------------------------------------ training


def train(config: Config, run: Run) -> dict[str, Any]:
    """Trains, from the checkpoint if there is one; returns the results."""
    keras.backend.clear_session()
    strategy = make_strategy(config)  # devices can't be split later
    run.devices = Devices(config.strategy, strategy)
    check_shares(config.batch_size, run.devices)
    keras.config.set_dtype_policy(config.precision)
    # The optimizer checks its arguments itself, before any data is read.
    make_optimizer(config.optimizer, config.learning_rate, config.set)
    data = image_data.load(config.dataset, config.data_dir, config.image_size)
    steps_per_epoch = len(data.train_images) // config.batch_size
    if not steps_per_epoch:
        raise UsageError(
            f"--batch-size must be at most {len(data.train_images)}, the number of "
            f"training images. Received: {config.batch_size}"
        )
    # A resumed run is to end with the very bits of an uninterrupted one. Seeded
    # here, since preparing the data may have drawn random numbers.
    keras.utils.set_random_seed(config.seed)
    tf.config.experimental.enable_op_determinism()
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output-dir can't be made: {error}") from error
    with strategy.scope():
        model = make_model(config, data, steps_per_epoch)
        if config.overwrite:
            run.clear()
        else:
            run.restore(model)
    validation = image_data.validation_batches(data, run.devices.replicas)
    try:
        fit(config, run, model, data, validation)
    except preemption.Preempted:
        run.devices.meet()  # the chief may still be writing the checkpoint
        raise
    loss, accuracy = model.evaluate(validation, verbose=0)
    measured = {
        "accuracy": accuracy,
        "loss": loss,
        "train_examples": len(data.train_images),
        "validation_examples": len(data.validation_images),
        "validation_split": data.validation_split,
    }
    return run.write_results(model, measured)


def make_model(
    config: Config, data: image_data.ImageData, steps_per_epoch: int
) -> keras.Model:
    """Returns a model that is built and compiled, its optimizer's state made."""
    several = tf.distribute.get_strategy().num_replicas_in_sync > 1
    model = image_models.make(config.model, data, synchronized=several)
    optimizer = make_optimizer(
        config.optimizer, learning_rate(config, steps_per_epoch), config.set, model
    )
    if config.precision == "mixed_float16":
        optimizer = tf_effopt.LossScaleOptimizer(optimizer)
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=compiles_steps(several),
    )
    optimizer.build(model.trainable_variables)
    return tf_effopt.distribute.prepare(model)


def compiles_steps(several: bool) -> bool | str:
    """Whether Keras's trainer is to compile its steps.

    TensorFlow's TPU wheel can't compile for the host, nor Keras's trainer for several
    replicas; the optimizer compiles its update where that can be done.
    """
    if keras.backend.backend() == "jax":
        return "auto"
    return bool(tf.config.list_physical_devices("GPU")) and not several


def learning_rate(config: Config, steps_per_epoch: int) -> Any:
    """Linear warm-up to the peak, then constant, or a half cosine wave down to 0."""
    peak, steps = config.learning_rate, config.epochs * steps_per_epoch
    warmup_steps = min(round(config.warmup * steps), steps - 1)
    if config.schedule == "constant" and not warmup_steps:
        return peak
    rise = {"warmup_target": peak, "warmup_steps": warmup_steps} if warmup_steps else {}
    return keras.optimizers.schedules.CosineDecay(
        # At 0, the first step would be none.
        initial_learning_rate=peak / (warmup_steps + 1) if rise else peak,
        decay_steps=steps - warmup_steps,
        alpha=1.0 if config.schedule == "constant" else 0.0,  # share kept at the end
        **rise,
    )


def fit(
    config: Config,
    run: Run,
    model: keras.Model,
    data: image_data.ImageData,
    validation: tf.data.Dataset,
) -> None:
    """Trains for the epochs that are left."""
    if run.epochs or run.progress.batches:
        print(f"Going on after {run.progress} of {run.checkpoint}", flush=True)
    augmentation = image_data.Augmentation()
    if config.augmentation == "auto":
        augmentation = AUGMENTATIONS.get(config.dataset, augmentation)
    steps_per_epoch = len(data.train_images) // config.batch_size
    # Without a terminal, a bar is a flood of control characters.
    verbose = 1 if sys.stdout.isatty() else 2
    if not run.is_left(config.epochs):  # killed after the last epoch, before the end
        model.optimizer.finalize_variable_values(model.trainable_variables)
    with preemption.watched(run.devices.strategy) as is_time_to_save:
        while run.is_left(config.epochs):
            done = run.progress.batches  # of an epoch that was broken off
            left = range(run.epochs, run.epochs + 1 if done else config.epochs)
            model.fit(
                image_data.training_batches(
                    data, augmentation, config.batch_size, config.seed, left, done
                ),
                initial_epoch=left.start,
                epochs=left.stop,
                steps_per_epoch=steps_per_epoch - done,
                validation_data=validation,
                callbacks=[
                    tf_effopt.callbacks.EvaluationWeights(),
                    Saving(run, config.early_stopping, is_time_to_save),
                ],
                shuffle=False,  # the dataset does it
                verbose=verbose if run.devices.is_chief else 0,
            )
            if is_time_to_save():  # since the last epoch was saved
                raise preemption.Preempted
            if run.is_left(config.epochs):
                run.take_up_saved(model)  # `fit` ends with weights to be evaluated
    if run.best_weights:
        checkpoint.restore(checkpoint.model_state(model), run.best_weights)


def check_backend(backend: str, strategy: str) -> None:
    """Raises `UsageError` if the recipe has no such strategy on Keras's backend."""
    if backend not in ("tensorflow", "jax"):
        # Only on these two is an epoch that was broken off taken up to the same bits.
        raise UsageError(
            f"KERAS_BACKEND must be tensorflow or jax. Received: {backend}"
        )
    on_jax = backend == "jax"
    if on_jax != (strategy == "data_parallel") and strategy != "none":
        raise UsageError(
            "With KERAS_BACKEND=jax --strategy is none or data_parallel, with "
            "tensorflow any but the latter. Received: --strategy "
            f"{strategy} with {backend}"
        )


class DataParallel(keras.distribution.DataParallel):
    """Keras's, but each device gets the whole of a batch that can't be shared out."""

    def get_data_layout(self, data_shape: Sequence[int]) -> Any:
        if data_shape[0] % self.device_mesh.devices.size == 0:
            return super().get_data_layout(data_shape)
        whole = [None] * len(data_shape)
        return keras.distribution.TensorLayout(whole, self.device_mesh)


def check_shares(batch_size: int, devices: Devices) -> None:
    """Raises `UsageError` if Keras's data parallelism can't share out a batch."""
    if devices.name == "data_parallel" and batch_size % devices.replicas:
        raise UsageError(
            "With --strategy data_parallel --batch-size must be a multiple of "
            f"{devices.replicas}, the number of devices. Received: {batch_size}"
        )


def make_strategy(config: Config) -> tf.distribute.Strategy:
    """The strategy of that name; of logical CPU devices where there is no GPU."""
    check_backend(keras.backend.backend(), config.strategy)
    if keras.backend.backend() == "jax":
        # Keras itself shards batches; TensorFlow only feeds them.
        several = config.strategy == "data_parallel"
        keras.distribution.set_distribution(DataParallel() if several else None)
        return tf.distribute.get_strategy()
    replicas = config.replicas
    if config.strategy == "mirrored" and not tf.config.list_physical_devices("GPU"):
        replicas = replicas or 2
    try:
        return tf_effopt.distribute.strategy(
            config.strategy, replicas=replicas, tpu=config.tpu
        )
    except RuntimeError as error:
        raise UsageError(f"--strategy {config.strategy}: {error}") from error


# ---------------------------------------------------------------------- main


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the recipe; returns the exit code."""
    run = None
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        config = resolved(parse(Config, arguments, "image_classification", __doc__))
        run = Run(Path(config.output_dir), config.computation())
        results = None if config.overwrite else run.finished()
        if results is not None:
            print("This run is finished already; --overwrite starts it anew.")
        else:
            results = train(config, run)
    except (UsageError, image_data.DatasetError, checkpoint.CheckpointError) as error:
        print(f"image_classification: error: {error}", file=sys.stderr)
        return MISUSED
    except TrainingFailed as error:
        print(f"image_classification: {error} {last_checkpoint(run)}", file=sys.stderr)
        return FAILED
    except preemption.Preempted:
        print(f"Ended by SIGTERM. {last_checkpoint(run)}", file=sys.stderr)
        return PREEMPTED
    except tf.errors.OpError as error:
        if run is None or not run.devices.several_workers:
            raise
        print(
            "image_classification: another worker was lost "
            f"({type(error).__name__}). {last_checkpoint(run)} Start all workers "
            "again to go on.",
            file=sys.stderr,
        )
        return FAILED
    except KeyboardInterrupt:
        print(f"\nInterrupted. {last_checkpoint(run)}", file=sys.stderr)
        return INTERRUPTED
    if run.devices.is_chief:
        report(run, results)
    return 0


def last_checkpoint(run: Run | None) -> str:
    return "There is no checkpoint yet." if run is None else run.standing()


def report(run: Run, results: dict[str, Any]) -> None:
    print(
        f"Validation accuracy {results['accuracy']:.2%} of "
        f"{results['validation_examples']} images, after {results['steps']} steps in "
        f"{results['seconds']:.1f} seconds"
    )
    for what, path in (
        ("results", run.metrics),
        ("curves", run.curves),
        ("model", run.model),
        ("checkpoint", run.checkpoint),
        ("TensorBoard", run.logs),
    ):
        missing = "" if path.exists() else "  (deleted; --overwrite makes it anew)"
        print(f"  {what + ':':<12} {path}{missing}")


if __name__ == "__main__":
    sys.exit(main())
