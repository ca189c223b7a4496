"""Starts several workers of one program on this machine.

    python -m tf_effopt.distribute.launch --workers 2 script.py --its options

Each worker runs `python script.py --its options` with its own TF_CONFIG, all on
free ports of 127.0.0.1; its output comes out line by line behind `[worker 0]`. If one
fails, the others are terminated, and its exit code is returned; SIGTERM, SIGHUP and Ctrl-C are
passed on. No worker outlives the launcher. If the output can't be written, as on a
full disk, they go on without.

For trying out on one machine what is to run on several: on one machine with several
GPUs the strategy `mirrored` is faster.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO

GRACE = 15.0  # seconds from SIGTERM to SIGKILL
POLL = 0.05  # seconds between two looks at the workers


def launch(
    command: Sequence[str],
    workers: int,
    *,
    gpus_per_worker: int = 0,
    grace: float = GRACE,
    output: IO[str] | None = None,
) -> int:
    """Runs the workers to their end.

    Args:
        command: what each worker runs.
        workers: int of at least 1, how many.
        gpus_per_worker: int, how many GPUs each worker sees, its own ones.
        grace: float, seconds that a worker has to end by itself once it is asked to.
        output: where the workers' output goes; None is standard output.

    Returns:
        The exit code: 0, or that of the first worker that failed; 128 and the
        signal's number if a signal ended it.
    """
    return _Workers(command, workers, gpus_per_worker, grace, output).run()


class _Workers:
    def __init__(
        self,
        command: Sequence[str],
        count: int,
        gpus_per_worker: int,
        grace: float,
        output: IO[str] | None,
    ):
        self.command = list(command)
        self.count = count
        self.gpus_per_worker = gpus_per_worker
        self.grace = grace
        self.output = output or sys.stdout  # None if it was closed before the start
        # The workers inherit this process's environment, and write in its encoding.
        self.encoding = getattr(self.output, "encoding", None) or "utf-8"
        self.has_failed = False  # the output
        self.processes: list[subprocess.Popen] = []
        self.deadline: float | None = None  # when those that still run are killed
        self.received: int | None = None  # a signal to pass on
        self.lock = threading.Lock()  # so that lines stay whole

    def run(self) -> int:
        signals = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
        handlers = {s: signal.signal(s, self._receive) for s in signals}
        try:
            return self._run()
        finally:
            self._kill()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _run(self) -> int:
        ports = free_ports(self.count)
        # All before any thread: the kernel ends them with the thread that made them.
        for i in range(self.count):
            self.processes.append(self._start(i, ports))
        readers = [
            threading.Thread(
                target=self._forward, args=(i, process.stdout), daemon=True
            )
            for i, process in enumerate(self.processes)
        ]
        for reader in readers:
            reader.start()
        code = self._wait()
        self._kill()
        for reader in readers:
            reader.join(timeout=5)
        return code

    def _start(self, index: int, ports: Sequence[int]) -> subprocess.Popen:
        config = {
            "cluster": {"worker": [f"127.0.0.1:{port}" for port in ports]},
            "task": {"type": "worker", "index": index},
        }
        first = index * self.gpus_per_worker
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        known = visible if visible != [""] else map(str, itertools.count())
        gpus = itertools.islice(known, first, first + self.gpus_per_worker)
        environment = os.environ | {
            "TF_CONFIG": json.dumps(config),
            "CUDA_VISIBLE_DEVICES": ",".join(gpus) or "-1",
            "PYTHONUNBUFFERED": "1",
        }
        return subprocess.Popen(
            self.command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, with all that it starts
            preexec_fn=_end_with_parent(),  # noqa: PLW1509 - no thread runs yet
        )

    def _wait(self) -> int:
        """Waits until all have ended; returns the exit code."""
        code, running = 0, dict(enumerate(self.processes))
        while running:
            if self.received is not None:
                self._end_others(running, "passed on", self.received)
                self.received = None
            for i, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[i]
                _signal_group(process, signal.SIGKILL)  # what it started and left
                if process.returncode and not code:
                    code = _exit_code(process.returncode)
                    if self.deadline is None:
                        reason = f"worker {i} {_how(process.returncode)}"
                        self._end_others(running, reason, signal.SIGTERM)
            late = self.deadline is not None and time.monotonic() > self.deadline
            if running and late:
                self._say(f"killing {_names(running)} after {self.grace:g} s")
                self._kill()
            time.sleep(POLL)
        return code

    def _end_others(
        self, running: dict[int, subprocess.Popen], reason: str, number: int
    ) -> None:
        name = signal.Signals(number).name
        if running:
            self._say(f"{reason}: {name} to {_names(running)}")
        self.deadline = time.monotonic() + self.grace
        for process in running.values():
            _signal_group(process, number)

    def _kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                _signal_group(process, signal.SIGKILL)
                process.wait()

    def _receive(self, number: int, frame: object) -> None:
        self.received = number

    def _forward(self, index: int, stream: IO[bytes]) -> None:
        for line in stream:
            text = line.decode(self.encoding, errors="replace")
            self._write(f"[worker {index}] {text}")

    def _say(self, message: str) -> None:
        self._write(f"[launch] {message}\n")

    def _write(self, line: str) -> None:
        """Raises nothing: a worker that nobody reads any more would block."""
        line = line if line.endswith("\n") else line + "\n"
        line = line.encode(self.encoding, errors="replace").decode(self.encoding)
        with self.lock:
            try:
                if self.output is not None:
                    self.output.write(line)
                    self.output.flush()
            except BrokenPipeError:
                pass  # who read it has read enough
            except (OSError, ValueError) as error:  # a full disk; a closed file
                self._say_that_output_fails(error)

    def _say_that_output_fails(self, error: Exception) -> None:
        if not self.has_failed:
            self.has_failed = True
            with contextlib.suppress(OSError, ValueError):
                print(
                    f"[launch] The output can't be written: {error}. The workers go on; "
                    "what they print meanwhile is lost.",
                    file=sys.stderr,
                )


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:  # all at once, so that they differ
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _end_with_parent() -> Callable[[], None] | None:
    """For Linux: has the kernel end a worker whose launcher was killed."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, set_death_signal = ctypes.CDLL(None).prctl, 1
    return lambda: prctl(set_death_signal, signal.SIGKILL)


