"""What updates and training steps need on TPU, compiled ahead of time, not run.

    pip install -e ".[tpu-compile,recipes]"
    python recipes/benchmarks/tpu_cost.py

The update of each optimizer of tf_effopt on ResNet-50's 214 tensors, and that of
Keras's optimizers, and whole training steps of `recipes/image_classification.py`'s
models, for four chips of TPU v4, v5e, v5p and v6e. There is no TPU in this:
libtpu's compiler makes the programs, and memory, traffic, cycles and collectives are
read off them. Cycles are the compiler's estimate, without copies and collectives;
they compare optimizers, and are no times.

Writes `tpu_cost.json` and `tpu_cost.md` to `--output-dir` after each program, and goes
on where it was ended.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import keras
import numpy as np
from workloads import hidden_matrices

import tf_effopt
from recipes import image_data, image_models
from recipes.command_line import optimizers
from tf_effopt.tpu import Report, compile_train_step, compile_update, report

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "v4:2x2x1")
VARIANTS = (  # of Adam
    {"global_clipnorm": 1.0},
    {"gradient_accumulation_steps": 4},
    {"use_ema": True},
)
COMPARED = (  # of keras.optimizers, on the first topology
    ("SGD", {}),
    ("Adam", {}),
    ("Adam", {"global_clipnorm": 1.0}),
    ("Adam", {"gradient_accumulation_steps": 4}),
    ("Adam", {"use_ema": True}),
    ("AdamW", {}),
    ("RMSprop", {}),
    ("Nadam", {}),
    ("Lion", {}),
    ("Lamb", {}),
    ("Adafactor", {}),
    ("Muon", {}),
)
BATCH = 256

Compile = Callable[[], Report]


def cases(topologies: Sequence[str]) -> Iterator[tuple[str, Compile]]:
    """Name -> what compiles it."""
    for topology in topologies:
        for name, cls in optimizers().items():
            # The eigenvectors of ResNet-50's matrices take the compiler too long.
            network = digits_cnn if name == "SOAP" else resnet50
            make = functools.partial(network, cls)
            yield (
                f"{name} {topology}",
                functools.partial(compile_update, make, topology),
            )
        for variant in VARIANTS:
            make = functools.partial(resnet50, tf_effopt.Adam, **variant)
            yield (
                f"Adam {variant} {topology}",
                functools.partial(compile_update, make, topology),
            )
        if topology == TOPOLOGIES[0]:
            for name, options in COMPARED:
                cls = getattr(keras.optimizers, name)
                make = functools.partial(resnet50, cls, **options)
                yield (
                    f"keras {name} {options} {topology}",
                    functools.partial(compile_update, make, topology),
                )
            muon = functools.partial(gpt2_matrices, tf_effopt.Muon)
            for name, make in {
                "Muon": muon,
                "Muon {divided}": functools.partial(divided, muon),
                "keras Muon": functools.partial(
                    gpt2_matrices, keras.optimizers.Muon, exclude_layers=["head"]
                ),
            }.items():
                yield (
                    f"{name} of GPT-2's matrices {topology}",
                    functools.partial(compile_update, make, topology),
                )
        for name in ("mlp", "cnn", "resnet"):
            make = functools.partial(recipe_model, name)
            yield (
                f"training step {name} {topology}",
                functools.partial(compile_train_step, make, BATCH, topology),
            )


def resnet50(cls: type, **options) -> keras.Model:
    model = keras.applications.ResNet50(weights=None, classifier_activation=None)
    return compiled(model, cls, **options)


def gpt2_matrices(cls: type, **options) -> keras.Model:
    """Layers with the hidden matrices of GPT-2 small, and an output layer."""
    x = inputs = keras.Input((768,))
    for shape in hidden_matrices():
        x = keras.layers.Dense(shape[1], use_bias=False)(x)
    outputs = keras.layers.Dense(10, name="head")(x)
    model = keras.Model(inputs, outputs, name="gpt2_matrices")
    return compiled(model, cls, **options)


def divided(make_model: Callable[[], keras.Model]) -> keras.Model:
    """With the work on matrices divided among the replicas."""
    model = make_model()
    tf_effopt.distribute.divide_matrix_work(model.optimizer)
    return model


def digits_cnn(cls: type, **options) -> keras.Model:
    return compiled(recipe_network("cnn", (8, 8, 1)), cls, **options)


def recipe_model(name: str) -> keras.Model:
    """As the recipe trains it on CIFAR-10, in mixed precision."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        return compiled(recipe_network(name, (32, 32, 3)), tf_effopt.AdamW)
    finally:
        keras.config.set_dtype_policy("float32")


