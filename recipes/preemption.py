"""Preemption: a host gets SIGTERM, and some seconds to save what there is."""

from __future__ import annotations

import contextlib
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator

import tensorflow as tf


class Preempted(Exception):
    """SIGTERM ended training; all of it is in the checkpoint."""


@contextlib.contextmanager
def watched(strategy: tf.distribute.Strategy) -> Iterator[Callable[[], bool]]:
    """Within, SIGTERM doesn't end the process.

    Yields a function to call after each step: whether to save and end now, since some
    worker got SIGTERM. All workers get the same answer after the same step.
    """
    received = threading.Event()
    before = signal.getsignal(signal.SIGTERM)
    try:
        if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
            with tempfile.TemporaryDirectory() as unused:
                yield _agreed(strategy.cluster_resolver, received, unused)
        else:
            signal.signal(signal.SIGTERM, lambda *_: received.set())
            yield received.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def _agreed(
    resolver: tf.distribute.cluster_resolver.ClusterResolver,
    received: threading.Event,
    folder: str,
) -> Callable[[], bool]:
    # TensorFlow's handler finds the step at which all workers can stop; its own
    # checkpoint, which isn't the recipe's, is never written.
    experimental = tf.distribute.experimental
    handler = experimental.PreemptionCheckpointHandler(
        resolver,
        tf.train.Checkpoint(),
        folder,
        experimental.TerminationConfig(
            exit_fn=received.set, grace_period=0, save_fn=lambda: None
        ),
    )

    def is_time() -> bool:
        if not received.is_set():
            handler.save_checkpoint_if_preempted()
        return received.is_set()

    return is_time
