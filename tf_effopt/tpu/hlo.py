"""What an optimized XLA program costs, read from its text.

XLA's own totals count copies that never leave the chip's vector memory: four
times the real traffic for Adam. So each scheduled instruction is looked at:

- an array counts with the padding of its tiles; one with a memory space, such as
  `S(1)`, the vector memory, isn't in HBM and counts nothing;
- an instruction reads its operands and writes its result, a fusion of which only
  slices are read counts those; an asynchronous copy counts once;
- of a conditional the costlier branch counts; a loop as often as XLA says that it
  runs, once where XLA doesn't know (`unknown_loops`).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
)
# They move nothing themselves; `-done` ends what a `-start` has moved.
FREE = {
    "add-dependency",
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
SLICES = ("dynamic-slice", "slice", "gather")
BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}  # else its digits


@dataclasses.dataclass(frozen=True)
class Costs:
    """Costs of a program on one device.

    Attributes:
        hbm_bytes: read from and written to HBM.
        cycles: sum of the compiler's estimates. It has none for scalar
            instructions, asynchronous copies and collectives.
        collectives: kind -> for each the dtypes that it carries.
        summed_bytes: what all-reduces leave in HBM.
        unknown_loops: loops counted once, since XLA doesn't know their length.
        has_float64: whether any array is float64.
    """

    hbm_bytes: int
    cycles: int
    collectives: dict[str, list[list[str]]]
    summed_bytes: int
    unknown_loops: int
    has_float64: bool


@dataclasses.dataclass(frozen=True)
class Array:
    """An array's type: its bytes with its padding, and whether they are in HBM."""

    dtype: str
    size: int
    in_hbm: bool

    @property
    def bytes(self) -> int:
        """Those in HBM."""
        return self.size if self.in_hbm else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; `results` are the leaves of its type."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What some instructions cost together."""

    bytes: int = 0
    cycles: int = 0
    unknown_loops: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.bytes + other.bytes,
            self.cycles + other.cycles,
            self.unknown_loops + other.unknown_loops,
        )

    def __mul__(self, times: int) -> Traffic:
        return Traffic(self.bytes * times, self.cycles * times, self.unknown_loops)


def costs(text: str) -> Costs:
    """Returns the costs of an optimized module, given as text."""
    module = Module(text)
    total = module.traffic(module.entry)
    collectives: dict[str, list[list[str]]] = collections.defaultdict(list)
    summed = 0
    for computation in module.computations.values():
        for instruction in computation.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                operands = _read(computation, instruction)
                carried = {x.dtype for o in operands for x in o.results}
                collectives[kind].append(sorted(carried))
            if kind == "all-reduce":
                summed += sum(x.bytes for x in instruction.results)
    return Costs(
        total.bytes,
        total.cycles,
        dict(sorted(collectives.items())),
        summed,
        total.unknown_loops,
        has_float64=re.search(r"\bf64\[", text) is not None,
    )