def recipe_network(name: str, shape: tuple[int, ...]) -> keras.Model:
    images = np.zeros((1, *shape), "uint8")
    data = image_data.ImageData(images, [0], images, [0], 10, "")
    model = image_models.make(name, data, synchronized=True)
    return model


def compiled(model: keras.Model, cls: type, **options) -> keras.Model:
    if cls is tf_effopt.Muon:
        options["roles"] = tf_effopt.roles(model)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(cls(**options), loss, metrics=["accuracy"])
    return model


# ----------------------------------------------------------------------- results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", nargs="+", default=TOPOLOGIES)
    parser.add_argument("--only", help="of the cases that have this in their name")
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=ROOT / "recipes" / "benchmarks" / "results" / "tpu",
    )
    arguments = parser.parse_args()
    path = arguments.output_dir / "tpu_cost.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {
        "versions": report.versions(),
        "reports": {},
        "seconds": {},
        "commits": {},
    }
    commit = this_commit()
    if path.exists():
        before = json.loads(path.read_text())
        if before["versions"] == found["versions"]:
            found = before
    for name, compile_it in cases(arguments.topology):
        if name in found["reports"] or (arguments.only or "") not in name:
            continue
        started = time.monotonic()
        made = compile_it()
        found["reports"][name] = dataclasses.asdict(made)
        found["seconds"][name] = round(time.monotonic() - started, 1)
        found["commits"][name] = commit
        print(f"{name}: {made} ({found['seconds'][name]} s)", flush=True)
        path.write_text(json.dumps(found, indent=1))
        path.with_suffix(".md").write_text(page(found))


def page(found: dict) -> str:
    versions = ", ".join(f"{name} {x}" for name, x in found["versions"].items())
    minutes = sum(found["seconds"].values()) / 60
    names = [name for name, _ in cases(TOPOLOGIES) if name in found["reports"]]
    reports = {name: found["reports"][name] for name in names}
    table = report.markdown(
        Report(**fields | {"compiled": fields["compiled"] + options(name)})
        for name, fields in reports.items()
    )
    commits = [found["commits"][name] for name in names]
    return f"""\
# Compiled for TPU ahead of time

`python recipes/benchmarks/tpu_cost.py` made these programs in {minutes:.0f} minutes, on a
machine without a TPU: **none of them was run**. {versions};
the last column is the commit of tf_effopt.

All numbers are those of one device. Memory is the compiler's: temporaries include what
it keeps in vector memory. HBM traffic and cycles are read off the optimized program.
Cycles are the compiler's estimate, without copies and collectives, and no time.

Where an update needs more than a tenth of its state besides, it is compiled a second
time, with the sums of gradients in the gradients' place, as within a step of training;
the program that needs less is shown.

{with_column(table, ["commit", "---", *commits])}
"""


def this_commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def with_column(table: str, cells: Sequence[str]) -> str:
    rows = zip(table.strip().splitlines(), cells, strict=True)
    return "\n".join(f"{row} {cell} |" for row, cell in rows)


def options(name: str) -> str:
    """What a case's name tells of the optimizer's arguments."""
    found = re.search(r"\{(.+)\}", name)
    return f", `{found[1]}`" if found else ""


if __name__ == "__main__":
    main()
