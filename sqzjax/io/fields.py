# SPDX-License-Identifier: Apache-2.0
"""Typed, bounded access to an untrusted JSON object that collects problems instead of raising."""

import math
import reprlib
from collections.abc import Mapping
from typing import Any

_SHORT = reprlib.Repr(maxstring=80, maxother=80)
_MAX_TOKEN = (1 << 31) - 1


class Fields:
    """Reads `raw`; a wrong value adds to `problems` and yields a harmless stand-in."""

    def __init__(
        self,
        raw: Mapping[str, Any],
        problems: list[str] | None = None,
        prefix: str = "",
    ):
        self.raw = raw
        self.problems = [] if problems is None else problems
        self._prefix = prefix

    def problem(self, text: str) -> None:
        """Add a problem; the same one is kept once."""
        if text not in self.problems:
            self.problems.append(text)

    def sub(self, name: str) -> "Fields":
        """Return access to a nested object (empty where it is absent or null)."""
        value = self.raw.get(name)
        if value is not None and not isinstance(value, dict):
            self.problem(f"{self._prefix}{name}={show(value)} must be an object or null")
            value = None
        return Fields(value or {}, self.problems, f"{self._prefix}{name}.")

    def integer(self, name: str, minimum: int, maximum: int, default: int | None = None) -> int:
        """Read an integer within bounds; without default it is required."""
        value = self.raw.get(name)
        value = default if value is None else value
        if value is None:
            self.problem(f"{self._prefix}{name} is missing")
        elif type(value) is not int:
            self.problem(f"{self._prefix}{name}={show(value)} must be an integer")
        elif not minimum <= value <= maximum:
            self.problem(
                f"{self._prefix}{name}={show(value)} must lie between {minimum} and {maximum}"
            )
        else:
            return value
        return max(minimum, 1)

    def number(self, name: str, default: float | None = None, maximum: float = 1e12) -> float:
        """Read a finite number above zero; without default it is required."""
        value = self.raw.get(name)
        value = default if value is None else value
        if value is None:
            self.problem(f"{self._prefix}{name} is missing")
        elif type(value) not in (int, float):
            self.problem(f"{self._prefix}{name}={show(value)} must be a number")
        elif not (0 < value <= maximum and math.isfinite(value)):
            self.problem(f"{self._prefix}{name}={show(value)} must be above 0, at most {maximum}")
        else:
            return float(value)
        return 1.0

    def optional_number(self, name: str) -> float | None:
        """Read a finite number above zero, or None where it is absent or null."""
        return None if self.raw.get(name) is None else self.number(name)

    def boolean(self, name: str, default: bool) -> bool:
        """Read true or false; null counts as absent."""
        value = self.raw.get(name)
        if value is None or isinstance(value, bool):
            return default if value is None else value
        self.problem(f"{self._prefix}{name}={show(value)} must be true or false")
        return default

    def only(self, name: str, allowed: Any, required: bool = False) -> None:
        """Require a switch to have its one allowed value, or to be absent unless `required`."""
        value = self.raw.get(name)
        if value is None and not required:
            return
        if isinstance(value, bool) != isinstance(allowed, bool) or value != allowed:
            self.problem(f"{self._prefix}{name}={show(value)} is not supported; only {allowed!r}")

    def token(self, name: str) -> int | None:
        """Read a token id; a negative one means none, as old Llama files write it."""
        value = self.raw.get(name)
        if value is None or (type(value) is int and -(1 << 31) <= value < 0):
            return None
        return self.integer(name, 0, _MAX_TOKEN)

    def token_list(self, name: str) -> tuple[int, ...]:
        """Read one token id, a list of them, or nothing."""
        value = self.raw.get(name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if all(type(token) is int and 0 <= token <= _MAX_TOKEN for token in values):
            return tuple(values)
        self.problem(f"{self._prefix}{name}={show(value)} must be token ids >= 0")
        return ()


def show(value: Any) -> str:
    """Return a short form: a hostile file must not flood the message."""
    if type(value) is int and abs(value) >= 1 << 64:
        return f"an integer of {value.bit_length()} bits"
    return _SHORT.repr(value)
