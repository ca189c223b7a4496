"""Trains the digits CNN with each optimizer's defaults: what it gets out of them.

    python recipes/benchmarks/defaults.py
    python recipes/benchmarks/defaults.py --optimizer Prodigy Lion --seeds 5

For every public optimizer as its constructor makes it: the recipe's CNN on
scikit-learn's handwritten digits, batches of 64, 30 epochs, a constant learning
rate, no augmentation. It prints a table in Markdown: the accuracy on the 360 images
of the validation split after the last epoch, and the learning rate.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import keras

import tf_effopt
from recipes import image_data, image_models

BATCH_SIZE, EPOCHS = 64, 30


def accuracy(name: str, seed: int, data: image_data.ImageData) -> float:
    """The validation accuracy of one training, in percent."""
    keras.utils.set_random_seed(seed)
    model = image_models.make("cnn", data, synchronized=False)
    model.compile(
        getattr(tf_effopt, name)(),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,
    )
    model.fit(
        data.train_images,
        data.train_labels,
        batch_size=BATCH_SIZE,
        epochs=EPOCHS,
        verbose=0,
        callbacks=[tf_effopt.callbacks.EvaluationWeights()],
    )
    _, share = model.evaluate(data.validation_images, data.validation_labels, verbose=0)
    return 100 * share


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = tf_effopt.optimizers.__all__
    parser.add_argument("--optimizer", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each")
    arguments = parser.parse_args(argv)
    data = image_data.load("digits", None, None)
    found = {}
    print("| optimizer | learning rate | accuracy, mean [range] | seconds a run |")
    print("|---|---|---|---|")
    for name in arguments.optimizer:
        start = time.monotonic()
        found[name] = [accuracy(name, s, data) for s in range(arguments.seeds)]
        seconds = (time.monotonic() - start) / arguments.seeds
        rate = getattr(tf_effopt, name)().get_config()["learning_rate"]
        low, high = min(found[name]), max(found[name])
        mean = statistics.mean(found[name])
        print(
            f"| `{name}` | {rate:g} | {mean:.2f} % [{low:.2f}, {high:.2f}] "
            f"| {seconds:.0f} |",
            flush=True,
        )
    return found


if __name__ == "__main__":
    os.environ["KERAS_BACKEND"] = "tensorflow"
    main()
