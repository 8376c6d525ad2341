# SPDX-License-Identifier: Apache-2.0
"""Read small JSON files written by strangers.

Stricter than `json.load`: size and nesting are bounded before parsing, duplicate keys are errors,
and every failure is a `CheckpointError` that names the file.
"""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from sqzjax.errors import CheckpointError

MAX_BYTES = 16 << 20
_MAX_DEPTH = 64
_TO_BRACKET = re.compile(r'(?:[^"\[\]{}]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+([\[\]{}])', re.DOTALL)


def read(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Return the JSON object in `path`; anything else in it is an error."""
    size = regular_size(path)
    if size > max_bytes:
        raise CheckpointError(f"{path} has {size} bytes; at most {max_bytes} are read")
    try:
        text = path.read_text(encoding="utf-8")
        _check_depth(text)
        value = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {_short(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def regular_size(path: Path) -> int:
    """Return the size of a regular file; folders, pipes and devices are refused unopened."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a regular file")
    return status.st_size


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object, refusing a repeated key (`json` would keep the last one silently)."""
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"duplicate key {name!r}")
        result[name] = value
    return result


def _check_depth(text: str) -> None:
    depth = 0
    for bracket in _TO_BRACKET.finditer(text):
        depth += 1 if bracket[1] in "[{" else -1
        if depth > _MAX_DEPTH:
            raise ValueError(f"nested more than {_MAX_DEPTH} deep")


def _short(error: BaseException) -> str:
    text = str(error)
    return text if len(text) <= 200 else text[:200] + "..."
