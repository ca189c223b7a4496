"""libtpu's compiler, by the private names of jax that lead to it.

All that isn't public in jax is here, so the three wheels are pinned together:

- `jax._src.lib._jax.mlir.hlo_to_stablehlo`
- `jax._src.interpreters.mlir.make_ir_context`, `jaxlib.mlir.ir`
- `jax._src.lib.xla_client`: `CompileOptions`, `DeviceAssignment`, `DeviceList`
- of a device `client.compile`; of what that returns `get_compiled_memory_stats`
  and `hlo_modules`
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import math
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

PINNED = {"jax": "0.10.2", "jaxlib": "0.10.2", "libtpu": "0.0.52"}
EXTRA = "tf_effopt[tpu-compile]"
# libtpu reads them when it is loaded: no metadata server is asked for a TPU, and
# several processes may compile at once.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
TOPOLOGIES = "v4:2x2x1, v5e:2x2, v5e:4x4, v5p:2x2x1, v6e:2x2"  # some that exist
# What may be asked for, (chips along x, y and z; chips): the largest slice that is
# documented, however it lies. libtpu ends the process for some that are larger.
LARGEST = {
    "v2": ((16, 16, 1), 256),
    "v3": ((32, 32, 1), 1024),
    "v4": ((16, 16, 16), 4096),
    "v5e": ((16, 16, 1), 256),
    "v5p": ((28, 28, 28), 8960),
    "v6e": ((16, 16, 1), 256),
    "tpu7x": ((24, 24, 24), 9216),
}


class CompileError(Exception):
    """The compiler refused a program; the message says why."""


class OutOfMemory(CompileError):
    """The program needs more memory than a device has.

    Attributes:
        needed, available: in GiB.
    """

    def __init__(self, needed: float, available: float):
        super().__init__(
            f"out of memory: it needs {needed:.2f} GiB of the {available:.2f} GiB "
            "of a device"
        )
        self.needed = needed
        self.available = available


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program for TPU.

    Attributes:
        argument_bytes: of its inputs, on one device.
        alias_bytes: of the inputs whose place its outputs take.
        output_bytes: of its outputs, aliased ones included.
        temporary_bytes: of what it needs besides.
        code_bytes: of the program itself.
        text: the optimized program; None if jaxlib can't read what libtpu made.
    """

    argument_bytes: int
    alias_bytes: int
    output_bytes: int
    temporary_bytes: int
    code_bytes: int
    text: str | None


def check_installed() -> None:
    """Raises `ImportError` if the compiler isn't there, or isn't the one known."""
    versions = {}
    for name in PINNED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    if versions == PINNED:
        return
    raise ImportError(
        "To compile for TPU needs "
        + ", ".join(f"{name} {version}" for name, version in PINNED.items())
        + f", in an environment without tensorflow-tpu: pip install '{EXTRA}'. Found: "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
    )


@functools.cache
def topology_devices(topology: str) -> tuple[Any, ...]:
    """The devices of a TPU slice, such as `"v5e:2x2"`; none of them is here.

    Raises:
        ValueError: there is no such topology.
        ImportError: the compiler isn't installed.
    """
    fault = _fault_of(topology)
    if fault:
        raise _no_such(topology, fault)
    check_installed()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import jax
    from jax.experimental import topologies

    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology
        )
    except jax.errors.JaxRuntimeError as error:
        raise _no_such(topology, str(error).splitlines()[0]) from error
    return tuple(description.devices)


def _fault_of(topology: str) -> str | None:
    """What is wrong with a name, as far as libtpu can't be asked."""
    form = re.fullmatch(r"(\w+):([0-9]+)x([0-9]+)(?:x([0-9]+))?", topology)
    if form is None:
        return "a name is a chip and two or three sizes"
    chip, *sizes = form.groups(default="1")
    if chip not in LARGEST:
        return f"chips are {', '.join(LARGEST)}"
    sides, chips = LARGEST[chip]
    numbers = [int(size) for size in sizes]
    if 0 in numbers:
        return "a size is at least 1"
    too_long = any(n > side for n, side in zip(numbers, sides, strict=True))
    if too_long or math.prod(numbers) > chips:
        largest = "x".join(map(str, sides))
        return f"{chip} has at most {chips} chips, within {largest}"
    return None


