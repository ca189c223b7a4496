"""Kills a training run again and again; its end must not show it.

    python tests/resume_kills.py --kills 20

trains `recipes/image_classification.py` once without interruption, and once
with SIGKILLs: half of them at random moments, half while the checkpoint is being
written. All weights, statistics, seed generators, optimizer state and metrics
must end with the same bits. Needs no internet; takes some minutes.

Further arguments are the recipe's: `--strategy mirrored`, `--optimizer SGD`. With
`--workers 2` the recipe runs on several workers, and each kill is one of a random
worker; the others have to end by themselves.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
# Dropout and augmentation are on; early stopping has a state, but never stops.
OPTIONS = ("--model", "cnn", "--early-stopping", "1000", "--batch-size", "64")
TIME_LIMIT = 300  # seconds for one start of the recipe
END_LIMIT = 60  # seconds for the other workers to end


@dataclasses.dataclass(frozen=True)
class Kill:
    """When to kill.

    Attributes:
        checkpoints: how many to wait for in this start of the recipe.
        fraction: of an epoch (of the time until the first checkpoint, if that
            isn't waited for) to wait then; None: until the next checkpoint is
            being written.
        victim: which of several workers, from 0 to 1.
    """

    checkpoints: int
    fraction: float | None
    victim: float = 0.0


class Finished(Exception):
    """The run was through before it could be killed."""


def start(folder: Path, options: Sequence[str], workers: int = 1) -> subprocess.Popen:
    command = [sys.executable]
    if workers > 1:
        command += ["-m", "tf_effopt.distribute.launch", "--workers", str(workers)]
        options = ["--strategy", "multi_worker", *options]
    command += ["-m", "recipes.image_classification"]
    command += [*OPTIONS, *options, "--output-dir", str(folder)]
    with open(f"{folder}.log", "a") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def processes(process: subprocess.Popen, workers: int) -> list[int]:
    """The ids of what `start` started: of the workers, if there are several."""
    if workers == 1:
        return [process.pid]
    pid = process.pid
    return [
        int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ]


def complete(folder: Path, options: Sequence[str], workers: int = 1) -> float:
    """Runs the recipe to its end; returns the seconds."""
    started = time.monotonic()
    process = start(folder, options, workers)
    try:
        code = process.wait(TIME_LIMIT * 4)
    finally:
        process.kill()
        process.wait()
    if code:
        raise RuntimeError(f"exit code {code}:\n{Path(f'{folder}.log').read_text()}")
    return time.monotonic() - started


def killed(
    folder: Path,
    options: Sequence[str],
    kill: Kill,
    startup: float,
    epoch: float,
    workers: int = 1,
) -> bool:
    """Starts the recipe and kills it; returns whether a write was cut off."""
    checkpoint, aside = folder / "checkpoint.npz", folder / "checkpoint.tmp.npz"
    aside.unlink(missing_ok=True)
    process = start(folder, options, workers)
    try:
        for _ in range(kill.checkpoints):
            before = identity(checkpoint)
            wait_for(process, lambda: identity(checkpoint) != before)  # noqa: B023
        if kill.fraction is None:
            wait_for(process, aside.exists)
        else:
            pause = epoch if kill.checkpoints else startup
            time.sleep(kill.fraction * pause)
        # The launcher takes a while to start them.
        wait_for(process, lambda: len(processes(process, workers)) == workers)
        if process.poll() is not None:
            raise Finished
        victim = processes(process, workers)[int(kill.victim * workers)]
        os.kill(victim, signal.SIGKILL)
        process.wait(END_LIMIT)
    finally:
        process.kill()
        process.wait()
    return aside.exists()


def identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def wait_for(process: subprocess.Popen, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIME_LIMIT
    while not condition():
        if process.poll() is not None:
            raise Finished
        if time.monotonic() > deadline:
            raise TimeoutError(f"Nothing happened in {TIME_LIMIT} seconds.")
        time.sleep(0.0003)  # a checkpoint is written in some milliseconds


def differences(a: Path, b: Path) -> list[str]:
    """What isn't bit-identical in two finished runs; seconds don't count."""
    with np.load(a / "checkpoint.npz") as one, np.load(b / "checkpoint.npz") as two:
        names = set(one.files) ^ set(two.files)
        for name in set(one.files) & set(two.files) - {"header"}:
            if one[name].tobytes() != two[name].tobytes():
                names.add(name)
        headers = [json.loads(x["header"].tobytes())["progress"] for x in (one, two)]
    results = [json.loads((x / "metrics.json").read_text()) for x in (a, b)]
    for found in (*headers, *results):
        found.pop("seconds", None)
        for record in found["history"]:
            del record["seconds"]
    names |= {f"progress/{k}" for k, v in headers[0].items() if v != headers[1][k]}
    names |= {f"metrics/{k}" for k, v in results[0].items() if v != results[1][k]}
    return sorted(names)


def compare(
    kills: Sequence[Kill],
    options: Sequence[str],
    folder: Path,
    workers: int = 1,
    verbose: bool = False,
) -> tuple[list[str], int]:
    """Trains with and without kills.

    Returns:
        What differs at the end, and how many writes of a checkpoint were cut off.

    Raises:
        RuntimeError: there were fewer epochs than these kills need.
    """
    smooth, rough = folder / "smooth", folder / "rough"
    total = complete(smooth, options, workers)
    history = json.loads((smooth / "metrics.json").read_text())["history"]
    epoch = float(np.median([record["seconds"] for record in history]))
    startup = total - epoch * (len(history) - 1)
    if verbose:
        print(f"uninterrupted: {len(history)} epochs, {total:.0f} s", flush=True)
    cut_off = 0
    for number, kill in enumerate(kills, 1):
        try:
            cut = killed(rough, options, kill, startup, epoch, workers)
        except Finished:
            raise RuntimeError(
                f"The run was through after {number - 1} kills: pass more --epochs."
            ) from None
        cut_off += cut
        if verbose:
            what = "while a checkpoint was written" if cut else "between two writes"
            print(f"kill {number}: {what}", flush=True)
    complete(rough, options, workers)
    return differences(smooth, rough), cut_off


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", help="default: 8 for each kill")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--random-seed", type=int, help="of the moments")
    arguments, options = parser.parse_known_args()
    draw = random.Random(arguments.random_seed)
    kills = [
        Kill(draw.randrange(3), None if i % 2 else draw.random(), draw.random())
        for i in range(arguments.kills)
    ]
    options += ["--epochs", arguments.epochs or str(8 * arguments.kills)]
    with tempfile.TemporaryDirectory() as folder:
        options += ["--data-dir", os.path.join(folder, "data")]
        different, cut_off = compare(
            kills, options, Path(folder), arguments.workers, verbose=True
        )
    print(f"{len(kills)} kills, {cut_off} of them while a checkpoint was written.")
    print(f"Different: {different}" if different else "All bits are equal.")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