def _signal_group(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _exit_code(returncode: int) -> int:
    return 128 - returncode if returncode < 0 else returncode


def _how(returncode: int) -> str:
    if returncode < 0:
        return f"was ended by {signal.Signals(-returncode).name}"
    return f"failed with exit code {returncode}"


def _names(running: dict[int, subprocess.Popen]) -> str:
    return "worker " + ", ".join(map(str, running))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tf_effopt.distribute.launch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workers", type=int, default=2, help="default: 2")
    parser.add_argument(
        "--gpus-per-worker", type=int, default=0, help="default: 0, the CPU"
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=GRACE,
        metavar="SECONDS",
        help=f"from asking a worker to end to killing it; default: {GRACE:g}",
    )
    parser.add_argument(
        "-m", dest="module", action="store_true", help="the script is a module's name"
    )
    parser.add_argument("script", help="what each worker runs")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"--workers must be at least 1. Received: {options.workers}")
    for name in ("gpus_per_worker", "grace"):
        if not getattr(options, name) >= 0:
            flag = "--" + name.replace("_", "-")
            parser.error(
                f"{flag} must be at least 0. Received: {getattr(options, name)}"
            )
    command = [sys.executable, *(["-m"] if options.module else [])]
    return launch(
        [*command, options.script, *options.arguments],
        options.workers,
        gpus_per_worker=options.gpus_per_worker,
        grace=options.grace,
    )


def _discard_what_cannot_be_written() -> None:
    # Python tries once more as it ends, and then makes the exit code 120.
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    exit_code = main()
    _discard_what_cannot_be_written()
    sys.exit(exit_code)
