# SPDX-License-Identifier: Apache-2.0
"""Execute straight-line PTX in numpy: proves code for registers without a GPU.

All lanes of a block run each instruction together. Covers what kernels of loads, bit operations,
packed 16-bit sums, matrices (`ptx_matrices`) and stores compile to; anything else raises
NotImplementedError. A TMA copy moves a whole array that is neither tiled nor swizzled, when its
barrier is waited for. Other synchronisation is skipped: races are not seen.
"""

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tests.aot import targets
from tests.pallas_kernels import ptx_matrices as matrices

_ROOT = Path(__file__).resolve().parents[2]
_LOW = np.uint64(0xFFFFFFFF)
# Pointers are (number of the parameter + 1) << 40, plus the offset; shared memory has number 0.
_BUFFER_BITS = 40
_SHARED_START = 1024  # operands in shared memory need multiples of 1024
_DESCRIPTOR = 128
_SHARED_END = 228 * 1024
_SKIPPED = ("bar", "fence", "prefetch", "ret", "mbarrier", "wgmma")
_PAIRS = {"bf16x2": jnp.bfloat16, "f16x2": np.float16}
_HALVES = {"bf16": jnp.bfloat16, "f16": np.float16}
_WAIT = re.compile(r"LAB_WAIT:.*?DONE:", re.DOTALL)  # a loop until a barrier has all its bytes
_NOTHING = re.compile(r"//[^\n]*|\.loc[^\n]*|\$\w+:")
_STATEMENT = re.compile(r"(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_ARGUMENT = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")


def compiled(module: str, only: str, folder: Path) -> dict[str, str]:
    """Return the PTX of Mosaic kernels of cases of an `aot_*.py`, by name; skip without wheels."""
    if missing := targets.missing_support("h200"):
        pytest.skip(missing)
    command = [sys.executable, "-m", "tests.aot", f"tests/pallas_kernels/{module}.py"]
    command += ["--targets", "h200", "--only", only, "--keep", str(folder)]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    paths = folder.rglob("mosaic/*.ptx")
    return {re.sub(r"_\d+$", "", path.stem): path.read_text() for path in paths}


def run(ptx: str, buffers: Sequence[np.ndarray], lanes: int = 128, block: int = 0) -> None:
    """Run a block of the one kernel in `ptx` on uint8 `buffers`, its parameters; they change."""
    machine = _Machine(buffers, lanes)
    machine.registers["%ctaid.x"] = np.full(lanes, block, np.uint64)
    body = ptx[ptx.index("{", ptx.index(".entry")) + 1 : ptx.rindex("}")]
    body = _WAIT.sub("wait;", _NOTHING.sub("", body))
    for statement in body.split(";"):
        text = statement.lstrip("{} \t\n").strip()
        if text and not text.startswith("."):
            machine.step(text)