class Module:
    """The computations of a module, by name."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
            if head and not line.startswith(("HloModule", " ")):
                current = self.computations[head[2]] = {}
                self.entry = head[2] if head[1] else self.entry
                continue
            instruction = _instruction(line)
            if instruction is not None:
                current[instruction.name] = instruction
        self.traffic = functools.cache(self._traffic)

    def _traffic(self, name: str) -> Traffic:
        computation = self.computations[name]
        total = Traffic()
        for instruction in computation.values():
            total += self._of(computation, instruction)
        return total

    def _of(self, computation: dict, instruction: Instruction) -> Traffic:
        opcode, attributes = instruction.opcode, instruction.attributes
        if opcode in FREE or opcode.endswith(("-done", "-update")):
            return Traffic()
        if opcode == "conditional":
            branches = [self.traffic(name) for name in _called(attributes)]
            return max(branches, key=lambda t: (t.cycles, t.bytes))
        if opcode == "while":
            body = self.traffic(re.search(r"body=%?([\w.\-]+)", attributes)[1])
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', attributes)
            return body * int(trips[1]) if trips else body + Traffic(unknown_loops=1)
        if opcode == "call":
            return self.traffic(_called(attributes)[0])
        if opcode == "custom-call" and "ConcatBitcast" in attributes:
            return Traffic()
        cycles = re.search(r'"estimated_cycles":"(\d+)"', attributes)
        moved = self._bytes(computation, instruction)
        return Traffic(moved, int(cycles[1]) if cycles else 0)

    def _bytes(self, computation: dict, instruction: Instruction) -> int:
        opcode = instruction.opcode
        operands = _read(computation, instruction)
        read = [sum(x.bytes for x in o.results) for o in operands]
        written = sum(x.bytes for x in instruction.results)
        if opcode.endswith("-start"):
            return _started(instruction, read)
        if opcode in SLICES:
            return min(read[0], written) + written
        if opcode == "dynamic-update-slice":
            return 2 * read[1]  # the rest of the array stays where it is
        if opcode == "fusion":
            return self._fusion(instruction, read, written)
        return sum(read) + written

    def _fusion(self, instruction: Instruction, read: list[int], written: int) -> int:
        """A fusion reads what it slices, and writes what it updates."""
        inner = self.computations[_called(instruction.attributes)[0]]
        users = collections.defaultdict(list)
        for x in inner.values():
            for operand in x.operands:
                users[operand].append(x)
        for x in inner.values():
            if x.opcode != "parameter":
                continue
            number = int(re.match(r"\((\d+)\)", x.attributes)[1])
            sliced = [_accessed(x, user, inner) for user in users[x.name]]
            if sliced and None not in sliced and number < len(read):
                read[number] = min(read[number], sum(sliced))
        roots = [x for x in inner.values() if x.is_root]
        if roots and roots[0].opcode == "tuple":
            roots = [inner[name] for name in roots[0].operands if name in inner]
        for root in roots:
            if root.opcode == "dynamic-update-slice":
                whole = sum(x.bytes for x in root.results)
                update = sum(x.bytes for x in inner[root.operands[1]].results)
                written -= min(written, max(0, whole - update))
        return sum(read) + written


def _accessed(parameter: Instruction, user: Instruction, inner: dict) -> int | None:
    """The bytes that `user` reads of a fusion's parameter; None for all."""
    if not user.operands or user.operands[0] != parameter.name:
        return None
    if user.opcode in SLICES:
        return sum(x.bytes for x in user.results)
    if user.opcode == "dynamic-update-slice":
        return 0
    return None


def _started(instruction: Instruction, read: list[int]) -> int:
    """What an asynchronous operation moves; its type has its operands again."""
    results = [x.bytes for x in instruction.results]
    if instruction.opcode == "copy-start":  # (to, from, context)
        return results[0] + sum(read)
    if "slice-start" in instruction.opcode:  # ((from), to, context)
        *_, source, to, _ = instruction.results
        return to.bytes + (to.size if source.in_hbm else 0)
    return max(sum(results), 2 * sum(read))  # a collective


def _read(computation: dict, instruction: Instruction) -> list[Instruction]:
    return [computation[o] for o in instruction.operands if o in computation]


def _called(attributes: str) -> list[str]:
    names = re.findall(
        r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)",
        attributes,
    )
    for group in re.findall(r"branch_computations=\{([^}]*)\}", attributes):
        names += re.findall(r"[\w.\-]+", group)
    return names


# ------------------------------------------------------------------------ text


def _instruction(line: str) -> Instruction | None:
    match = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if match is None:
        return None
    rest = line[match.end() :]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    call = re.match(r"\s*([\w\-]+)", rest[end:])
    arguments = rest[end + call.end() :]
    close = _closing(arguments)
    return Instruction(
        name=match[2],
        opcode=call[1],
        results=tuple(_arrays(rest[:end])),
        operands=tuple(re.findall(r"%([\w.\-]+)", arguments[: close + 1])),
        attributes=arguments,
        is_root=bool(match[1]),
    )


def _closing(text: str) -> int:
    """The place of the parenthesis that closes the first one."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i
    return len(text)


ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,<=]*)\](?:\{([^{}]*)\})?")


@functools.cache
def array(dtype: str, dimensions: str, layout: str) -> Array:
    """The array of a type such as `f32[5,3]{1,0:T(8,128)}`."""
    order, _, properties = layout.partition(":")
    digits = re.search(r"\d+", dtype)
    bits = BITS.get(dtype) or (int(digits[0]) if digits else 0)
    sizes = [int(re.sub(r"\D", "", n)) for n in dimensions.split(",") if n]
    if order and sizes:  # from the minor axis to the major one
        sizes = [sizes[int(axis)] for axis in reversed(order.split(","))]
    tile = re.search(r"T\((\d[\d,]*)\)", properties)
    if tile:
        edges = [int(n) for n in tile[1].split(",")]
        sizes = [1] * (len(edges) - len(sizes)) + sizes
        for i, edge in enumerate(reversed(edges), 1):
            sizes[-i] = -(-sizes[-i] // edge) * edge
    elsewhere = re.search(r"S\([1-9]", properties)
    return Array(dtype, math.prod(sizes) * bits // 8, in_hbm=elsewhere is None)


def _arrays(text: str) -> list[Array]:
    return [array(m[1], m[2], m[3] or "") for m in ARRAY.finditer(text)]
