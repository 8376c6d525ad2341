# SPDX-License-Identifier: Apache-2.0
"""Read the text of a compiled XLA program: its communication, and where an instruction came from.

`compiled.as_text()` holds one device's program. A loop's body stands there once, so collectives
are multiplied by the trip counts of the loops around them, which are read from the loops'
conditions. Costs a second or two for a program of several MB; imports no jax.
"""

import math
import re
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ((?:\(.*?\)|\S+)) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLS = re.compile(r"\b(?:calls|to_apply|called_computations=\{)=?%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TWO_BRANCHES = re.compile(r"(?:true|false)_computation=%?([\w.\-]+)")
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r"known_trip_count\D*?(\d+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_SAME_VALUE = ("bitcast", "copy", "transpose", "reshape", "convert", "dynamic-update-slice")
_MAX_DEPTH = 8
_OPERAND = re.compile(r"%?([A-Za-z_][\w.\-]*)")


@dataclass(frozen=True)
class Instruction:
    """One line of a computation; `rest` is everything after the opening parenthesis."""

    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def op_name(self) -> str:
        """Return the path of named scopes that jax recorded, or ""."""
        found = _OP_NAME.search(self.rest)
        return found[1] if found else ""

    @cached_property
    def operands(self) -> list[str]:
        """Names of the operands."""
        text = re.sub(r"/\*.*?\*/", "", self.rest.split(")", 1)[0])
        return [m[1] for part in text.split(",") if (m := _OPERAND.match(part.strip()))]


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Equal communication steps of one device: one kind, shape and group of devices.

    `count`: executions in one run of the program. `result_bytes`: the result of one execution.
    `sent_bytes`: what a device sends in one execution of a ring algorithm, the least that any
    algorithm needs. `group`: logical numbers of the devices of the first group.
    """

    kind: str
    count: int
    shape: str
    result_bytes: int
    sent_bytes: float
    group: tuple[int, ...]


@dataclass
class Module:
    """A parsed program.

    `unknown_loops`: loops that communicate and whose trips could not be read; counted once.
    """

    computations: dict[str, dict[str, Instruction]] = field(default_factory=dict)
    roots: dict[str, Instruction] = field(default_factory=dict)
    entry: str = ""
    unknown_loops: list[str] = field(default_factory=list)

    def collectives(self) -> tuple[Collective, ...]:
        """Return the communication of one run, equal steps added up, the largest first."""
        found: dict[tuple, int] = {}
        self._walk(self.entry, 1, found)
        steps = [
            Collective(
                kind=kind, shape=shape, group=group, count=count, result_bytes=size, sent_bytes=sent
            )
            for (kind, shape, group, size, sent), count in found.items()
        ]
        return tuple(sorted(steps, key=lambda step: -step.count * step.sent_bytes))

    def op_names(self) -> dict[str, str]:
        """Map every instruction to the scopes that it came from, "" where nothing tells.

        A fusion without scopes has those of what it fused. XLA drops the scopes of some products:
        these are named by the argument they read, written as a path ("/params/head/kernel"), else
        by whatever they were computed from.
        """
        return {
            name: self._scope(instruction) or self._source(name, 0)
            for body in self.computations.values()
            for name, instruction in body.items()
        }

    def _scope(self, instruction: Instruction) -> str:
        if "/" in instruction.op_name:
            return instruction.op_name
        for name in _CALLS.findall(instruction.rest):
            inner = [i.op_name for i in self.computations.get(name, {}).values()]
            if scoped := [text for text in inner if "/" in text]:
                return scoped[-1]
        return ""

    def _source(self, name: str, depth: int) -> str:
        _, instruction = self._places.get(name, ("", None))
        if instruction is None or depth > _MAX_DEPTH:
            return ""
        arguments = [self._argument(operand, 0) for operand in instruction.operands]
        if named := [argument for argument in arguments if argument]:
            return named[-1]
        for operand in instruction.operands:
            place = self._places.get(operand)
            found = self._scope(place[1]) if place else ""
            if found := found or self._source(operand, depth + 1):
                return found
        return ""

    def _argument(self, name: str, depth: int) -> str:
        """Return the argument of the program that a value is, unchanged but for its layout."""
        owner, instruction = self._places.get(name, ("", None))
        if instruction is None or depth > _MAX_DEPTH:
            return ""
        if instruction.opcode == "parameter":
            known = owner == self.entry and instruction.op_name
            return "/" + re.sub(r"[\[\]'.\\]+", "/", instruction.op_name) if known else ""
        if instruction.opcode == "get-tuple-element":
            index, source = _tuple_index(instruction), self._places.get(instruction.operands[0])
            if source is None or index is None:
                return ""
            if source[1].opcode == "parameter":
                source = self._places.get(self._loops.get(source[0], ""))
            if source is not None and source[1].opcode == "while":
                source = self._places.get(source[1].operands[0])
            if source is None or source[1].opcode != "tuple":
                return ""
            return self._argument(source[1].operands[index], depth + 1)
        if instruction.opcode in _SAME_VALUE and instruction.operands:
            return self._argument(instruction.operands[0], depth + 1)
        return ""

    @cached_property
    def _places(self) -> dict[str, tuple[str, Instruction]]:
        """The computation of every instruction, and itself."""
        return {
            name: (owner, instruction)
            for owner, body in self.computations.items()
            for name, instruction in body.items()
        }

    @cached_property
    def _loops(self) -> dict[str, str]:
        """The `while` instruction of every loop body."""
        return {
            found[2]: name
            for name, (_, instruction) in self._places.items()
            if instruction.opcode == "while" and (found := _LOOP.search(instruction.rest))
        }

    def _walk(self, name: str, times: int, found: dict[tuple, int]) -> None:
        scattered = name.startswith("all-reduce-scatter")
        for instruction in self.computations.get(name, {}).values():
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                key = _describe(instruction, kind, scattered)
                if len(key[2]) > 1:
                    found[key] = found.get(key, 0) + times
                continue
            if instruction.opcode == "while":
                self._walk_loop(instruction, times, found)
                continue
            for called in _called(instruction):
                self._walk(called, times, found)

    def _walk_loop(self, loop: Instruction, times: int, found: dict[tuple, int]) -> None:
        names = _LOOP.search(loop.rest)
        if names is None:
            return
        known = _TRIPS.search(loop.rest)
        trips = int(known[1]) if known else self._trips(names[1], names[2])
        before = sum(found.values())
        self._walk(names[2], times * (1 if trips is None else trips), found)
        silent = before == sum(found.values())
        if trips is None and not silent and loop.name not in self.unknown_loops:
            self.unknown_loops.append(loop.name)

    def _trips(self, condition: str, body: str) -> int | None:
        """Read `for (i = 0; i < bound; i += step)` off a loop; None if it is another one."""
        test, step = self.roots.get(condition), self.roots.get(body)
        if test is None or step is None or test.opcode != "compare" or step.opcode != "tuple":
            return None
        inside, counter, bound = self.computations[condition], None, None
        for operand in test.operands:
            source = inside.get(operand)
            counter = _tuple_index(source) if counter is None else counter
            bound = _constant(source) if bound is None else bound
        if counter is None or bound is None or "direction=LT" not in test.rest:
            return None
        advance = self.computations[body].get(step.operands[counter])
        if advance is None or advance.opcode != "add":
            return None
        steps = [_constant(self.computations[body].get(name)) for name in advance.operands]
        given = [value for value in steps if value]
        return -(-bound // given[0]) if len(given) == 1 else None


def parse(text: str) -> Module:
    """Parse the text of a compiled program."""
    module, current = Module(), ""
    for line in text.splitlines():
        if line.endswith("{") and (head := _COMPUTATION.match(line)):
            current = head[2]
            module.computations[current] = {}
            module.entry = current if head[1] else module.entry
        elif (found := _INSTRUCTION.match(line)) and current:
            instruction = Instruction(*found.groups()[1:])
            module.computations[current][found[2]] = instruction
            if found[1]:
                module.roots[current] = instruction
    return module


def shape_bytes(shape: str) -> list[int]:
    """Return the bytes of every array in a shape, tuples flattened, layouts ignored."""
    plain = re.sub(r"\{[^}]*\}", "", re.sub(r"/\*.*?\*/", "", shape))
    sizes = []
    for dtype, dims in _SHAPE.findall(plain):
        count = math.prod(int(size) for size in dims.split(",") if size)
        bits = _BITS.get(dtype) or int((re.search(r"\d+", dtype) or ["0"])[0])
        sizes.append(-(-count * bits // 8))
    return sizes


def _describe(instruction: Instruction, kind: str, scattered: bool) -> tuple:
    """Return kind, shape, group, result bytes and sent bytes of one execution."""
    sizes = shape_bytes(instruction.shape)
    if instruction.opcode.endswith("-start") and instruction.shape.startswith("("):
        # (operands, results, synchronisation scalars)
        sizes = [size for size in sizes if size > 4] or sizes
        sizes = sizes[len(sizes) // 2 :] if kind != "all-reduce" else sizes
    size, group = sum(sizes), _group(instruction.rest)
    others = len(group) - 1
    share = others / max(1, len(group))
    sent = {
        "all-gather": size * share,
        "all-reduce": size * share * (1 if scattered else 2),
        "reduce-scatter": size * others,
        "collective-permute": float(size),
        "collective-broadcast": float(size),
    }.get(kind, size * share)
    if scattered:
        kind, size = "reduce-scatter", size // max(1, len(group))
    shape = re.sub(r"\{[^}]*\}|/\*.*?\*/", "", instruction.shape).replace(", u32[]", "")
    return kind, shape, group, size, sent


def _group(attributes: str) -> tuple[int, ...]:
    """Return the first group of devices that talk to each other."""
    if found := re.search(r"source_target_pairs=\{([\d{},]*)\}", attributes):
        pairs = re.findall(r"\{(\d+),(\d+)\}", found[1])
        moved = [(int(a), int(b)) for a, b in pairs if a != b]
        return moved[0] if moved else ()
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return tuple(int(i) for i in found[1].split(","))
    if found := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):
        groups, sizes = _numbers(found[1]), _numbers(found[2])
        order = _numbers(found[3]) if found[3] else range(len(sizes))
        devices = np.arange(math.prod(sizes)).reshape(sizes).transpose(order).reshape(groups)
        return tuple(devices[0].tolist())
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        axes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        used = re.findall(r"'([^']+)'", found[2])
        devices = np.arange(math.prod(map(int, axes.values()))).reshape([*map(int, axes.values())])
        chosen = tuple(slice(None) if name in used else 0 for name in axes)
        return tuple(devices[chosen].reshape(-1).tolist())
    return ()


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _called(instruction: Instruction) -> list[str]:
    names = _CALLS.findall(instruction.rest) + _TWO_BRANCHES.findall(instruction.rest)
    for branches in _BRANCHES.findall(instruction.rest):
        names += [name.strip().lstrip("%") for name in branches.split(",")]
    return names


def _tuple_index(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    found = re.search(r"index=(\d+)", instruction.rest)
    return int(found[1]) if found else None


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant":
        return None
    found = re.match(r"(\d+)\)", instruction.rest)
    return int(found[1]) if found else None
