# SPDX-License-Identifier: Apache-2.0
"""Results as a markdown table."""

from collections.abc import Iterator, Mapping
from typing import Any

_COLUMNS = (
    "operation",
    "shape",
    "candidate",
    "time (µs)",
    "spread",
    "GB/s",
    "of a copy",
    "time of the first",
)


def table(results: Mapping[str, Any]) -> str:
    """Return a sentence on the run and one line for each candidate.

    "time of the first" is a baseline's time in units of that of the first candidate.
    """
    versions = results["versions"]
    device = results["device"]
    if results["platform"] == "cpu" and "processor" in results:  # older records do not say
        device += f" ({results['processor']})"
    head = (
        f"{device}, jax {versions['jax']}, commit {results['commit']}, "
        f"{results['date'][:10]}; medians, spread = range / median."
    )
    if not results["complete"]:
        head += " Some shapes have not been measured yet."
    lines = [line for row in results["rows"] for line in _lines(row)]
    if any(row["from_cache"] for row in results["rows"]):
        lines.append("\n\\* inputs that the caches of the device may hold.")
    names, rule = " | ".join(_COLUMNS), " | ".join("---" for _ in _COLUMNS)
    return "\n".join([head, "", f"| {names} |", f"| {rule} |", *lines])


def _lines(row: Mapping[str, Any]) -> Iterator[str]:
    shape = row["shape"] + (" \\*" if row["from_cache"] else "")
    for index, (name, values) in enumerate(row["candidates"].items()):
        if "error" in values:
            cells = ["failed", "-", "-", "-", "-"]
        else:
            ratio = values.get("ratio_to_first")
            cells = [
                f"{values['median_seconds'] * 1e6:.1f}",
                f"{100 * values['spread']:.0f} %",
                _three_digits(values["gb_per_s"]),
                f"{values['percent_of_copy']:.0f} %",
                "" if index == 0 else "-" if ratio is None else f"{ratio:.2f}",
            ]
        yield f"| {' | '.join([row['op'], shape, name, *cells])} |"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
