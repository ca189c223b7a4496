"""The examples in the docstrings run; the documents tell the truth."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pathlib
import pkgutil
import re

import keras
import pytest

import tf_effopt

ROOT = pathlib.Path(tf_effopt.__file__).parents[1]
MODULES = [
    module.name
    for module in pkgutil.walk_packages(tf_effopt.__path__, "tf_effopt.")
    if not module.name.endswith("engine.portable")
] + ["tf_effopt"]
PURE = [
    *(ROOT / "tf_effopt" / "optimizers").glob("*.py"),
    *(ROOT / "tf_effopt" / "transforms").glob("*.py"),
    *(ROOT / "tf_effopt" / "averaging").glob("*.py"),
    *(ROOT / "tf_effopt" / name for name in ("linalg.py", "random.py", "rules.py")),
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


@pytest.mark.parametrize("name", tf_effopt.__all__)
def test_every_public_class_has_an_example(name):
    thing = getattr(tf_effopt, name)
    if isinstance(thing, type):
        assert ">>> " in thing.__doc__
        assert "Args:" in thing.__doc__


def imported(path: pathlib.Path) -> set[str]:
    """The modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", PURE, ids=lambda path: path.name)
def test_a_rule_knows_no_backend_and_no_engine(path):
    for name in imported(path):
        assert not re.match(r"(tensorflow|jax|torch|tf_effopt\.engine)\b", name)


def test_the_engine_names_no_rule():
    rules = {p.stem for p in (ROOT / "tf_effopt" / "optimizers").glob("[a-z]*.py")}
    classes = set(tf_effopt.optimizers.__all__)
    for path in (ROOT / "tf_effopt" / "engine").glob("*.py"):
        words = set(re.findall(r"\w+", path.read_text()))
        assert not words & (rules | classes), path.name
        assert not any(
            "optimizers" in name for name in imported(path) if "keras" not in name
        )


# Parts that are imported when they are asked for.
DISTRIBUTE = ("fit", "hooks", "shares", "stand_ins", "strategies", "whole_batches")
TENSORFLOW = [
    "engine/flat_function.py",
    "engine/missing_gradients.py",
    "engine/programs.py",
    "engine/reduction.py",
    "engine/rows.py",
    "engine/tensorflow.py",
    "engine/watching.py",
    "engine/xla.py",
    *(f"distribute/{name}.py" for name in DISTRIBUTE),
    *(f"tpu/{name}.py" for name in ("replicas", "report", "steps")),
]


def test_tensorflow_is_imported_on_demand_only():
    package = ROOT / "tf_effopt"
    for path in package.rglob("*.py"):
        if path.relative_to(package).as_posix() not in TENSORFLOW:
            assert not any(n.startswith("tensorflow") for n in imported(path)), path


@pytest.mark.parametrize(
    "path",
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "recipes").rglob("*.md"),
    ],
    ids=lambda path: path.name,
)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_the_readme_names_tests_that_exist():
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"\[`(test_\w+)`\]\((tests/\w+\.py)\)", text)
    assert len(named) >= 9
    for test, path in named:
        assert f"def {test}(" in (ROOT / path).read_text(), f"{test} in {path}"


def test_the_table_of_optimizers_has_their_arguments_in_their_order():
    text = (ROOT / "docs" / "optimizers.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)\((.*?)\)`", text, re.MULTILINE))
    assert sorted(rows) == sorted(tf_effopt.optimizers.__all__)
    for name, shown in rows.items():
        signature = inspect.signature(getattr(tf_effopt, name))
        shared = {p.name for p in tf_effopt.Optimizer.shared_arguments()}
        own = [
            p
            for p in signature.parameters.values()
            if p.kind is not p.VAR_KEYWORD
            and not (p.kind is p.KEYWORD_ONLY and p.name in shared)
        ]
        expected = [(p.name, p.default, p.kind is p.KEYWORD_ONLY) for p in own]
        listed = shown.removesuffix(", ...")
        function = ast.parse(f"lambda {listed}: 0", mode="eval").body.args
        found = [
            (argument.arg, ast.literal_eval(default), is_keyword_only)
            for arguments, defaults, is_keyword_only in (
                (function.args, function.defaults, False),
                (function.kwonlyargs, function.kw_defaults, True),
            )
            for argument, default in zip(arguments, defaults, strict=True)
        ]
        if listed != shown:
            assert len(found) < len(expected), name
            expected = expected[: len(found)]
        assert found == expected, name


@pytest.mark.parametrize("name", tf_effopt.optimizers.__all__)
def test_every_optimizer_has_a_string_name(name):
    made = keras.optimizers.get(f"tf_effopt>{name}")
    assert type(made) is getattr(tf_effopt, name)
