"""The list of private names: all that are used are in it, and the list is true."""

from __future__ import annotations

import ast
import pathlib
import re
from collections.abc import Iterator

import keras
import pytest

import tf_effopt
from tf_effopt.runtime import private_names
from tf_effopt.runtime.private_names import Attributes, PrivateName

pytestmark = pytest.mark.versions

PACKAGE = pathlib.Path(tf_effopt.__file__).parent
LIST = PACKAGE / "runtime" / "private_names.py"
# Of jax and Python; jax's wheels are pinned together.
ELSEWHERE = {"tpu/compiler.py": ("jax._src",), "base/representation.py": ("_getframe",)}
IMPORTS = re.compile(r"keras\.src|tensorflow\.(python|compiler)|\._")


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in PACKAGE.rglob("*.py"):
        if path != LIST:
            yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined() -> set[str]:
    """The names of this package's own functions, classes and attributes."""
    names = set()
    for _, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names |= {node.attr} if is_self(node.value) else set()
    return names


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def listed() -> set[str]:
    kinds = [*private_names.OF_KERAS, *private_names.OF_TENSORFLOW]
    names = {name for kind in kinds for name in kind.names}
    return names | {
        place.rpartition(".")[2]
        for x in vars(private_names).values()
        if isinstance(x, PrivateName)
        for place in x.places
    }


def test_every_private_attribute_is_our_own_or_in_the_list():
    known = defined() | listed()
    unknown = [
        f"{file}:{node.lineno} {node.attr}"
        for file, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and is_private(node.attr)
        and node.attr not in (known | set(ELSEWHERE.get(file, ())))
    ]
    assert unknown == []


def test_private_modules_are_imported_by_the_list_only():
    found = []
    for file, tree in trees():
        for node in ast.walk(tree):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                modules = re.findall(
                    r"^(?:keras\.src|tensorflow\.python)\.\S+$", node.value
                )
            allowed = ELSEWHERE.get(file, ())
            found += [
                f"{file}:{node.lineno} {module}"
                for module in modules
                if IMPORTS.search(module) and not module.startswith(allowed or "\0")
            ]
    assert found == [
        "base/legacy_keras.py:7 tensorflow.python.keras"
    ]  # which it refuses


def test_all_of_them_exist():
    missing = private_names.missing()
    assert not missing, (
        f"These versions lack {missing}: find what took their place, and add it to "
        "tf_effopt/runtime/private_names.py."
    )


def test_the_check_finds_what_is_missing(monkeypatch):
    gone = PrivateName("keras.src.of_tomorrow:Class.method", "keras:Gone.method")
    lost = Attributes("Layer", ("_flatten_the_past",), keras.layers.Layer)
    monkeypatch.setattr(private_names, "SCALE_LOSS", gone)
    monkeypatch.setattr(private_names, "OF_KERAS", [*private_names.OF_KERAS, lost])
    assert private_names.missing() == [repr(gone), "Layer._flatten_the_past"]


def test_a_private_name_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(private_names, "OPTIMIZER", ("_name_of_the_past",))
    expected = rf"Keras {re.escape(keras.__version__)}.*Optimizer\._name_of_the_past"
    with pytest.raises(RuntimeError, match=expected):
        tf_effopt.SGD()
    with pytest.raises(RuntimeError, match=r"Dense\._flatten_the_past"):
        private_names.attribute(keras.layers.Dense(1), "_flatten_the_past")


def test_a_name_that_has_moved_is_found_where_it_is_now():
    moved = PrivateName("keras.src.of_tomorrow:function", "keras.tree:flatten")
    assert moved.get() is keras.tree.flatten
    gone = PrivateName("keras.src.of_tomorrow:Class.method", "keras:Gone.method")
    assert not gone.exists()
    with pytest.raises(
        RuntimeError, match=r"of_tomorrow\.Class\.method or keras\.Gone"
    ):
        gone.get()
