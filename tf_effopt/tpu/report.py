"""What a compiled program needs, as text and as tables."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Iterable, Sequence

import keras
import tensorflow as tf

import tf_effopt
from tf_effopt.tpu import compiler, hlo
from tf_effopt.tpu.compiler import Compiled


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of a compilation for TPU. All bytes are those of one device.

    Attributes:
        optimizer: its class.
        compiled: what was compiled, such as `"update of resnet50"`.
        topology: for which TPU, such as `"v5e:2x2"`.
        replicas: how many of its devices, each with its own part of the data.
        state_bytes: weights and optimizer state.
        error: None if it compiles, else why it doesn't.
        argument_bytes: weights, state, and gradients or the batch.
        alias_bytes: of weights and state, what is updated in place.
        temporary_bytes: what is needed besides.
        hbm_bytes: read from and written to the device's memory.
        cycles: the compiler's estimate of the computations, without copies and
            collectives. No time.
        all_reduces: for each the dtypes that it carries.
        summed_bytes: of what they sum up, what isn't kept in vector memory.
        other_collectives: kind -> how many.
        unknown_loops: loops of unknown length, which count once.
        has_float64: whether float64, which a TPU emulates, is in the program.
        is_read: whether the program could be read; else the fields from `hbm_bytes`
            on are empty.
    """

    optimizer: str
    compiled: str
    topology: str
    replicas: int
    state_bytes: int = 0
    error: str | None = None
    argument_bytes: int = 0
    alias_bytes: int = 0
    temporary_bytes: int = 0
    hbm_bytes: int = 0
    cycles: int = 0
    all_reduces: list[list[str]] = dataclasses.field(default_factory=list)
    summed_bytes: int = 0
    other_collectives: dict[str, int] = dataclasses.field(default_factory=dict)
    unknown_loops: int = 0
    has_float64: bool = False
    is_read: bool = True

    def __str__(self) -> str:
        start = (
            f"{self.optimizer}, {self.compiled}, {self.topology} "
            f"({self.replicas} replicas): "
        )
        if self.error is not None:
            return f"{start}doesn't compile: {self.error}"
        memory = (
            f"compiles; {_mb(self.argument_bytes)} MB of arguments, "
            f"{_mb(self.alias_bytes)} MB of them updated in place, "
            f"{_mb(self.temporary_bytes)} MB of temporaries; "
        )
        if not self.is_read:
            return f"{start}{memory}the rest of the program can't be read"
        loops = f", {self.unknown_loops} loops counted once" * bool(self.unknown_loops)
        return f"{start}{memory}" + (
            f"{_mb(self.hbm_bytes)} MB of HBM traffic, {self.cycles:,} estimated "
            f"cycles{loops}; {len(self.all_reduces)} all-reduces"
        )


def filled_in(blank: Report, program: Compiled, not_state: int) -> Report:
    """A report with what the compiled program needs.

    `not_state`: bytes of what it writes in the place of something else.
    """
    memory = dataclasses.replace(
        blank,
        argument_bytes=program.argument_bytes,
        alias_bytes=program.alias_bytes - not_state,
        temporary_bytes=program.temporary_bytes,
    )
    if program.text is None:
        return dataclasses.replace(memory, is_read=False)
    costs = hlo.costs(program.text)
    others = {kind: len(x) for kind, x in costs.collectives.items()}
    others.pop("all-reduce", None)
    return dataclasses.replace(
        memory,
        hbm_bytes=costs.hbm_bytes,
        cycles=costs.cycles,
        all_reduces=costs.collectives.get("all-reduce", []),
        summed_bytes=costs.summed_bytes,
        other_collectives=others,
        unknown_loops=costs.unknown_loops,
        has_float64=costs.has_float64,
    )


def failed(blank: Report, error: Exception) -> Report:
    """A report of why there is no program."""
    return dataclasses.replace(blank, error=str(error).strip().splitlines()[0])


def versions() -> dict[str, str]:
    """Of all that had a part in a compilation."""
    return {
        "tf_effopt": tf_effopt.__version__,
        "keras": keras.__version__,
        "tensorflow": tf.__version__,
        **{name: importlib.metadata.version(name) for name in compiler.PINNED},
    }


COLUMNS = (
    "optimizer",
    "compiled",
    "topology",
    "replicas",
    "arguments, MB",
    "in place, MB",
    "temporaries, MB",
    "HBM traffic, MB",
    "estimated cycles",
    "all-reduces",
)


def markdown(reports: Iterable[Report]) -> str:
    """A table, one line for each report."""
    rows = [_line(COLUMNS), _line(["---"] * len(COLUMNS))]
    return "\n".join([*rows, *(_line(_cells(r)) for r in reports), ""])


def _cells(report: Report) -> list[str]:
    r = report
    cells = [f"`{r.optimizer}`", r.compiled, r.topology, str(r.replicas)]
    if r.error is not None:
        return [*cells, r.error, *[""] * (len(COLUMNS) - len(cells) - 1)]
    sizes = [r.argument_bytes, r.alias_bytes, r.temporary_bytes]
    if not r.is_read:
        return [*cells, *map(_mb, sizes), "not readable", "", ""]
    sizes.append(r.hbm_bytes)
    cycles = f"{r.cycles:,}" + " and loops" * bool(r.unknown_loops)
    others = [f", {n} {kind}" for kind, n in r.other_collectives.items()]
    return [*cells, *map(_mb, sizes), cycles, f"{len(r.all_reduces)}{''.join(others)}"]


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
