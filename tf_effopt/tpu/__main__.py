"""Compiles optimizers and training steps for TPU, on a machine without one.

    python -m tf_effopt.tpu --optimizer AdamW Muon --topology v5e:2x2 v6e:2x2
    python -m tf_effopt.tpu --model my_module:make_model --batch-size 256

`--model` names a function that makes a Keras model, built and, without
`--optimizer`, compiled; it is that of ResNet-50 by default. With `--batch-size`
whole training steps are compiled, for which it has to be compiled with its loss in
any case; without it the optimizers' updates.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras

import tf_effopt
from tf_effopt.arguments import did_you_mean
from tf_effopt.tpu import compiler, report
from tf_effopt.tpu.steps import compile_train_step, compile_update


class ModelFailed(Exception):
    """The user's function raised what is its cause."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line for each compilation; returns how many failed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for path in filter(None, (options.json, options.markdown)):
        if not os.path.isdir(os.path.dirname(path) or "."):
            parser.error(f"there is no folder for {path}")
    reports = []
    try:
        compiler.check_installed()
        make_model = _named(options.model)
        for name in options.optimizer or [None]:
            make = functools.partial(_with_optimizer, make_model, name)
            for topology in options.topology:
                if options.batch_size is None:
                    reports.append(compile_update(make, topology))
                else:
                    reports.append(
                        compile_train_step(make, options.batch_size, topology)
                    )
                print(reports[-1], flush=True)
    except ModelFailed as failure:
        traceback.print_exception(failure.__cause__)
        print(
            f"tf_effopt.tpu: error: --model {options.model} failed, see above",
            file=sys.stderr,
        )
        return 2
    except (ImportError, AttributeError, ValueError) as error:
        print(f"tf_effopt.tpu: error: {error}", file=sys.stderr)
        return 2
    if options.json:
        found = {
            "versions": report.versions(),
            "reports": [dataclasses.asdict(r) for r in reports],
        }
        with open(options.json, "w") as file:
            json.dump(found, file, indent=1)
    if options.markdown:
        with open(options.markdown, "w") as file:
            file.write(report.markdown(reports))
    return int(any(r.error is not None for r in reports))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tf_effopt.tpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        metavar="MODULE:FUNCTION",
        default="tf_effopt.tpu.__main__:resnet50",
        help="a function that makes a model; see above",
    )
    parser.add_argument(
        "--optimizer",
        nargs="+",
        metavar="NAME",
        help="of tf_effopt, with its defaults, in place of the model's own",
    )
    parser.add_argument("--topology", nargs="+", default=["v5e:2x2"], metavar="NAME")
    parser.add_argument("--batch-size", type=int, help="over all devices")
    parser.add_argument("--json", metavar="FILE", help="write the reports there")
    parser.add_argument("--markdown", metavar="FILE", help="write a table there")
    return parser


def resnet50() -> keras.Model:
    model = keras.applications.ResNet50(weights=None, classifier_activation=None)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(tf_effopt.AdamW(), loss)
    return model


def _named(name: str) -> Callable[[], keras.Model]:
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"--model takes MODULE:FUNCTION. Received: --model {name}")
    sys.path.insert(0, os.getcwd())
    return getattr(importlib.import_module(module), function)


def _with_optimizer(make_model: Callable, name: str | None) -> keras.Model:
    """The model, with an optimizer of tf_effopt if one is named."""
    try:
        model = make_model()
    except Exception as error:
        raise ModelFailed from error
    if name is not None and isinstance(model, keras.Model):
        cls = getattr(tf_effopt, name, None)
        if not (isinstance(cls, type) and issubclass(cls, tf_effopt.Optimizer)):
            hint = did_you_mean(name, tf_effopt.__all__)
            raise ValueError(f"tf_effopt has no optimizer {name!r}.{hint}")
        takes_roles = "roles" in inspect.signature(cls.__init__).parameters
        roles = {"roles": tf_effopt.roles(model)} if takes_roles else {}
        if model.compiled:  # its losses and metrics stay
            model.optimizer = cls(**roles)
        else:
            model.compile(cls(**roles))
    return model


if __name__ == "__main__":
    sys.exit(main())
