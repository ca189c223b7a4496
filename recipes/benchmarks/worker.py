"""The process of one framework: makes updates and times them when asked.

Each framework has its own, so that their memory and threads stay apart; the
parent process says whose turn it is.
"""

from __future__ import annotations

import gc
import importlib.metadata
import math
import multiprocessing
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from competitors import Case, NoSuchRule, Update, make_update
from workloads import Workload

SHORTEST_SAMPLE = 20.0  # milliseconds


class Worker:
    """A framework's process, seen from the parent.

    Args:
        framework: what it imports.
        workload: what it updates.
        checkout: folder of the version of tf_effopt that it imports; None for the
            one that is installed.
    """

    def __init__(
        self, framework: str, workload: Workload, checkout: pathlib.Path | None = None
    ):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        environment = {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "2"}
        self.process = context.Process(
            target=serve,
            args=(theirs, framework, workload, environment, checkout),
            daemon=True,
        )
        self.process.start()
        theirs.close()

    def ask(self, *request: Any) -> Any:
        try:
            self.connection.send(request)
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            return {"error": f"failed: process ended, code {self.process.exitcode}"}

    def stop(self) -> None:
        self.connection.close()
        self.process.join()


def calls_of_a_sample(case: Case, milliseconds: float) -> int:
    """How many calls to time at once, if one takes so long: full cycles of them."""
    cycles = math.ceil(SHORTEST_SAMPLE / (milliseconds * case.calls))
    return cycles * case.calls


def start_framework(framework: str, replicas: int) -> dict[str, Any]:
    """Imports a framework and runs something, that no optimizer pays for it.

    Returns:
        Its versions and threads; of TensorFlow's, which tf_effopt it imported.
    """
    extra: dict[str, Any] = {}
    version = importlib.metadata.version
    if framework == "tensorflow":
        import tensorflow as tf

        # Many optimizers are compiled here: no advice on compiling too often.
        tf.get_logger().setLevel("ERROR")
        cpu = tf.config.list_physical_devices("CPU")[0]
        devices = [tf.config.LogicalDeviceConfiguration()] * replicas
        tf.config.set_logical_device_configuration(cpu, devices)
        tf.function(lambda x: x + 1, jit_compile=True)(tf.zeros(()))
        import keras

        import tf_effopt

        versions = {"tensorflow": tf.__version__, "keras": keras.__version__}
        versions["tf_effopt"] = tf_effopt.__version__
        extra["tf_effopt_file"] = tf_effopt.__file__
        intra_op = tf.config.threading.get_intra_op_parallelism_threads()
        threads: Any = intra_op or "default: one per core"
    elif framework == "jax":
        import jax
        import jax.numpy as jnp

        jax.jit(lambda x: x + 1)(jnp.zeros(())).block_until_ready()
        versions = {name: version(name) for name in ("jax", "jaxlib", "optax")}
        threads = "default: one per core"
    else:
        import torch

        (torch.zeros(1 << 20) + 1).sum().item()
        versions = {"torch": torch.__version__}
        versions["torch build"] = " ".join(torch.__config__.show().split())
        threads = torch.get_num_threads()
    return {"versions": versions, "threads": threads, **extra}


def serve(
    connection: Connection,
    framework: str,
    workload: Workload,
    environment: dict,
    checkout: pathlib.Path | None = None,
) -> None:
    """Answers the parent's requests `(name, *arguments)` until it is gone.

    An error is an answer, too: `{"error": message}`.
    """
    os.environ.update(environment)
    if checkout is not None:
        sys.path.insert(0, str(checkout))  # before what is installed
    updates: dict[str, Update] = {}

    def prepare(competitor: str, case: Case) -> dict[str, Any]:
        update = make_update(competitor, case, workload)
        start = time.perf_counter()
        update.build()
        update()
        seconds = time.perf_counter() - start
        for _ in range(case.calls - 1):
            update()
        updates[competitor] = update
        return {
            "first_call_seconds": seconds,
            "state_bytes": update.state_bytes(),
            "first_weights": update.first_weights().flat[:5].tolist(),
        }

    def time_calls(competitor: str, calls: int) -> float:
        update = updates[competitor]
        start = time.perf_counter()
        for _ in range(calls):
            update()
        return 1000 * (time.perf_counter() - start) / calls

    def drop_all() -> None:
        updates.clear()
        gc.collect()

    requests: dict[str, Callable] = {
        "start": lambda: start_framework(framework, workload.replicas),
        "prepare": prepare,
        "time_calls": time_calls,
        "drop_all": drop_all,
    }
    while True:
        try:
            name, *arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = requests[name](*arguments)
        except NoSuchRule:
            answer = {"error": "no such rule"}
        except Exception as error:  # noqa: BLE001  # A failure is a result.
            text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
            answer = {"error": f"failed: {type(error).__name__}: {text[:120]}"}
        connection.send(answer)
