"""Losses of a batch whose replicas have unequal numbers of examples.

Keras takes the mean over each replica's examples, and the mean of these means.
Within `weighted_by_examples`, each replica's mean counts by its share of the examples, so that
their sum is the mean over the whole batch, as on one device. What stands in for
examples (`padding`) has weight 0: its loss and gradients are 0 even where
it isn't a number.

A loss that is called inside of another, of a metric or of a layer is part of what counts
already: it is the plain mean over this replica's examples.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from tf_effopt.base import applying
from tf_effopt.runtime import private_names
from tf_effopt.training import keras_patches

MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")


class _Here(threading.local):
    """What this replica's thread is about."""

    share: tf.Tensor | None = None  # of the batch's examples; None: not counted
    weight: tf.Tensor | None = None  # 0 of what stands in for examples, else 1 or None
    of_sums: float = 1.0  # what a sum counts, if each replica has the whole batch
    losses: int = 0  # how many are being called, one inside of the other
    parts: int = 0  # how many have been made this replica's part of the batch's loss
    in_metric: bool = False


_here = _Here()


@contextlib.contextmanager
def weighted_by_examples(batch: Any, whole: bool = False) -> Iterator[None]:
    """Within, Keras's losses count a replica by its examples.

    Args:
        batch: a tensor of this replica's data, whose first dimension counts them.
        whole: whether each replica has the whole batch, not a part of it.
    """
    alike = 1 / tf.distribute.get_strategy().num_replicas_in_sync
    if may_be_empty(batch) and not whole:
        count = tf.cast(tf.shape(batch)[0], tf.float32)
        _here.share = count / summed(count)
        _here.weight = tf.minimum(count, 1.0)
    else:
        _here.share = tf.constant(alike)
    _here.of_sums = alike if whole else 1.0
    try:
        yield
    finally:
        _here.share = _here.weight = None


def may_be_empty(batch: Any) -> bool:
    """Whether a replica may have none of a batch's examples.

    A size that a graph knows is the same on all replicas: steps read their batches in
    the graph (`fit`). Not so in `predict`, which has no collectives; there a graph may
    know that a replica has none.
    """
    return not batch.shape[0] or tf.executing_eagerly()


def summed(x: tf.Tensor) -> tf.Tensor:
    """The sum over all replicas."""
    context = tf.distribute.get_replica_context()
    return tf.stop_gradient(context.all_reduce(tf.distribute.ReduceOp.SUM, x))


@functools.cache
def install() -> None:
    """Puts the functions below in the place of Keras's.

    Outside of `weighted_by_examples` they do what Keras's do.
    """
    for name, mine in keras_patches.LOSS_PATCHES.items():
        keras_patches.replace(*name.place(), globals()[mine])
    for owner in keras_patches.KERAS_OPTIMIZERS:
        keras_patches.replace(owner, "apply", update)
    applying.GRADIENT_FILTERS.append(of_examples)


def _is_part_of_another() -> bool:
    return _here.losses > 1 or _here.in_metric or keras_patches.in_layer_call()


def call_loss(original: Any, loss: Any, *args: Any, **kwargs: Any) -> Any:
    """`Loss.__call__`."""
    _here.losses += 1
    try:
        return original(loss, *args, **kwargs)
    finally:
        _here.losses -= 1


def update_metric(original: Any, metric: Any, *args: Any, **kwargs: Any) -> Any:
    """`update_state` of a metric that is the mean of a function."""
    before, _here.in_metric = _here.in_metric, True
    try:
        return original(metric, *args, **kwargs)
    finally:
        _here.in_metric = before


def reduce_to_samplewise_values(
    original: Any, values: Any, sample_weight: Any, *args: Any, **kwargs: Any
) -> Any:
    """A function's own mean over this replica's examples counts by their share."""
    values, weight = original(values, sample_weight, *args, **kwargs)
    is_mean = _here.in_metric and weight is None and values.shape.rank == 0
    if _here.share is None or not is_mean:
        return values, weight
    share = tf.cast(_here.share, values.dtype)
    return tf.math.multiply_no_nan(values, share), share


def scale_loss_for_distribution(original: Any, value: Any) -> Any:
    """A mean over this replica's examples -> its part of the batch's mean."""
    if _here.share is None:
        return original(value)
    if _is_part_of_another():
        return value
    _here.parts += 1
    return tf.math.multiply_no_nan(value, tf.cast(_here.share, value.dtype))


def unscale_loss_for_distribution(original: Any, value: Any) -> Any:
    """The reverse: what Keras's `Mean` of the loss is fed, with the count.

    Keras divides what wasn't scaled, too: examples' losses, without a reduction.
    """
    if _here.share is None:
        return original(value)
    if value.shape.rank:
        return value
    return tf.math.divide_no_nan(value, tf.cast(_here.share, value.dtype))


