"""The private names of Keras's trainer and of TensorFlow that `prepare` leans on.

They are used only through this list; `missing()` is what a test looks at.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import keras
from tensorflow.python.distribute.cross_device_utils import CollectiveReplicaLauncher
from tensorflow.python.distribute.values import PerReplicaSpec

losses: Any = importlib.import_module("keras.src.losses.loss")
nn: Any = importlib.import_module("keras.src.backend.tensorflow.nn")

# Functions of the modules above, which `shares` replaces.
REPLACED = (
    (losses, "apply_mask"),
    (losses, "reduce_values"),
    (losses, "scale_loss_for_distribution"),
    (losses, "unscale_loss_for_distribution"),
    (nn, "_compute_moments_sync"),
)
MODEL = (
    "_flatten_layers",
    "_make_function",
    "_maybe_symbolic_build",
    "_symbolic_build",
)
LAYER = "_losses"  # which `added_losses` replaces
LAUNCHER = "_prefer_unique_instance_key"


@contextlib.contextmanager
def collectives_in_loops() -> Iterator[None]:
    """Within, collectives are numbered when they are traced, not when they are called.

    TensorFlow's default can't be in a `tf.while_loop`, which is what
    `steps_per_execution` makes. All workers have to trace the same functions in the
    same order; those of an iterator's steps they do.
    """
    default = getattr(CollectiveReplicaLauncher, LAUNCHER)
    setattr(CollectiveReplicaLauncher, LAUNCHER, False)
    try:
        yield
    finally:
        setattr(CollectiveReplicaLauncher, LAUNCHER, default)


def of_first_replica(spec: Any) -> Any:
    """What is known of a tensor's part of a batch on this process's first replica."""
    return spec._component_specs[0] if isinstance(spec, PerReplicaSpec) else spec


def missing() -> list[str]:
    """The names of this list that the installed packages don't have."""
    absent = [f"{m.__name__}.{x}" for m, x in REPLACED if not hasattr(m, x)]
    absent += [f"Model.{x}" for x in MODEL if not hasattr(keras.Model, x)]
    if not isinstance(getattr(keras.layers.Layer(), LAYER, None), list):
        absent.append(f"Layer.{LAYER}")
    if not hasattr(CollectiveReplicaLauncher, LAUNCHER):
        absent.append(f"CollectiveReplicaLauncher.{LAUNCHER}")
    return absent
