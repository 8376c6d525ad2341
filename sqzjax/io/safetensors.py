# SPDX-License-Identifier: Apache-2.0
"""One safetensors file: a strict header parser, a lazy reader over a memory map, a writer.

The header is checked whole before any tensor is touched: names unique, offsets tiling the payload
without gap or overlap, sizes matching shapes. It is parsed entry by entry, so a hostile file is
refused at its first wrong byte, at the cost of the entries before it. Reading maps the file, so a
slice costs the pages it touches. `shards` handles folders of such files.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from sqzjax.errors import CheckpointError
from sqzjax.io.strict_json import regular_size, unique_keys

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "U32": np.uint32,
        "I32": np.int32,
        "F32": np.float32,
        "U64": np.uint64,
        "I64": np.int64,
        "F64": np.float64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
    }.items()
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FIELDS = {"dtype", "shape", "data_offsets"}
_MAX_ENTRY_BYTES = 4096
_MAX_METADATA_BYTES = 4 << 20
_MAX_DIMENSIONS = 32

_SPACE = rb"[ \t\r\n]*+"
_STRING = rb'"[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+"'
_OBJECT = rb'\{(?:[^{}"]++|' + _STRING + rb")*+\}"
_ENTRY = re.compile(
    _SPACE + b"(" + _STRING + b")" + _SPACE + b":" + _SPACE + b"(" + _OBJECT + b")"
    rb"[ \t\r\n]*+([,}])"
)
_EMPTY = re.compile(_SPACE + rb"\}")
_END = re.compile(_SPACE)


class TensorInfo(NamedTuple):
    """Where a tensor lies; `start` and `end` count bytes from the beginning of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """Lazy reader of one file: `tensors` (name to `TensorInfo`) and `metadata`."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        size = regular_size(self.path)
        if size < 10:
            raise CheckpointError(f"{self.path} has {size} bytes; a safetensors file has >= 10")
        self._bytes = np.memmap(self.path, np.uint8, mode="r")
        try:
            self.tensors, self.metadata = _parse_header(self._bytes)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path} is not a valid safetensors file: {error}") from None

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Return a tensor, or the slice `index` of it, as a read-only view of the mapped file."""
        info = self.tensors[name]
        data = np.asarray(self._bytes[info.start : info.end])
        if info.start % info.dtype.itemsize:
            data = data.copy()  # legal but misaligned: a view would not survive every numpy loop
        return data.view(info.dtype).reshape(info.shape)[(*index, ...)]


def _parse_header(
    data: np.ndarray,
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"header length {length} exceeds {MAX_HEADER_BYTES}")
    if length > data.size - 8:
        raise ValueError(f"header length {length} exceeds the {data.size - 8} bytes that follow it")
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] | None = None
    for name, body in _entries(memoryview(data)[8 : 8 + length]):
        if name in tensors or (name == "__metadata__" and metadata is not None):
            raise ValueError(f"duplicate key {name!r}")
        if name == "__metadata__":
            metadata = _metadata(body)
        else:
            tensors[name] = _tensor(name, body, base=8 + length)
    _check_tiling(tensors, begin=8 + length, end=data.size)
    return tensors, metadata or {}


def _entries(header: memoryview) -> Iterable[tuple[str, str]]:
    """Yield (name, object text) of each member of the header object."""
    if not header or header[0] != ord("{"):
        raise ValueError("header does not begin with '{'")
    position, more = 1, True
    if empty := _EMPTY.match(header, position):
        position, more = empty.end(), False
    while more:
        match = _ENTRY.match(header, position)
        if match is None:
            raise ValueError(f"header is malformed at byte {position}")
        if match.end(1) - match.start(1) > _MAX_ENTRY_BYTES:
            raise ValueError(f"name at byte {position} is longer than {_MAX_ENTRY_BYTES} bytes")
        name = json.loads(str(match[1], "utf-8"))
        limit = _MAX_METADATA_BYTES if name == "__metadata__" else _MAX_ENTRY_BYTES
        if match.end(2) - match.start(2) > limit:
            raise ValueError(f"entry of {name!r} is longer than {limit} bytes")
        yield name, str(match[2], "utf-8")
        position, more = match.end(), match[3] == b","
    if _END.match(header, position).end() != len(header):  # type: ignore[union-attr]
        raise ValueError(f"header has text after its closing brace, at byte {position}")


