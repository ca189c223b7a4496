"""Stage 1 on TensorFlow: the sum of a gradient over replicas."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tf_effopt.runtime import private_names
from tf_effopt.runtime.sparse_input import is_sparse


def all_reduce(gradients: list[Any]) -> list[Any]:
    """The sums over replicas, the same bits on each."""
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return gradients
    if _needs_no_collective(context.strategy):
        # One tensor from outside of all replicas would be summed as one.
        own = [g if is_sparse(g) else tf.identity(g) for g in gradients]
        return context.merge_call(_reduce_on_this_host, args=(own,))
    return context.all_reduce(tf.distribute.ReduceOp.SUM, gradients)


def all_reduce_rows(gradients: list[Any]) -> list[Any]:
    """As `all_reduce`, where a strategy would make rows dense: as `TPUStrategy` does.

    The rows of all replicas, one after another, are their sum.
    """
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return gradients
    sent = []
    for g in gradients:
        parts = [g.values, g.indices] if is_sparse(g) else []
        sent += [_in_own_place(part, context) for part in parts] or [g]
    sums = iter(all_reduce(sent))
    return [
        tf.IndexedSlices(next(sums), next(sums)) if is_sparse(g) else next(sums)
        for g in gradients
    ]


def _in_own_place(x: Any, context: Any) -> Any:
    """A tensor among zeros for the other replicas', so that the sum gathers all."""
    place = tf.one_hot(
        context.replica_id_in_sync_group, context.num_replicas_in_sync, True, False
    )
    place = tf.reshape(place, [-1] + [1] * len(x.shape))
    return tf.reshape(tf.where(place, x, tf.zeros_like(x)), [-1, *x.shape[1:]])


def share_memory(strategy: Any) -> bool:
    """Whether several replicas run on the CPU of this host."""
    if not _needs_no_collective(strategy):
        return False
    devices = strategy.extended.worker_devices
    return len(devices) > 1 and all("CPU" in device for device in devices)


def squared_norm(gradients: list[Any]) -> Any:
    """The sum of squares of dense gradients that all replicas have alike.

    For replicas that share a memory: measured once for all, and tensor by tensor
    after the sum, when the processor's cache has it.
    """
    context = tf.distribute.get_replica_context()
    return context.merge_call(_squared_norm_of_first, args=(gradients,))


def cast(gradient: Any, dtype: Any) -> Any:
    """A gradient of at least 32 bits, or back to it, in another dtype."""
    if gradient.dtype.size < 4 and tf.as_dtype(dtype).size < 4:
        return gradient
    if not is_sparse(gradient):
        return tf.cast(gradient, dtype)
    values = tf.cast(gradient.values, dtype)
    return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)


def _needs_no_collective(strategy: Any) -> bool:
    one_host = isinstance(strategy, tf.distribute.MirroredStrategy)
    only_collectives = private_names.MERGE_CALL.get()
    return one_host and not only_collectives()


def _reduce_on_this_host(strategy: Any, gradients: list[Any]) -> list[Any]:
    """Sums per-replica gradients without a collective.

    TensorFlow's collectives can't stand in the loop that
    `steps_per_execution` makes, so this moves the tensors itself: with NCCL
    between GPUs, by copies between CPUs.
    """
    reducer = _reducer(strategy)
    # What is packed into one transfer has to have one dtype.
    reduced: list[Any] = [None] * len(gradients)
    groups: dict[Any, list[int]] = {}
    for i, g in enumerate(gradients):
        first = strategy.experimental_local_results(g)[0]
        groups.setdefault((is_sparse(first), first.dtype), []).append(i)
    for members in groups.values():
        pairs = [(gradients[i], gradients[i]) for i in members]
        results = reducer.batch_reduce(tf.distribute.ReduceOp.SUM, pairs)
        for i, result in zip(members, results, strict=True):
            reduced[i] = result
    return reduced


def _reducer(strategy: Any) -> Any:
    """The strategy's own cross-device operation, where it can be called here."""
    own = private_names.attribute(strategy.extended, "_cross_device_ops")
    devices = strategy.extended.worker_devices
    # TensorFlow's hierarchical copy makes two groups of equal size: of an odd
    # number of devices it leaves out the last one.
    hierarchical = tf.distribute.HierarchicalCopyAllReduce
    if isinstance(own, hierarchical) and len(devices) % 2 == 0:
        return own
    if isinstance(
        own, tf.distribute.ReductionToOneDevice | tf.distribute.NcclAllReduce
    ):
        return own
    if all("GPU" in device for device in devices):
        return tf.distribute.NcclAllReduce()
    # Between CPUs this copies nothing, not even to pack the tensors.
    return tf.distribute.ReductionToOneDevice()


def _squared_norm_of_first(strategy: Any, gradients: list[Any]) -> Any:
    first = [strategy.experimental_local_results(g)[0] for g in gradients]
    # A model's many vectors are small: together they cost one operation.
    vectors = [g for g in first if g.shape.rank == 1]
    parts = [g for g in first if g.shape.rank != 1]
    if vectors:
        parts.append(tf.concat(vectors, 0))
    return 2.0 * tf.add_n([tf.nn.l2_loss(g) for g in parts])
