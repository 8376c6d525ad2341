# SPDX-License-Identifier: Apache-2.0
"""Records as text: rounded numbers, Markdown tables."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Column = tuple[str, str, str]
"""Heading, field, format of its value."""


def rounded(value: Any, digits: int = 7) -> Any:
    """Keep so many digits of every number, which is enough for any use and keeps records small.

    Numbers that are not finite, which JSON lacks, become None.
    """
    if isinstance(value, Mapping):
        return {key: rounded(one, digits) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one, digits) for one in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> list[str]:
    """Return the lines of a table; a value of None is shown as a dash."""
    lines = [
        "| " + " | ".join(heading for heading, _, _ in columns) + " |",
        "|" + " --- |" * len(columns),
    ]
    for row in rows:
        cells = [
            "-" if row[field] is None else form.format(row[field]) for _, field, form in columns
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
