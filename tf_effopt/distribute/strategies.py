"""Strategies by name, and what is wrong when there is none."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import Any

import tensorflow as tf

from tf_effopt.base.checks import as_int
from tf_effopt.distribute import tf_config

NAMES = ("auto", "none", "mirrored", "multi_worker", "tpu")

# What TensorFlow has to find in the environment when it is imported, to reach a
# TPU v5e or newer by its libtpu. (Older ones need none of it.)
TPU_ENVIRONMENT = (
    "export PJRT_DEVICE=TPU TPU_NAME=local NEXT_PLUGGABLE_DEVICE_USE_C_API=true\n"
    "export TF_PLUGGABLE_DEVICE_LIBRARY_PATH=\"$(python -c 'import libtpu; "
    "print(libtpu.get_library_path())')\"\n"
    "export TF_XLA_FLAGS=--tf_mlir_enable_mlir_bridge=true"
)


def strategy(
    name: str = "auto", *, replicas: int | None = None, tpu: str = "local"
) -> tf.distribute.Strategy:
    """Makes a `tf.distribute` strategy; call it before anything else runs.

    >>> import keras, tf_effopt
    >>> strategy = tf_effopt.distribute.strategy("none")
    >>> with strategy.scope():
    ...     model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> strategy.num_replicas_in_sync
    1

    Args:
        name: `"none"`: one device. `"mirrored"`: the GPUs of this machine.
            `"multi_worker"`: the workers that the environment variable TF_CONFIG
            names, this process being one of them. `"tpu"`: the cores of a TPU.
            `"auto"`: a TPU if there is one, else workers if TF_CONFIG names
            several, else GPUs if there are several, else one device.
        replicas: with `"mirrored"`: how many GPUs, from the first; None is all.
            Where there is no GPU, so many logical CPU devices, to try it out. A
            process trains with one number of replicas: TensorFlow's collectives of
            another fail.
        tpu: with `"tpu"`: `"local"` on a TPU VM, else name or address.

    Returns:
        The strategy: make model and optimizer inside `with strategy.scope():`.

    Raises:
        ValueError: the name isn't known, or `replicas` doesn't fit it.
        RuntimeError: hardware, TensorFlow's build or TF_CONFIG doesn't fit, or
            TensorFlow has started already.
    """
    if name not in NAMES:
        raise ValueError(
            f"`name` must be one of {', '.join(map(repr, NAMES))}. "
            f"Received: name={name!r}"
        )
    replicas = as_int(replicas)
    if replicas is not None and not (type(replicas) is int and replicas >= 1):
        raise ValueError(
            "`replicas` must be an integer of at least 1. Received: "
            f"replicas={replicas!r}"
        )
    if name == "auto":
        name = _found()
    if replicas is not None and name != "mirrored":
        raise ValueError(
            f"`replicas` is for 'mirrored'; {name!r} takes all there are. "
            f"Received: replicas={replicas}"
        )
    if name == "mirrored":
        return _mirrored(replicas)
    if name == "multi_worker":
        return _multi_worker()
    if name == "tpu":
        return _tpu(tpu)
    return tf.distribute.get_strategy()


def _found() -> str:
    if _has_tpu():
        return "tpu"
    text = os.environ.get("TF_CONFIG", "").strip()
    if text not in ("", "{}") and len(tf_config.named_workers()) != 1:
        return "multi_worker"  # which says what is wrong with it, if anything is
    return "mirrored" if len(tf.config.list_physical_devices("GPU")) > 1 else "none"


# -------------------------------------------------------------------- mirrored


def _mirrored(replicas: int | None) -> tf.distribute.Strategy:
    gpus = len(tf.config.list_physical_devices("GPU"))
    if gpus:
        replicas = replicas or gpus
        if replicas > gpus:
            raise RuntimeError(
                f"{gpus} GPUs are visible. Received: replicas={replicas}"
            )
        return tf.distribute.MirroredStrategy([f"GPU:{i}" for i in range(replicas)])
    if replicas is None:
        raise RuntimeError(
            "No GPU is visible to TensorFlow. To try 'mirrored' out on logical CPU "
            "devices, say how many: strategy('mirrored', replicas=2). For GPUs: "
            'pip install "tf_effopt[gpu]"'
        )
    _split_cpu(replicas)
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])


def _split_cpu(parts: int) -> None:
    cpu = tf.config.list_physical_devices("CPU")[0]
    try:
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * parts
        )
    except RuntimeError as error:  # TensorFlow has started already
        found = len(tf.config.list_logical_devices("CPU"))
        if found < parts:
            raise RuntimeError(
                f"TensorFlow has started already, with {found} logical CPU "
                "device(s), which can't be split any more: make the strategy before "
                f"anything else runs. Received: replicas={parts}"
            ) from error


# ---------------------------------------------------------------- multi_worker


def _multi_worker() -> tf.distribute.Strategy:
    address = tf_config.read().own
    try:
        return tf.distribute.MultiWorkerMirroredStrategy()
    except RuntimeError as error:
        if "startup" not in str(error):
            raise
        raise RuntimeError(
            "TensorFlow has started already: make the 'multi_worker' strategy before "
            "any tensor, variable or layer."
        ) from error
    except tf.errors.UnknownError as error:
        if "start gRPC server" not in str(error):
            raise
        raise RuntimeError(
            f"TensorFlow can't listen at {address}, which is this worker's address in "
            "TF_CONFIG: another process may hold the port, such as a worker of an "
            "earlier run. End it, or choose another port in the TF_CONFIG of every "
            "worker."
        ) from error


# ------------------------------------------------------------------------- tpu


def _has_tpu() -> bool:
    return bool(_tpu_build()) and (
        bool(tf.config.list_physical_devices("TPU")) or _has_tpu_device_files()
    )


def _has_tpu_device_files() -> bool:
    return any(any(Path("/dev").glob(x)) for x in ("accel*", "vfio/[0-9]*"))


def _tpu_build() -> str | None:
    """The version of TensorFlow's wheel for TPUs, or None."""
    try:
        return importlib.metadata.version("tensorflow-tpu")
    except importlib.metadata.PackageNotFoundError:
        return None


def _tpu(tpu: str) -> tf.distribute.Strategy:
    if _tpu_build() is None:
        raise RuntimeError(
            f"This TensorFlow ({tf.__version__}) is built without TPUs. In an "
            'separate environment, on the TPU VM: pip install "tf_effopt[tpu]" '
            "(tensorflow-tpu 2.20.0 and a libtpu that it loads)."
        )
    if tpu == "local" and not _has_tpu_device_files():
        raise RuntimeError(
            "This machine has no TPU (neither /dev/accel* nor /dev/vfio/*). Run this "
            "on the TPU VM itself, or name the TPU: strategy('tpu', tpu=NAME)."
        )
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=tpu)
        if tpu != "local":
            tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)  # returns the topology
        return tf.distribute.TPUStrategy(resolver)
    except (tf.errors.OpError, ValueError, RuntimeError) as error:
        raise RuntimeError(
            f"The TPU {tpu!r} can't be used: {_first_line(error)}\nNo other process "
            "may hold it, and before Python starts, a TPU v5e or newer wants\n"
            f"{TPU_ENVIRONMENT}"
        ) from error


def _first_line(error: BaseException) -> Any:
    return next(iter(str(error).splitlines()), type(error).__name__)
