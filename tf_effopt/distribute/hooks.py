"""The names of Keras and of TensorFlow, most of them private, that `prepare` uses.

They are used only through this list; `missing()` is what a test looks at, and `prepare`
before it replaces anything.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import keras

from tf_effopt.base import Optimizer
from tf_effopt.engine import private_names
from tf_effopt.engine.private_names import PrivateName

_LOSSES = "keras.src.losses.loss"
_METRICS = "keras.src.metrics.reduction_metrics"
_TRAINER = "keras.src.backend.tensorflow.trainer"
_GLOBAL_STATE = "keras.src.backend.common.global_state"

SCALE_LOSS = PrivateName(f"{_LOSSES}:scale_loss_for_distribution")

# What `shares` replaces, and by what.
OF_LOSSES = {
    PrivateName(f"{_LOSSES}:apply_mask"): "apply_mask",
    PrivateName(f"{_LOSSES}:reduce_values"): "reduce_values",
    SCALE_LOSS: "scale_loss_for_distribution",
    PrivateName(
        f"{_LOSSES}:unscale_loss_for_distribution"
    ): "unscale_loss_for_distribution",
    PrivateName(f"{_LOSSES}:Loss.__call__"): "call_loss",
    PrivateName(f"{_METRICS}:reduce_to_samplewise_values"): (
        "reduce_to_samplewise_values"
    ),
    PrivateName(f"{_METRICS}:MeanMetricWrapper.update_state"): "update_metric",
    PrivateName(
        "keras.src.backend.tensorflow.ops.nn:_compute_moments_sync",
        "keras.src.backend.tensorflow.nn:_compute_moments_sync",  # Keras 3.15
    ): "compute_moments_sync",
}
OF_UPDATES = (  # which it replaces, too
    (keras.optimizers.Optimizer, "apply"),
    (keras.optimizers.LossScaleOptimizer, "apply"),
    (Optimizer, "apply_and_check"),
)
# Which `whole_batches` replaces.
OF_DATA = PrivateName(f"{_TRAINER}:TFEpochIterator.__init__")
GLOBAL_ATTRIBUTE = PrivateName(f"{_GLOBAL_STATE}:get_global_attribute")
CALL_CONTEXT = "current_call_ctx"  # Keras's state while it is in a layer's call
MODEL = (
    "_flatten_layers",
    "_make_function",
    "_maybe_symbolic_build",
    "_symbolic_build",
)
LAYER = "_losses"  # which `added_losses` replaces
LAUNCHER = PrivateName(
    "tensorflow.python.distribute.cross_device_utils:"
    "CollectiveReplicaLauncher._prefer_unique_instance_key"
)
PER_REPLICA_SPEC = PrivateName("tensorflow.python.distribute.values:PerReplicaSpec")


def replace(owner: Any, name: str, mine: Any) -> None:
    """Puts a function, which gets Keras's as its first argument, in Keras's place."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        return mine(original, *args, **kwargs)

    setattr(owner, name, function)


@contextlib.contextmanager
def collectives_in_loops() -> Iterator[None]:
    """Within, collectives are numbered when they are traced, not when they are called.

    TensorFlow's default can't be in a `tf.while_loop`, which is what
    `steps_per_execution` makes. All workers have to trace the same functions in the
    same order; those of an iterator's steps they do.
    """
    launcher, name = LAUNCHER.place()
    default = getattr(launcher, name)
    setattr(launcher, name, False)
    try:
        yield
    finally:
        setattr(launcher, name, default)


def in_layer_call() -> bool:
    return GLOBAL_ATTRIBUTE.get()(CALL_CONTEXT) is not None


def of_several_hosts(strategy: Any) -> bool:
    """Whether a strategy's replicas are on several hosts."""
    return private_names.attribute(strategy.extended, "_in_multi_worker_mode")()


def distributed_dataset(iterator: Any) -> Any:
    """The dataset behind Keras's iterator over an epoch, divided among replicas."""
    return private_names.attribute(iterator, "_distributed_dataset")


def of_first_replica(spec: Any) -> Any:
    """What is known of a tensor's part of a batch on this process's first replica."""
    if not isinstance(spec, PER_REPLICA_SPEC.get()):
        return spec
    return private_names.attribute(spec, "_component_specs")[0]


@functools.cache
def check() -> None:
    """Raises an error that names what the installed packages don't have.

    Raises:
        RuntimeError: names of this list are missing.
    """
    if absent := missing():
        raise RuntimeError(private_names.message(absent))


def missing() -> list[str]:
    """The names of this list that the installed packages don't have."""
    names = [*OF_LOSSES, OF_DATA, GLOBAL_ATTRIBUTE, LAUNCHER, PER_REPLICA_SPEC]
    absent = [repr(name) for name in names if not name.exists()]
    absent += [f"{m.__name__}.{x}" for m, x in OF_UPDATES if not hasattr(m, x)]
    if GLOBAL_ATTRIBUTE.exists():
        called = _Called()
        called(keras.ops.zeros((1,)))
        if not called.saw_it:
            absent.append(f"global_state.{CALL_CONTEXT}")
    absent += [f"Model.{x}" for x in MODEL if not hasattr(keras.Model, x)]
    if not isinstance(getattr(keras.layers.Layer(), LAYER, None), list):
        absent.append(f"Layer.{LAYER}")
    return absent


class _Called(keras.layers.Layer):
    """Tells whether `in_layer_call` is so in a layer's call."""

    saw_it = False

    def call(self, x: Any) -> Any:
        self.saw_it = in_layer_call()
        return x
