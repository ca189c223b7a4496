"""Private names of Keras and TensorFlow, which a release may move or remove.

They are looked up when they are used, so that the package can be imported under a Keras
that it doesn't know, and an error names what is missing and in which version.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import keras

SUPPORTED = "Keras 3.15.1 to 3.16 and TensorFlow 2.19.1 to 2.22"


class PrivateName:
    """An attribute of a module, or of a class in it: `"module:Class.attribute"`.

    Args:
        *places: where it is, the newest version's first.
    """

    def __init__(self, *places: str):
        self.places = places

    def __repr__(self) -> str:
        return " or ".join(place.replace(":", ".") for place in self.places)

    def _found(self) -> tuple[Any, str] | None:
        for place in self.places:
            module, path = place.split(":")
            *owners, name = path.split(".")
            try:
                owner = importlib.import_module(module)
            except ImportError:
                continue
            for attribute in owners:
                owner = getattr(owner, attribute, None)
            if hasattr(owner, name):
                return owner, name
        return None

    def exists(self) -> bool:
        return self._found() is not None

    def place(self) -> tuple[Any, str]:
        """Its owner, in which it can be replaced, and its name there.

        Raises:
            RuntimeError: the installed version has it in none of its places.
        """
        found = self._found()
        if found is None:
            raise RuntimeError(message([repr(self)]))
        return found

    def get(self) -> Any:
        return getattr(*self.place())


def attribute(owner: Any, name: str) -> Any:
    """A private attribute of an object.

    Raises:
        RuntimeError: the installed version's objects don't have it.
    """
    if not hasattr(owner, name):
        raise RuntimeError(message([f"{type(owner).__name__}.{name}"]))
    return getattr(owner, name)


def message(missing: list[str]) -> str:
    """What to say of names that the installed packages don't have."""
    return (
        f"{_installed()} has no {', '.join(missing)}, which tf_effopt uses. Install "
        f"versions that this tf_effopt works with ({SUPPORTED}), or a newer tf_effopt."
    )


def _installed() -> str:
    tensorflow = sys.modules.get("tensorflow")  # not imported for this
    version = getattr(tensorflow, "__version__", None)
    return f"Keras {keras.__version__}" + (
        f" with TensorFlow {version}" if version else ""
    )
