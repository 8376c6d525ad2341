# SPDX-License-Identifier: Apache-2.0
"""Markdown tables of records."""

from collections.abc import Mapping, Sequence
from typing import Any

Column = tuple[str, str, str]
"""Heading, field, format of its value."""


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
