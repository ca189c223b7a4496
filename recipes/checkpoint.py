"""One file that holds all of a training run, and that a kill can't harm.

Keras's own checkpoints leave out the state of seed generators, so that dropout
draws other masks after a resumption, and spread a run over several files.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

HEADER = "header"


class CheckpointError(Exception):
    """A checkpoint can't be read, or belongs to another run."""


def unreadable(path: Path, what: str, error: Exception) -> CheckpointError:
    """What to raise for a file that isn't what it should be."""
    # --overwrite deletes files, no folders.
    advice = "." if path.is_dir() else ", or pass --overwrite to start anew."
    return CheckpointError(
        f"{path} can't be read as {what} ({error}). Move it away{advice}"
    )


def fingerprint(path: Path) -> int:
    """A number below a million that tells one checkpoint from another, 0 for none.

    Raises:
        CheckpointError: it can't be read.
    """
    if not path.exists():
        return 0
    try:
        return 1 + zlib.crc32(path.read_bytes()) % 999_999
    except OSError as error:
        raise unreadable(path, "a checkpoint", error) from error


def write(path: Path, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Writes a checkpoint so that `path` holds the old one or the new one whole.

    Args:
        path: the file, in an existing folder.
        header: what JSON can hold.
        arrays: by name; the name `"header"` is taken.
    """
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    with written_aside(path) as aside, open(aside, "wb") as file:
        np.savez(file, **{HEADER: text}, **arrays)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(path.parent)


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yields where to write a file, which then takes its place, or is deleted."""
    aside = path.with_suffix(".tmp" + path.suffix)
    try:
        yield aside
        os.replace(aside, path)
    except BaseException:
        # What went wrong is to be told, not that this does, too.
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """Returns the header and the arrays, or None if there is no checkpoint.

    Raises:
        CheckpointError: the file isn't a checkpoint.
    """
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return json.loads(arrays.pop(HEADER).tobytes()), arrays
    except Exception as error:
        raise unreadable(path, "a checkpoint", error) from error


def check_parts(saved: Any, kinds: dict[str, type]) -> None:
    """Raises `ValueError` if what JSON held has no parts of these names and types."""
    for name, kind in kinds.items():
        if not isinstance(saved, dict) or name not in saved:
            raise ValueError(f"it has no {name!r}")
        found = type(saved[name])
        if found is not kind:
            raise ValueError(
                f"its {name!r} is of type {found.__name__}, not {kind.__name__}"
            )


def check_same_run(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raises `CheckpointError` if two configurations differ."""
    differences = [
        f"{key}: {there.get(key)!r} there, {here.get(key)!r} here"
        for key in dict.fromkeys([*there, *here])
        if there.get(key) != here.get(key)
    ]
    if differences:
        raise CheckpointError(
            f"{path} was written with another configuration "
            f"({'; '.join(differences)}). Pass the same configuration to go on with "
            "it, another --output-dir to keep it, or --overwrite to start anew."
        )


def model_state(model: keras.Model) -> dict[str, keras.Variable]:
    """A model's variables by name: weights, statistics, seed generators."""
    # `model.weights` leaves the seed generators' out, `model.variables` doesn't.
    return _by_name("model", model.variables)


def training_state(model: keras.Model) -> dict[str, keras.Variable]:
    """All variables that training changes: the model's and the optimizer's."""
    return model_state(model) | _by_name("optimizer", model.optimizer.variables)


def metrics_state(model: keras.Model) -> dict[str, keras.Variable]:
    """What a model's metrics have summed up in this epoch."""
    return _by_name("metrics", model.metrics_variables)


def values(state: dict[str, keras.Variable]) -> dict[str, np.ndarray]:
    return {k: keras.ops.convert_to_numpy(v) for k, v in state.items()}


def restore(state: dict[str, keras.Variable], arrays: dict[str, np.ndarray]) -> None:
    """Assigns saved values to variables.

    Raises:
        CheckpointError: they are those of another model or optimizer.
    """
    check_fit(state, arrays)
    for name, variable in state.items():
        variable.assign(arrays[name])


def check_fit(state: dict[str, keras.Variable], arrays: dict[str, np.ndarray]) -> None:
    """Raises `CheckpointError` if saved values aren't those of these variables."""
    difference = ""
    if names := sorted(state.keys() ^ arrays.keys()):
        difference = f"only one of the two has {names[0]}"
    else:
        for name, variable in state.items():
            there, here = arrays[name].shape, tuple(variable.shape)
            if there != here:
                difference = f"{name} is of shape {there} there, {here} here"
                break
    if difference:
        raise CheckpointError(
            f"The checkpoint doesn't fit this model and optimizer: {difference}. "
            "Pass --overwrite to start anew."
        )


def _by_name(group: str, variables: list[keras.Variable]) -> dict[str, keras.Variable]:
    return {f"{group}/{i:03d}/{v.path}": v for i, v in enumerate(variables)}


def _sync_folder(folder: Path) -> None:
    """Makes a renaming last through a power failure, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
