# SPDX-License-Identifier: Apache-2.0
"""Read a calibration: a small safetensors file that some job of this project has written.

Reads the file as a whole and refuses what does not fit together. Checkpoints, which may be large or
hostile, are read with `sqzjax.io.safetensors`, which writes these files too.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sqzjax.errors import CheckpointError

_DTYPES = {"F32": np.float32, "F16": np.float16, "I32": np.int32, "F64": np.float64}
_MAX_HEADER = 1 << 20


class Artefact(NamedTuple):
    """Named arrays, and text that says what they belong to."""

    arrays: dict[str, np.ndarray]
    metadata: dict[str, str]


def read(path: str | Path) -> Artefact:
    """Return the arrays and metadata of a file; CheckpointError, a ValueError, if it is damaged."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read the calibration {path}: {error.strerror}") from None
    try:
        return _parse(data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a calibration, or damaged ({error}); make it again"
        ) from None


def _parse(data: bytes) -> Artefact:
    size = int.from_bytes(data[:8], "little")
    if not 2 <= size <= min(_MAX_HEADER, len(data) - 8):
        raise ValueError(f"its header length is {size}")
    header = json.loads(data[8 : 8 + size])
    metadata = dict(header.pop("__metadata__", {}))
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not text")
    payload, arrays = data[8 + size :], {}
    for name, entry in header.items():
        dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), entry["shape"]
        begin, end = entry["data_offsets"]
        if not 0 <= begin <= end <= len(payload):
            raise ValueError(f"{name} lies outside the file")
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} has the wrong size")
        arrays[name] = np.frombuffer(payload[begin:end], dtype).reshape(shape)
        if not np.all(np.isfinite(arrays[name])):
            raise ValueError(f"{name} holds numbers that are not finite")
    held = sum(array.nbytes for array in arrays.values())
    if held != len(payload):
        raise ValueError(f"its arrays are {held} bytes, but {len(payload)} follow the header")
    return Artefact(arrays, metadata)
