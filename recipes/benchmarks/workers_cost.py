"""What an update costs with several workers, against Keras's, in a training loop.

    python -m tf_effopt.distribute.launch --workers 2 recipes/benchmarks/workers_cost.py

Adam on ResNet-50's 214 tensors, the sum of gradients included: that of tf_effopt, the
same with gradients sent in bfloat16, and that of `keras.optimizers`, taking turns.
Gradients are random numbers; there is no model. On one machine the workers share its
cores, and the network is its memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import keras
import numpy as np
import tensorflow as tf
from workloads import resnet50

import tf_effopt


def updates(strategy: tf.distribute.Strategy) -> dict[str, Callable[[], None]]:
    """Name -> a function that runs one update on all workers."""

    def ours() -> keras.optimizers.Optimizer:
        return tf_effopt.Adam()

    def compressed() -> keras.optimizers.Optimizer:
        optimizer = tf_effopt.Adam()
        tf_effopt.distribute.compress_gradients(optimizer)
        return optimizer

    makers = {
        "tf_effopt": ours,
        "tf_effopt, bfloat16 gradients": compressed,
        "Keras": keras.optimizers.Adam,
    }
    return {name: update(strategy, make) for name, make in makers.items()}


def update(strategy: tf.distribute.Strategy, make: Callable) -> Callable[[], None]:
    rng = np.random.default_rng(0)
    with strategy.scope():
        weights = [
            keras.Variable(np.zeros(shape, "float32"), name=f"kernel_{i}")
            for i, shape in enumerate(resnet50())
        ]
        optimizer = make()
        optimizer.build(weights)
    gradients = [tf.constant(rng.normal(size=v.shape), "float32") for v in weights]

    def replica(gradients: list[tf.Tensor]) -> None:
        optimizer.apply([tf.identity(g) for g in gradients], weights)

    step = tf.function(lambda xs: strategy.run(replica, args=(xs,)), autograph=False)
    return lambda: step(gradients)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    strategy = tf_effopt.distribute.strategy("multi_worker")
    runs = updates(strategy)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for repeat in range(arguments.repeats):
        order = list(runs) if repeat % 2 else list(runs)[::-1]
        for name in order:
            started = time.perf_counter()
            runs[name]()
            samples[name].append(1000 * (time.perf_counter() - started))
    if json.loads(os.environ["TF_CONFIG"])["task"]["index"] == 0:
        for name, times in samples.items():
            print(
                f"{name}: {statistics.median(times):.0f} ms "
                f"[{min(times):.0f}-{max(times):.0f}], {len(times)} samples, "
                f"{strategy.num_replicas_in_sync} workers"
            )


if __name__ == "__main__":
    main()
