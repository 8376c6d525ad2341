# SPDX-License-Identifier: Apache-2.0
"""Execute straight-line PTX in numpy: proves code for registers without a GPU.

All lanes of a block run each instruction together. Covers what kernels of loads, bit operations,
packed 16-bit sums and stores compile to; anything else raises NotImplementedError.
"""

import re
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

_LOW = np.uint64(0xFFFFFFFF)
_BUFFER_BITS = 40  # pointers are (number of the parameter + 1) << 40, plus the offset
_SKIPPED = ("bar", "elect", "fence", "ret")
_PAIRS = {"bf16x2": jnp.bfloat16, "f16x2": np.float16}
_STATEMENT = re.compile(r"(@!?%\w+\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_ARGUMENT = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")


def run(ptx: str, buffers: Sequence[np.ndarray], lanes: int = 128) -> None:
    """Run the one kernel in `ptx` on uint8 `buffers`, its parameters in order; they are updated."""
    machine = _Machine(buffers, lanes)
    body = ptx[ptx.index("{", ptx.index(".entry")) + 1 : ptx.rindex("}")]
    body = re.sub(r"//[^\n]*|\.loc[^\n]*|\$\w+:", "", body)
    for statement in body.split(";"):
        text = statement.strip().lstrip("{}").strip()
        if text and not text.startswith("."):
            machine.step(text)


class _Machine:
    def __init__(self, buffers: Sequence[np.ndarray], lanes: int):
        self.buffers, self.lanes = buffers, lanes
        self.registers = {"%tid.x": np.arange(lanes, dtype=np.uint64)}

    def step(self, text: str) -> None:
        """Execute one statement in all lanes; guards by predicates are ignored for skipped ones."""
        match = _STATEMENT.fullmatch(text)
        if match is None:
            raise NotImplementedError(text)
        guard, operation, rest = match.groups()
        arguments = _ARGUMENT.findall(rest)
        kind, *_, width = [*operation.split("."), ""][:-1] * 2  # "ret" has no width
        if kind in _SKIPPED:
            return
        if guard:
            raise NotImplementedError(text)
        if operation.startswith("ld.param"):
            number = int(re.findall(r"param_(\d+)", arguments[1])[0])
            self._set(arguments[0], self._constant((number + 1) << _BUFFER_BITS))
        elif kind in ("ld", "st"):
            self._move(kind, arguments, int(width[1:]) // 8)
        elif kind == "shfl":  # every use broadcasts one lane of each warp
            warps = self.value(arguments[1]).reshape(-1, 32)
            lane = int(self.value(arguments[2])[0])
            self._set(arguments[0].split("|")[0], np.repeat(warps[:, lane], 32))
        else:
            values = [self.value(name) for name in arguments[1:]]
            self._set(arguments[0], _compute(kind, width, values, text))

    def value(self, name: str) -> np.ndarray:
        """Return a register, or a constant in every lane."""
        if name in self.registers:
            return self.registers[name]
        return self._constant(int(name, 0) & (2**64 - 1))

    def _constant(self, number: int) -> np.ndarray:
        return np.full(self.lanes, number, np.uint64)

    def _set(self, name: str, value: np.ndarray) -> None:
        self.registers[name] = value

    def _move(self, kind: str, arguments: list[str], width: int) -> None:
        """Load or store registers of `width` bytes, one after the other."""
        place, names = arguments if kind == "st" else arguments[::-1]
        pointer, offset = re.findall(r"^\[(%\w+)(?:\+(-?\d+))?\]$", place)[0]
        address = self.registers[pointer] + np.uint64(int(offset or 0))
        buffer = self.buffers[int(address[0] >> np.uint64(_BUFFER_BITS)) - 1]
        start = (address & np.uint64(2**_BUFFER_BITS - 1)).astype(np.int64)
        for i, name in enumerate(re.findall(r"[%\w]+", names)):
            index = start[:, None] + i * width + np.arange(width)
            if kind == "st":
                value = self.value(name)[:, None]
                buffer[index] = value.view(np.uint8).reshape(self.lanes, 8)[:, :width]
            else:
                value = np.zeros((self.lanes, 8), np.uint8)
                value[:, :width] = buffer[index]
                self._set(name, value.view(np.uint64)[:, 0])


def _compute(kind: str, width: str, values: list[np.ndarray], text: str) -> np.ndarray:
    if width in _PAIRS and kind in ("add", "sub"):
        return _pairwise(kind, _PAIRS[width], values)
    if kind == "lop3":
        return _lop3(*values)
    mask = np.uint64(2**64 - 1) if width.endswith("64") else _LOW
    if kind == "mul":  # .wide and .lo of 32 bits
        product = (values[0] & _LOW) * (values[1] & _LOW)
        return product if ".wide" in text else product & mask
    operations: dict[str, Callable[..., np.ndarray]] = {
        "mov": lambda a: a,
        "cvta": lambda a: a,
        "add": np.add,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "shl": np.left_shift,
        "shr": lambda a, b: (a & mask) >> b,
    }
    if kind not in operations or (kind == "shr" and width.startswith("s")):
        raise NotImplementedError(text)
    result = operations[kind](*values)
    return result if kind == "cvta" else result & mask


def _pairwise(kind: str, dtype: type, values: list[np.ndarray]) -> np.ndarray:
    """Add or subtract the two 16-bit floats in the low halves of registers."""
    a, b = (v.astype(np.uint32).view(np.uint16).view(dtype).astype(np.float32) for v in values)
    result = (a + b if kind == "add" else a - b).astype(dtype)
    return result.view(np.uint16).view(np.uint32).astype(np.uint64)


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    result = np.zeros_like(a)
    for i in range(8):
        if int(table[0]) >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result & _LOW