def reduce_values(
    original: Any, values: Any, sample_weight: Any = None, reduction: Any = MEANS[0]
) -> Any:
    """The losses of this replica's examples -> its part of the batch's loss."""
    if _here.share is None:
        return original(values, sample_weight, reduction)
    if _is_part_of_another():
        return _mean(original, values, sample_weight, reduction)
    if reduction not in MEANS:
        _here.parts += 1
        return _weighted(original(values, sample_weight, reduction)) * _here.of_sums
    if values.shape.rank == 0:  # a loss function that has taken the mean itself
        return private_names.SCALE_LOSS.get()(values)
    if reduction == "mean_with_sample_weight" and sample_weight is not None:
        _here.parts += 1
        weight = summed(_weighted(tf.reduce_sum(sample_weight)))
        return tf.math.divide_no_nan(
            _weighted(tf.reduce_sum(values)), tf.cast(weight, values.dtype)
        )
    return _mean(original, values, sample_weight, reduction)


def _mean(original: Any, values: Any, sample_weight: Any, reduction: Any) -> Any:
    if values.shape.rank and values.shape[0] == 0:  # of these Keras makes no number
        return tf.reduce_sum(values)
    return original(values, sample_weight, reduction)


def apply_mask(
    original: Any, sample_weight: Any, mask: Any, dtype: Any, reduction: Any
) -> Any:
    """Weights that make up for what is masked: on all replicas, not on each."""
    weight = original(sample_weight, mask, dtype, reduction)
    everywhere_alike = mask is None or reduction not in MEANS[:2]
    if _here.share is None or everywhere_alike or _is_part_of_another():
        return weight
    kept = _weighted(tf.stack([tf.reduce_sum(tf.cast(mask, tf.float32)), _size(mask)]))
    everywhere = summed(kept)
    return weight * tf.cast(
        tf.math.divide_no_nan(kept[0] * everywhere[1], kept[1] * everywhere[0]),
        weight.dtype,
    )


def has_part(compute_loss: Any, *args: Any, **kwargs: Any) -> tuple[Any, bool]:
    """What a model's `compute_loss` returns, and whether it made a part of a loss.

    Outside of `weighted_by_examples` there are no parts to be made.
    """
    before = _here.parts
    loss = compute_loss(*args, **kwargs)
    return loss, _here.share is None or _here.parts > before


def update(
    original: Any, optimizer: Any, grads: Any, trainable_variables: Any = None
) -> Any:
    """`apply` of an optimizer of Keras."""
    if _here.weight is not None and not hasattr(grads, "shape"):
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
        variables = trainable_variables or optimizer._trainable_variables
        grads = of_examples(grads, variables)
    return original(optimizer, grads, trainable_variables)


def of_examples(grads: list[Any], variables: list[Any]) -> list[Any]:
    """The gradients; those of what stands in for examples are 0."""
    if _here.weight is None:
        return grads
    grads = list(grads)
    # Those of float8's scales are no gradients but what comes in their place.
    ours = [
        i
        for i, (g, v) in enumerate(zip(grads, variables, strict=False))
        if tf.is_tensor(g) and not getattr(v, "overwrite_with_gradient", False)
    ]
    own = [grads[i] for i in ours]
    is_none = tf.equal(_here.weight, 0.0)
    own = tf.cond(is_none, lambda: tf.nest.map_structure(_zeros, own), lambda: own)
    for i, gradient in zip(ours, own, strict=True):
        grads[i] = gradient
    return grads


def _zeros(gradient: Any) -> Any:
    if isinstance(gradient, tf.IndexedSlices):
        zeros = tf.zeros_like(gradient.values)
        return tf.IndexedSlices(zeros, gradient.indices, gradient.dense_shape)
    return tf.zeros_like(gradient)


def compute_moments_sync(original: Any, x: Any, axes: Any, keepdims: bool) -> Any:
    """Mean and variance over the examples of all replicas."""
    if _here.weight is None:
        return original(x, axes, keepdims)
    context = tf.distribute.get_replica_context()
    x_sum, square_sum, count = (
        context.all_reduce(
            tf.distribute.ReduceOp.SUM,
            _weighted(tf.reduce_sum(values, axes, keepdims=True)),
        )
        for values in (x, tf.square(x), tf.ones_like(x))
    )
    mean = tf.math.divide_no_nan(x_sum, count)
    variance = tf.math.divide_no_nan(square_sum, count) - tf.square(mean)
    variance = tf.maximum(variance, 0.0)
    mean, variance = _used(mean), _used(variance)
    if keepdims:
        return mean, variance
    return tf.squeeze(mean, axes), tf.squeeze(variance, axes)


@tf.custom_gradient
def _used(x: tf.Tensor) -> Any:
    """A value of all replicas, whose gradient is that of its use for examples."""
    return tf.identity(x), _weighted


def _weighted(x: tf.Tensor) -> tf.Tensor:
    """0 if it is of what stands in for examples, also if it isn't a number."""
    if _here.weight is None:
        return x
    return tf.math.multiply_no_nan(x, tf.cast(_here.weight, x.dtype))


def _size(x: Any) -> tf.Tensor:
    return tf.cast(tf.size(x), tf.float32)
