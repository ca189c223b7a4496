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
import types
from collections.abc import Callable, Sequence

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras

import tf_effopt
from tf_effopt import optimizers
from tf_effopt.engine.spelling import did_you_mean
from tf_effopt.tpu import compiler, report
from tf_effopt.tpu.steps import compile_train_step, compile_update


class ModelFailed(Exception):
    """The user's module or function raised what is its cause."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line for each compilation.

    Returns 0 if all compile, 1 if one doesn't, 2 for wrong arguments or a model that
    can't be made.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    for path in filter(None, (options.json, options.markdown)):
        _check_can_be_written(parser, path)
    reports: list[report.Report] = []
    try:
        compiler.check_installed()
        # Before the first compilation, which may take minutes.
        classes = [_optimizer(name) for name in options.optimizer or []]
        for topology in options.topology:
            compiler.topology_devices(topology)
        make_model = _named(options.model)
        for cls in classes or [None]:
            make = functools.partial(_with_optimizer, make_model, cls)
            for topology in options.topology:
                if options.batch_size is None:
                    reports.append(compile_update(make, topology))
                else:
                    reports.append(
                        compile_train_step(make, options.batch_size, topology)
                    )
                print(reports[-1], flush=True)
    except ModelFailed as failure:
        cause = failure.__cause__
        traceback.print_exception(cause.with_traceback(_users_part(cause)))
        print(
            f"tf_effopt.tpu: error: --model {options.model} failed, see above",
            file=sys.stderr,
        )
        return 2
    except (ImportError, ValueError) as error:
        print(f"tf_effopt.tpu: error: {error}", file=sys.stderr)
        return 2
    except Exception:  # noqa: BLE001 - 1 is for what doesn't compile, not for a fault
        traceback.print_exc()
        print("tf_effopt.tpu: error: no program was made, see above", file=sys.stderr)
        return 2
    finally:
        _write(reports, options)  # what was finished, even if the rest fails
    return int(any(r.error is not None for r in reports))


def _check_can_be_written(parser: argparse.ArgumentParser, path: str) -> None:
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        parser.error(f"there is no folder for {path}")
    if os.path.isdir(path):
        parser.error(f"{path} is a folder: name a file in it")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        parser.error(f"{path} can't be written")


def _write(reports: list[report.Report], options: argparse.Namespace) -> None:
    if options.json and reports:
        found = {
            "versions": report.versions(),
            "reports": [dataclasses.asdict(r) for r in reports],
        }
        with open(options.json, "w") as file:
            json.dump(found, file, indent=1)
    if options.markdown and reports:
        with open(options.markdown, "w") as file:
            file.write(report.markdown(reports))


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
    """The user's function; `--model MODULE:FUNCTION` names it."""
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"--model takes MODULE:FUNCTION. Received: --model {name}")
    if module.endswith(".py") or os.path.basename(module) != module:
        stem = os.path.basename(module).removesuffix(".py")
        raise ValueError(
            "--model takes a module as `import` does, not a file: in its folder, "
            f"--model {stem}:{function}. Received: --model {name}"
        )
    sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise ModelFailed from error  # one that the user's module imports
        raise ValueError(
            f"{error}: it is looked for in {os.getcwd()} and among what is "
            f"installed. Received: --model {name}"
        ) from error
    except (Exception, SystemExit) as error:
        raise ModelFailed from error
    functions = {n: value for n, value in vars(found).items() if callable(value)}
    if function not in functions:
        raise ValueError(
            f"{module} has no function {function!r}.{did_you_mean(function, functions)} "
            f"Received: --model {name}"
        )
    return functions[function]


def _optimizer(name: str) -> type[tf_effopt.Optimizer]:
    known = optimizers.__all__  # all can be made without arguments
    if name not in known:
        raise ValueError(
            f"tf_effopt has no optimizer {name!r} that can be made without arguments."
            f"{did_you_mean(name, known)} It has: {', '.join(known)}."
        )
    return getattr(optimizers, name)


def _with_optimizer(
    make_model: Callable, cls: type[tf_effopt.Optimizer] | None
) -> keras.Model:
    """The model, with an optimizer of tf_effopt if one is named."""
    try:
        model = make_model()
    except (Exception, SystemExit) as error:
        raise ModelFailed from error
    if cls is not None and isinstance(model, keras.Model):
        takes_roles = "roles" in inspect.signature(cls.__init__).parameters
        roles = {"roles": tf_effopt.roles(model)} if takes_roles else {}
        if model.compiled:  # its losses and metrics stay
            model.optimizer = cls(**roles)
        else:
            model.compile(cls(**roles))
    return model


def _users_part(error: BaseException) -> types.TracebackType | None:
    """The traceback of an error from the user's first line on."""
    part = error.__traceback__
    before = __file__, importlib.__file__
    while part is not None and (
        part.tb_frame.f_code.co_filename in before
        or part.tb_frame.f_code.co_filename.startswith("<frozen importlib")
    ):
        part = part.tb_next
    return part


if __name__ == "__main__":
    sys.exit(main())
