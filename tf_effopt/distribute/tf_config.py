"""What TF_CONFIG says, checked before TensorFlow reads it.

TensorFlow itself either fails at a slip without naming it, or waits for workers that
no address leads to.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from typing import Any

TRAIN = ("chief", "worker")
TYPES = (*TRAIN, "evaluator", "ps")  # all that TensorFlow knows
EXAMPLE = json.dumps(
    {
        "cluster": {"worker": ["host0:12345", "host1:12345"]},
        "task": {"type": "worker", "index": 0},
    }
)


class _Unfit(Exception):
    """What is wrong, to stand within a sentence."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The workers of a training.

    Attributes:
        workers: their addresses, the chief's first.
        own: the address of this process.
    """

    workers: list[str]
    own: str


def read() -> Cluster:
    """Reads the environment variable TF_CONFIG.

    Raises:
        RuntimeError: it isn't there, or isn't as it must be.
    """
    text = os.environ.get("TF_CONFIG", "")
    try:
        return _cluster(text)
    except _Unfit as error:
        raise RuntimeError(
            f"TF_CONFIG doesn't fit 'multi_worker': {error}. Expected: the workers' "
            "addresses, and which one this is, in the environment variable "
            f"TF_CONFIG, such as {EXAMPLE}. To try it out on this machine: "
            "python -m tf_effopt.distribute.launch --workers 2 SCRIPT. "
            f"Received: TF_CONFIG={text!r}"
        ) from error


def named_workers() -> list[str]:
    """The addresses in a TF_CONFIG that says which of them this is, or none."""
    try:
        return read().workers
    except RuntimeError:
        return []


def _cluster(text: str) -> Cluster:
    """Raises `_Unfit`."""
    if not text.strip():
        raise _Unfit("it isn't set")
    try:
        config = json.loads(text)
    except ValueError as error:
        raise _Unfit(f"it isn't JSON: {error}") from error
    parts = _dictionary("it", config)
    lacking = [name for name in ("cluster", "task") if name not in parts]
    if lacking:
        raise _Unfit(f"it has no {lacking[0]!r}")
    cluster = {
        kind: _addresses(kind, tasks)
        for kind, tasks in _dictionary("'cluster'", parts["cluster"]).items()
    }
    kind, index = _task(_dictionary("'task'", parts["task"]), cluster)
    workers = [*cluster.get("chief", ()), *cluster.get("worker", ())]
    _check_that_others_find_them(workers)
    return Cluster(workers, cluster[kind][index])


def _dictionary(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Unfit(f"{name} must be a dictionary, not {json.dumps(value)}")
    return value


def _addresses(kind: str, tasks: Any) -> list[str]:
    """Those of one type of task, in the order of their indices."""
    if kind not in TYPES:
        known = ", ".join(map(repr, TYPES))
        raise _Unfit(f"'cluster' has {kind!r}, which is none of {known}")
    if isinstance(tasks, dict):  # of index to address, as TensorFlow allows
        indices = [str(i) for i in range(len(tasks))]
        if set(tasks) != set(indices):
            raise _Unfit(
                f"the indices of {kind!r} must be those from 0 on, each once, not "
                f"{', '.join(tasks)}"
            )
        tasks = [tasks[i] for i in indices]
    if not isinstance(tasks, list):
        raise _Unfit(
            f"{kind!r} in 'cluster' must be a list of addresses, such as "
            f'["host0:12345"], not {json.dumps(tasks)}'
        )
    for address in tasks:
        if not _is_address(address):
            raise _Unfit(
                f"an address of {kind!r} must be HOST:PORT, without http://, the port "
                f"at most 65535; this one is {json.dumps(address)}"
            )
    if kind in ("chief", "evaluator") and len(tasks) > 1:
        raise _Unfit(f"there may be one {kind!r}, not {len(tasks)}")
    return tasks


def _is_address(value: Any) -> bool:
    # TensorFlow takes this machine where there is no host.
    found = isinstance(value, str) and re.fullmatch(r"[^/\s]*:([0-9]{1,5})", value)
    return bool(found) and int(found[1]) < 2**16


def _task(task: dict[str, Any], cluster: dict[str, list[str]]) -> tuple[str, int]:
    """Type and index of this process."""
    kind = task.get("type")
    if kind not in TRAIN:
        raise _Unfit(
            "the 'type' of 'task' must be 'chief' or 'worker', since no other trains "
            "(for an evaluator, take the strategy 'none' or 'mirrored'), not "
            f"{json.dumps(kind)}"
        )
    count = len(cluster.get(kind, ()))
    try:
        index = int(task.get("index"))
    except (TypeError, ValueError, OverflowError):
        index = -1
    if not 0 <= index < count:
        raise _Unfit(
            f"the 'index' of 'task' must be that of one of the {count} addresses of "
            f"{kind!r}, from 0, not {json.dumps(task.get('index'))}"
        )
    return kind, index


def _check_that_others_find_them(workers: list[str]) -> None:
    for address in workers if len(workers) > 1 else ():
        if workers.count(address) > 1:
            raise _Unfit(f"two workers have the address {address!r}")
        if int(address.rpartition(":")[2]) == 0:  # any that is free: for one alone
            raise _Unfit(f"with several workers no port may be 0, as in {address!r}")