class _Machine:
    def __init__(self, buffers: Sequence[np.ndarray], lanes: int):
        # What is read before it is written is NaN in all types.
        shared = np.full(_SHARED_END, 0xFF, np.uint8)
        self.memory, self.lanes = [shared, *buffers], lanes
        self.registers = {"%tid.x": np.arange(lanes, dtype=np.uint64)}
        self.registers["__dynamic_shmem__0"] = self._constant(_SHARED_START)
        self.pending: list[tuple[int, np.ndarray]] = []

    def step(self, text: str) -> None:
        """Execute one statement in all lanes; guards by predicates are ignored for skipped ones."""
        match = _STATEMENT.fullmatch(text)
        if match is None:
            raise NotImplementedError(text)
        guard, operation, rest = match.groups()
        arguments = _ARGUMENT.findall(rest)
        kind, *_, width = [*operation.split("."), ""][:-1] * 2  # "ret" has no width
        if operation.startswith("cp.async.bulk.tensor"):
            self._fetch(guard, arguments, text)
        elif operation.startswith("wgmma.mma_async"):
            self._multiply(arguments, text)
        elif kind in _SKIPPED:
            return
        elif guard:
            raise NotImplementedError(text)
        elif kind == "wait":
            for place, source in self.pending:
                self.memory[0][place : place + source.size] = source
            self.pending = []
        elif operation.startswith("ld.param"):
            self._set(arguments[0], self.value(arguments[1].strip("[]")))
        elif kind in ("ld", "st"):
            self._move(kind, arguments, int(width[1:]) // 8)
        elif kind in ("ldmatrix", "stmatrix"):
            self._move_matrices(kind, arguments, ".trans." in operation)
        elif kind == "elect":  # the first lane of each warp
            number, predicate = arguments[0].split("|")
            self._set(number, self._constant(0))
            self._set(predicate, (np.arange(self.lanes) % 32 == 0).astype(np.uint64))
        elif operation == "mov.b32" and arguments[0].endswith("_}"):  # the lower half
            name = re.findall(r"%\w+", arguments[0])[0]
            self._set(name, self.value(arguments[1]) & np.uint64(0xFFFF))
        elif kind == "shfl":  # every use broadcasts one lane of each warp
            warps = self.value(arguments[1]).reshape(-1, 32)
            lane = int(self.value(arguments[2])[0])
            self._set(arguments[0].split("|")[0], np.repeat(warps[:, lane], 32))
        else:
            values = [self.value(name) for name in arguments[1:]]
            self._set(arguments[0], _compute(kind, width, values, operation))

    def value(self, name: str) -> np.ndarray:
        """Return a register, a parameter, or a constant in every lane."""
        if name in self.registers:
            return self.registers[name]
        if parameter := re.search(r"_param_(\d+)$", name):
            return self._constant((int(parameter[1]) + 1) << _BUFFER_BITS)
        return self._constant(int(name.rstrip("U"), 0) & (2**64 - 1))

    def _constant(self, number: int) -> np.ndarray:
        return np.full(self.lanes, number, np.uint64)

    def _set(self, name: str, value: np.ndarray) -> None:
        self.registers[name] = value

    def _values(self, names: str) -> list[np.ndarray]:
        return [self.value(name) for name in re.findall(r"[%\w]+", names)]

    def _locate(self, place: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the memory that an operand `[...]` points into, and where in it each lane."""
        pointer, offset = re.findall(r"^\[(%?\w+)(?:\+(-?\d+))?\]$", place)[0]
        address = self.registers[pointer] + np.uint64(int(offset or 0) & (2**64 - 1))
        memory = self.memory[int(address[0] >> np.uint64(_BUFFER_BITS))]
        return memory, (address & np.uint64(2**_BUFFER_BITS - 1)).astype(np.int64)

    def _move(self, kind: str, arguments: list[str], width: int) -> None:
        """Load or store registers of `width` bytes, one after the other."""
        place, names = arguments if kind == "st" else arguments[::-1]
        names = re.findall(r"[%\w]+", names)
        buffer, start = self._locate(place)
        if (start % (width * len(names))).any():
            raise ValueError(f"{place} is not aligned")
        for i, name in enumerate(names):
            index = start[:, None] + i * width + np.arange(width)
            if kind == "st":
                value = self.value(name)[:, None]
                buffer[index] = value.view(np.uint8).reshape(self.lanes, 8)[:, :width]
            else:
                value = np.zeros((self.lanes, 8), np.uint8)
                value[:, :width] = buffer[index]
                self._set(name, value.view(np.uint64)[:, 0])

    def _move_matrices(self, kind: str, arguments: list[str], transposed: bool) -> None:
        if kind == "stmatrix":
            matrices.store(*self._locate(arguments[0]), self._values(arguments[1]), transposed)
            return
        names = re.findall(r"%\w+", arguments[0])
        loaded = matrices.load(*self._locate(arguments[1]), len(names), transposed)
        self.registers.update(zip(names, loaded))

    def _fetch(self, guard: str | None, arguments: list[str], text: str) -> None:
        """Note a copy into shared memory of the whole array of a parameter."""
        source, *corner = (self.value(name) for name in re.findall(r"%\w+", arguments[1]))
        number, rest = divmod(int(source[0]), 2**_BUFFER_BITS)
        asked = 0 if guard is None or guard[0] == "!" else self.value(guard).sum()
        which, rest = divmod(rest, _DESCRIPTOR)  # descriptors of several arrays are one parameter
        if ".shared::cta.global." not in text or asked != 1 or rest or np.any(corner):
            raise NotImplementedError(text)
        _, place = self._locate(arguments[0])
        self.pending.append((int(place[0]), self.memory[number + which]))

    def _multiply(self, arguments: list[str], text: str) -> None:
        """Multiply as wgmma does: a in registers, b `[N, 16]`, signs kept, sums added to."""
        accumulators, a, b, *flags = arguments
        adds, *flags = (self.value(flag) for flag in flags)
        dtype = {".f32.bf16.bf16": jnp.bfloat16, ".f32.f16.f16": np.float16}.get(
            "".join(re.findall(r"\.f32\.\w+\.\w+", text)[:1])
        )
        if dtype is None or not adds.all() or [x[0] for x in flags] != [1, 1, 0]:
            raise NotImplementedError(text)
        total = self._values(accumulators)
        total = matrices.multiply(self.memory[0], self.value(b), self._values(a), total, dtype)
        self.registers.update(zip(re.findall(r"%\w+", accumulators), total))


def _compute(kind: str, width: str, values: list[np.ndarray], operation: str) -> np.ndarray:
    if kind == "set" and not operation.startswith("set.eq."):
        raise NotImplementedError(operation)
    if width in _PAIRS and kind in _PAIRWISE:
        return _pairwise(kind, _PAIRS[width], values)
    if kind == "prmt":
        return _permute(*values)
    if kind == "lop3":
        return _lop3(*values)
    if kind == "cvt":
        return _convert(operation, values[0])
    if kind == "setp":
        return _compare(operation, *values)
    mask = np.uint64(2**64 - 1) if width.endswith("64") else _LOW
    if kind == "mul":  # .wide and .lo of 32 bits
        product = (values[0] & _LOW) * (values[1] & _LOW)
        return product if ".wide" in operation else product & mask
    if operation.startswith("mad.lo."):
        return values[0] * values[1] + values[2] & mask
    operations: dict[str, Callable[..., np.ndarray]] = {
        "mov": lambda a: a,
        "cvta": lambda a: a,
        "add": np.add,
        "sub": np.subtract,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "shl": np.left_shift,
        "shr": lambda a, b: (a & mask) >> b,
        "selp": lambda a, b, predicate: np.where(predicate, a, b),
    }
    if kind not in operations or (kind == "shr" and width.startswith("s")):
        raise NotImplementedError(operation)
    result = operations[kind](*values)
    return result if kind == "cvta" else result & mask


_PAIRWISE: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": lambda a, b, c: a * b + c,
    "neg": np.negative,
    "set": lambda a, b: a == b,
}


def _pairwise(kind: str, dtype: type, values: list[np.ndarray]) -> np.ndarray:
    """Compute with the two 16-bit floats in the low halves of registers; rounds once."""
    numbers = (v.astype(np.uint32).view(np.uint16).view(dtype).astype(np.float64) for v in values)
    result = _PAIRWISE[kind](*numbers).astype(dtype)
    return result.view(np.uint16).view(np.uint32).astype(np.uint64)


def _permute(a: np.ndarray, b: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return the bytes of a, then b, that four digits choose; none asks for a sign."""
    digits = chosen[:, None] >> np.arange(0, 16, 4, dtype=np.uint64) & np.uint64(15)
    if (digits > 7).any():
        raise NotImplementedError("prmt that repeats a sign")
    both = np.stack([a, b], axis=1).astype(np.uint32).view(np.uint8)
    found = np.take_along_axis(both, digits.astype(np.int64), axis=1)
    return np.ascontiguousarray(found).view(np.uint32)[:, 0].astype(np.uint64)


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    result = np.zeros_like(a)
    for i in range(8):
        if int(table[0]) >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result & _LOW


def _convert(operation: str, value: np.ndarray) -> np.ndarray:
    _, to, source = operation.split(".")
    if to == "f32" and source in _HALVES:
        number = value.astype(np.uint16).view(_HALVES[source]).astype(np.float32)
        return number.view(np.uint32).astype(np.uint64)
    if (to, source) == ("s64", "s32"):
        return value.astype(np.uint32).view(np.int32).astype(np.int64).view(np.uint64)
    if {to, source} not in ({"u32", "u64"}, {"u32", "u16"}):
        raise NotImplementedError(operation)
    return value & _LOW


def _compare(operation: str, a: np.ndarray, b: np.ndarray, also: np.ndarray | int = 1):
    """Return a predicate, as 0 or 1."""
    results = {"setp.eq.and.b32": a == b, "setp.ne.b32": a != b}
    if operation not in results:
        raise NotImplementedError(operation)
    return results[operation] & np.asarray(also, bool)