def _no_such(topology: str, fault: str) -> ValueError:
    return ValueError(
        f"There is no such topology; some are {TOPOLOGIES}. Received: "
        f"topology={topology!r} ({fault})"
    )


def compile_hlo(
    hlo: bytes, topology: str, replicas: int, overwritten: int = 0
) -> Compiled:
    """Compiles a program for the first `replicas` devices of a topology.

    Args:
        hlo: a serialized `HloModuleProto`, as TensorFlow lowers it for a CPU.
        topology: such as `"v5e:2x2"`.
        replicas: how many devices run the program, each on its own data.
        overwritten: how many of the first outputs take the place of the first inputs.

    Raises:
        CompileError: the compiler refused it.
    """
    devices = topology_devices(topology)[:replicas]
    import jax
    from jax._src.interpreters import mlir
    from jax._src.lib import _jax, xla_client
    from jaxlib.mlir import ir

    options = xla_client.CompileOptions()
    options.num_replicas = replicas
    options.num_partitions = 1
    options.device_assignment = xla_client.DeviceAssignment.create(
        np.arange(replicas).reshape(replicas, 1)
    )
    with mlir.make_ir_context():
        module = ir.Module.parse(_jax.mlir.hlo_to_stablehlo(hlo))
        _alias(module, overwritten)
        for operation in list(_operations(module.operation)):
            if operation.name == "mhlo.copy":  # which libtpu can't read
                operation.results[0].replace_all_uses_with(operation.operands[0])
                operation.erase()
            elif _draws_as_a_tpu_would(operation):
                # TensorFlow's choice for a TPU, where Keras leaves it open.
                default = ir.Attribute.parse("#stablehlo<rng_algorithm DEFAULT>")
                operation.attributes["rng_algorithm"] = default
        try:
            executable = devices[0].client.compile(
                module, xla_client.DeviceList(devices), options
            )
        except jax.errors.JaxRuntimeError as error:
            raise _in_words(str(error)) from error
    memory = executable.get_compiled_memory_stats()
    return Compiled(
        memory.argument_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.output_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        _text(executable),
    )


def _alias(module: Any, overwritten: int) -> None:
    """Lets the first outputs take the place of the first inputs, one by one."""
    from jaxlib.mlir import ir

    if not overwritten:
        return
    pairs = [
        f'{{alias = {{kind = "may_alias", parameter_index = array<i64>, '
        f"parameter_number = {i} : i64}}, output_index = array<i64: {i}>}}"
        for i in range(overwritten)
    ]
    name = "mhlo.input_output_alias"
    of_variables = str(module.operation.attributes[name]).strip("[]")
    module.operation.attributes[name] = ir.Attribute.parse(
        f"[{', '.join([*pairs, of_variables])}]"
    )


def _text(executable: Any) -> str | None:
    import jax

    try:
        return executable.hlo_modules()[0].to_string()
    except jax.errors.JaxRuntimeError:  # of some asynchronous instructions
        return None


def _draws_as_a_tpu_would(operation: Any) -> bool:
    """Whether random bits can be those of a TPU's own generator, by their state."""
    return (
        operation.name == "stablehlo.rng_bit_generator"
        and str(operation.operands[0].type) == "tensor<2xui64>"
    )


def _operations(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region:
            for inner in list(block):
                yield from _operations(inner.operation)
                yield inner.operation


def _in_words(message: str) -> CompileError:
    sizes = re.search(
        r"\(([\d.]+)([KMG])\) exceeds available HBM \(([\d.]+)G\)", message
    )
    if "RESOURCE_EXHAUSTED" in message and sizes:
        unit = {"K": 2**-20, "M": 2**-10, "G": 1.0}[sizes[2]]
        return OutOfMemory(float(sizes[1]) * unit, float(sizes[3]))
    return CompileError(message.partition("\nSee https")[0].strip())
