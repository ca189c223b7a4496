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
    if not module.name.endswith("runtime.portable")
] + ["tf_effopt"]
PURE = [
    *(ROOT / "tf_effopt" / "optimizers").glob("*.py"),
    *(ROOT / "tf_effopt" / "transforms").glob("*.py"),
    *(ROOT / "tf_effopt" / "averaging").glob("*.py"),
    *(
        ROOT / "tf_effopt" / name
        for name in ("engine/linalg.py", "engine/clipping.py", "rules.py")
    ),
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
def test_a_rule_knows_no_backend(path):
    for name in imported(path):
        assert not re.match(r"(tensorflow|jax|torch)\b", name)


LOOSE = {"rules"}
MATHS = {"engine.linalg", "engine.clipping"}
BELOW = {"state", "hyperparameters"} | LOOSE
# Folder -> what its modules may import of the package, besides each other.
ARROWS = {
    "state": set(),
    "rules": set(),
    "hyperparameters": {"state"},
    "engine": BELOW,
    "runtime": {"engine"} | BELOW,
    "base": {"runtime", "engine"} | BELOW,
    "conversion": {"base"} | BELOW,
    "optimizers": {"base", "conversion"} | MATHS | BELOW,
    "transforms": {"base"} | MATHS | BELOW,
    "averaging": {"base"} | MATHS | BELOW,
    "callbacks": {"base", "runtime"} | BELOW,
    "communication": {"base", "runtime"} | BELOW,
    "training": {"base", "runtime", "communication", "distribute.tf_config"} | BELOW,
    "distribute": {"base", "runtime", "communication", "training"} | BELOW,
    "tpu": {"base", "runtime", "engine", "optimizers"} | BELOW,
}
PACKAGE = ROOT / "tf_effopt"


def test_the_folders_are_those_of_the_arrows():
    found = {x.stem for x in PACKAGE.iterdir() if not x.name.startswith("__")}
    # `py.typed`; a name of version 0.1.0.
    assert found == set(ARROWS) | {"py", "linalg"}


def test_names_of_version_0_1_0_are_importable():
    from tf_effopt import linalg
    from tf_effopt.transforms import clipping

    assert (
        linalg.orthogonalized
        is importlib.import_module("tf_effopt.engine.linalg").orthogonalized
    )
    assert callable(clipping.shrink)


@pytest.mark.parametrize("folder", ARROWS)
def test_imports_point_one_way(folder):
    files = (
        [PACKAGE / f"{folder}.py"]
        if folder in LOOSE
        else PACKAGE.glob(f"{folder}/*.py")
    )
    for path in files:
        for name in own_imports(path):
            top = name.partition(".")[0]
            allowed = ARROWS[folder] | {folder}
            assert top in allowed or name in allowed, f"{path} imports {name}"


def own_imports(path: pathlib.Path) -> set[str]:
    """The modules of the package that a file imports, without "tf_effopt."."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "tf_eff"
        ):
            inner = node.module.partition(".")[2]
            for alias in node.names:
                full = f"{inner}.{alias.name}".strip(".")
                is_module = (PACKAGE / f"{full.replace('.', '/')}.py").exists()
                is_folder = (PACKAGE / full.replace(".", "/")).is_dir()
                found.add(full if is_module or is_folder else inner)
    return found - {""}


def test_the_engine_names_no_rule():
    rules = {p.stem for p in (PACKAGE / "optimizers").glob("[a-z]*.py")}
    classes = set(tf_effopt.optimizers.__all__)
    for path in [*PACKAGE.glob("engine/*.py"), *PACKAGE.glob("runtime/*.py")]:
        words = set(re.findall(r"\w+", path.read_text()))
        assert not words & (rules | classes), path.name


# Parts that are imported when they are asked for.
TENSORFLOW = [
    "distribute/strategies.py",
    "runtime/choice.py",
    "runtime/flat_function.py",
    "runtime/missing_gradients.py",
    "runtime/programs.py",
    "runtime/reduction.py",
    "runtime/rows.py",
    "runtime/tensorflow.py",
    "runtime/tracing.py",
    "runtime/variables.py",
    "runtime/watching.py",
    "runtime/xla.py",
    *(
        f"training/{name}.py"
        for name in (
            "fit",
            "keras_patches",
            "loss_weighting",
            "padding",
            "data_sharding",
        )
    ),
    *(f"tpu/{name}.py" for name in ("replicas", "report", "steps")),
]


def test_tensorflow_is_imported_on_demand_only():
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).as_posix() in TENSORFLOW:
            continue
        tree = ast.parse(path.read_text())
        # In a function it is imported when that is called.
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        within = {id(n) for f in functions for n in ast.walk(f)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import) and id(node) not in within:
                names = [alias.name for alias in node.names]
                assert not any(n.startswith("tensorflow") for n in names), path


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