def _metadata(body: str) -> dict[str, str]:
    metadata = json.loads(body, object_pairs_hook=unique_keys)
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ must map strings to strings")
    return metadata


def _tensor(name: str, body: str, base: int) -> TensorInfo:
    entry = json.loads(body, object_pairs_hook=unique_keys)
    if entry.keys() != _FIELDS:
        raise ValueError(f"tensor {name!r} has fields {sorted(entry)}, not {sorted(_FIELDS)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"tensor {name!r} has dtype {dtype!r}; known are {', '.join(DTYPES)}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"tensor {name!r} has shape {shape!r}; sizes are integers >= 0")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {name!r} has data_offsets {offsets!r}; need [begin, end]")
    if math.prod(max(size, 1) for size in shape) >= 1 << 60:
        raise ValueError(f"tensor {name!r} has shape {shape!r}, which overflows")
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != expected:
        raise ValueError(
            f"tensor {name!r} takes {offsets[1] - offsets[0]} bytes, its shape {shape} and dtype "
            f"{dtype} need {expected}"
        )
    return TensorInfo(DTYPES[dtype], tuple(shape), base + offsets[0], base + offsets[1])


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _check_tiling(tensors: dict[str, TensorInfo], begin: int, end: int) -> None:
    """Check that the tensors cover the payload exactly once."""
    for name, info in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if info.start != begin:
            kind = "overlaps the tensor before it" if info.start < begin else "leaves a gap before"
            raise ValueError(f"tensor {name!r} {kind}: begins at {info.start}, not {begin}")
        begin = info.end
    if begin != end:
        raise ValueError(f"tensors end at byte {begin}, the file at {end}: truncated or trailing")


class TensorSpec(NamedTuple):
    """A tensor to be written: `read` returns its values when their turn comes."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(
    path: str | os.PathLike[str],
    tensors: Sequence[TensorSpec],
    metadata: dict[str, str] | None = None,
) -> str:
    """Write a file atomically (temporary name, fsync, rename) and return its sha256.

    Holds one tensor at a time. Wide dtypes come first so that every tensor is aligned.
    """
    path = Path(path)
    ordered = sorted(tensors, key=lambda spec: -spec.dtype.itemsize)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    digest = hashlib.sha256()
    try:
        with open(temporary, "wb") as file:
            _put(file, digest, _render_header(ordered, metadata or {}))
            for spec in ordered:
                _put(file, digest, _payload(spec))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return digest.hexdigest()


def _put(file: BinaryIO, digest: Any, data: Any) -> None:
    file.write(data)
    digest.update(data)


def _render_header(tensors: Sequence[TensorSpec], metadata: dict[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for spec in tensors:
        if spec.dtype not in _DTYPE_NAMES:
            raise ValueError(f"tensor {spec.name!r} has dtype {spec.dtype}, unknown to safetensors")
        header[spec.name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    if len(header) != len(tensors) + bool(metadata):
        raise ValueError("tensor names must be unique")
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _payload(spec: TensorSpec) -> np.ndarray:
    values = np.ascontiguousarray(spec.read())
    if values.dtype != spec.dtype or values.size != math.prod(spec.shape):
        raise ValueError(
            f"tensor {spec.name!r} was announced as {spec.dtype}{list(spec.shape)}, but is "
            f"{values.dtype}{list(values.shape)}"
        )
    # ml_dtypes arrays have no buffer protocol of their own; bytes do.
    return values.reshape(-1).view(np.uint8)
