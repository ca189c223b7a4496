"""The names of Keras and of TensorFlow, most of them private, that `prepare` leans on.

They are used only through this list; `missing()` is what a test looks at.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from typing import Any

import keras
from tensorflow.python.distribute.cross_device_utils import CollectiveReplicaLauncher
from tensorflow.python.distribute.values import PerReplicaSpec

from tf_effopt.base import Optimizer

losses: Any = importlib.import_module("keras.src.losses.loss")
metrics: Any = importlib.import_module("keras.src.metrics.reduction_metrics")
nn: Any = importlib.import_module("keras.src.backend.tensorflow.nn")
trainer: Any = importlib.import_module("keras.src.backend.tensorflow.trainer")
global_state: Any = importlib.import_module("keras.src.backend.common.global_state")

# What `shares` replaces, and by what.
OF_LOSSES = {
    (losses, "apply_mask"): "apply_mask",
    (losses, "reduce_values"): "reduce_values",
    (losses, "scale_loss_for_distribution"): "scale_loss_for_distribution",
    (losses, "unscale_loss_for_distribution"): "unscale_loss_for_distribution",
    (losses.Loss, "__call__"): "call_loss",
    (metrics, "reduce_to_samplewise_values"): "reduce_to_samplewise_values",
    (metrics.MeanMetricWrapper, "update_state"): "update_metric",
    (nn, "_compute_moments_sync"): "compute_moments_sync",
}
OF_UPDATES = (  # which it replaces, too
    (keras.optimizers.Optimizer, "apply"),
    (keras.optimizers.LossScaleOptimizer, "apply"),
    (Optimizer, "apply_and_check"),
)
OF_DATA = (trainer.TFEpochIterator, "__init__")  # which `whole_batches` replaces
CALL_CONTEXT = "current_call_ctx"  # Keras's state while it is in a layer's call
MODEL = (
    "_flatten_layers",
    "_make_function",
    "_maybe_symbolic_build",
    "_symbolic_build",
)
LAYER = "_losses"  # which `added_losses` replaces
LAUNCHER = "_prefer_unique_instance_key"


def replace(owner: Any, name: str, mine: Any) -> None:
    """Puts a function, which gets Keras's as its first argument, in Keras's place."""
    kerass = getattr(owner, name)

    @functools.wraps(kerass)
    def function(*args: Any, **kwargs: Any) -> Any:
        return mine(kerass, *args, **kwargs)

    setattr(owner, name, function)


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


def in_layer_call() -> bool:
    return global_state.get_global_attribute(CALL_CONTEXT) is not None


def of_first_replica(spec: Any) -> Any:
    """What is known of a tensor's part of a batch on this process's first replica."""
    return spec._component_specs[0] if isinstance(spec, PerReplicaSpec) else spec


def missing() -> list[str]:
    """The names of this list that the installed packages don't have."""
    replaced = [*OF_LOSSES, *OF_UPDATES, OF_DATA]
    absent = [f"{m.__name__}.{x}" for m, x in replaced if not hasattr(m, x)]
    called = _Called()
    called(keras.ops.zeros((1,)))
    if not called.saw_it:
        absent.append(f"global_state.{CALL_CONTEXT}")
    absent += [f"Model.{x}" for x in MODEL if not hasattr(keras.Model, x)]
    if not isinstance(getattr(keras.layers.Layer(), LAYER, None), list):
        absent.append(f"Layer.{LAYER}")
    if not hasattr(CollectiveReplicaLauncher, LAUNCHER):
        absent.append(f"CollectiveReplicaLauncher.{LAUNCHER}")
    return absent


class _Called(keras.layers.Layer):
    """Tells whether `in_layer_call` is so in a layer's call."""

    saw_it = False

    def call(self, x: Any) -> Any:
        self.saw_it = in_layer_call()
        return x
