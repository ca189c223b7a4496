"""What `prepare` replaces in Keras, and what it asks of private names."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import keras

from tf_effopt.runtime import private_names

# What `shares` replaces, and by what.
LOSS_PATCHES = {
    private_names.APPLY_MASK: "apply_mask",
    private_names.REDUCE_VALUES: "reduce_values",
    private_names.SCALE_LOSS: "scale_loss_for_distribution",
    private_names.UNSCALE_LOSS: "unscale_loss_for_distribution",
    private_names.CALL_LOSS: "call_loss",
    private_names.SAMPLEWISE_VALUES: "reduce_to_samplewise_values",
    private_names.UPDATE_METRIC: "update_metric",
    private_names.COMPUTE_MOMENTS: "compute_moments_sync",
}
# Whose `apply` it replaces, too. Ours has a hook for it.
KERAS_OPTIMIZERS = keras.optimizers.Optimizer, keras.optimizers.LossScaleOptimizer


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
    launcher, name = private_names.LAUNCHER.place()
    default = getattr(launcher, name)
    setattr(launcher, name, False)
    try:
        yield
    finally:
        setattr(launcher, name, default)


def in_layer_call() -> bool:
    return private_names.GLOBAL_ATTRIBUTE.get()(private_names.CALL_CONTEXT) is not None


def of_several_hosts(strategy: Any) -> bool:
    """Whether a strategy's replicas are on several hosts."""
    return private_names.attribute(strategy.extended, "_in_multi_worker_mode")()


def distributed_dataset(iterator: Any) -> Any:
    """The dataset behind Keras's iterator over an epoch, divided among replicas."""
    return private_names.attribute(iterator, "_distributed_dataset")


def of_first_replica(spec: Any) -> Any:
    """What is known of a tensor's part of a batch on this process's first replica."""
    if not isinstance(spec, private_names.PER_REPLICA_SPEC.get()):
        return spec
    return private_names.attribute(spec, "_component_specs")[0]


@functools.cache
def check() -> None:
    """Raises an error that names what `prepare` uses and the packages don't have.

    Raises:
        RuntimeError: private names are missing.
    """
    names = (
        private_names.EPOCH_ITERATOR,
        private_names.GLOBAL_ATTRIBUTE,
        private_names.LAUNCHER,
        private_names.PER_REPLICA_SPEC,
    )
    private_names.check([*LOSS_PATCHES, *names], private_names.MODEL)
