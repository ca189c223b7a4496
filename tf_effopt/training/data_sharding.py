"""Shard every dataset by batch, never by file.

TensorFlow's default gives each worker some of the files, where there are several. Its
batches are other ones then, and predictions come in another order.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import tensorflow as tf

from tf_effopt.runtime import private_names
from tf_effopt.training import keras_patches

Policy = tf.data.experimental.AutoShardPolicy

_strategies: weakref.WeakSet = weakref.WeakSet()


def shard_by_batch(strategy: tf.distribute.Strategy) -> None:
    """From now on `fit`, `evaluate` and `predict` do so under the strategy."""
    _install()
    _strategies.add(strategy)


@functools.cache
def _install() -> None:
    keras_patches.replace(*private_names.EPOCH_ITERATOR.place(), _make_epoch_iterator)


def _make_epoch_iterator(
    original: Any, iterator: Any, distribute_strategy: Any = None, x: Any = None, **data
) -> None:
    """`TFEpochIterator.__init__`."""
    if distribute_strategy in _strategies:
        x = sharded_by_row(x)
    original(iterator, distribute_strategy=distribute_strategy, x=x, **data)


def sharded_by_row(data: Any) -> Any:
    """A dataset whose policy was left to TensorFlow; all else stays as it is."""
    is_dataset = isinstance(data, tf.data.Dataset)
    if not is_dataset:
        return data
    if data.options().experimental_distribute.auto_shard_policy != Policy.AUTO:
        return data
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = Policy.DATA
    return data.with_options(options)
