# SPDX-License-Identifier: Apache-2.0
"""Keep what an evaluation found about accuracy against speed: a small record, a table, a figure.

`python -m eval.tradeoff RUN/results.json RECORD.json [--seeds]` writes the record and, beside it,
the figure (`.svg`), and prints the table. With `--seeds`, models named `method SEED, setting` are
put together over their seeds: the mean, and the spread from the least to the greatest.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from eval import plots
from sqzjax.io import atomic

Row = dict[str, Any]
_SEEDED = re.compile(r"(.+) (\d+), (.+)")
_KEPT = ("created", "versions", "device", "title")


def record_of(document: dict[str, Any]) -> dict[str, Any]:
    """Return the record of an evaluation with one task of questions."""
    rows, settings = [], {}
    for result in document["results"]:
        usage = result.get("metrics", {}).get("usage")
        if result["status"] != "ok" or not usage:
            raise ValueError(f"{result['task']} on {result['model']} has no costs: {result}")
        settings = {key: result["settings"][key] for key in ("problems", "count", "seed")}
        metrics = result["metrics"]
        rows.append(
            {
                "model": result["model"],
                "accuracy": metrics["accuracy"],
                "interval_95": metrics["interval_95"],
                "passes": usage["mean_tokens"] / usage["tokens_per_forward"],
                "tokens_per_forward": usage["tokens_per_forward"],
                "tokens_per_second": usage["tokens_per_second"],
                "milliseconds": 1000 * usage["seconds"] / metrics["questions"],
                **{key: usage[key] for key in ("density", "cache_bytes_per_row") if key in usage},
            }
        )
    return {**{key: document[key] for key in _KEPT}, "task": settings, "rows": rows}


def over_seeds(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record of means over seeds, with "spread" and "by_seed" of the accuracy."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in record["rows"]:
        found = _SEEDED.fullmatch(row["model"])
        if found is None:
            raise ValueError(f"model {row['model']!r} is not named 'method SEED, setting'")
        groups.setdefault((found[1], found[3]), []).append(row)
    rows = []
    for (method, setting), members in groups.items():
        numbers = [key for key, value in members[0].items() if isinstance(value, int | float)]
        mean = {key: sum(row[key] for row in members) / len(members) for key in numbers}
        levels = [row["accuracy"] for row in members]
        spread = [min(levels), max(levels)]
        row = {"model": f"{method}, {setting}", "seeds": len(members), **mean}
        rows.append(row | {"interval_95": spread, "spread": spread, "by_seed": levels})
    return {**record, "rows": rows}


def table(record: dict[str, Any]) -> str:
    """Return the rows as a Markdown table."""
    seeded = "seeds" in record["rows"][0]
    dense = any("density" in row for row in record["rows"])
    between = "least to greatest" if seeded else "95 % interval"
    heads = ["model", "exact match", between, "passes", "tokens/pass", "ms a problem"]
    heads += ["context read"] if dense else []
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for row in record["rows"]:
        low, high = row["interval_95"]
        cells = [
            row["model"],
            f"{100 * row['accuracy']:.1f} %",
            f"{100 * low:.1f} to {100 * high:.1f}",
            f"{row['passes']:.1f}",
            f"{row['tokens_per_forward']:.1f}",
            f"{row['milliseconds']:.1f}",
        ]
        if dense:
            cells.append(f"{100 * row['density']:.0f} %" if "density" in row else "all")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(record: dict[str, Any]) -> str:
    """Return accuracy against tokens per pass and per second as an SVG element.

    Models named `method, setting` share the colour of their method.
    """
    methods: list[str] = []
    points = []
    for row in record["rows"]:
        method = row["model"].split(",")[0]
        named = method if method not in methods else ""  # once in the legend
        methods += [method] * (method not in methods)
        points.append(
            plots.TradeOff(
                name=named,
                shade=plots.colour(methods.index(method)),
                accuracy=row["accuracy"],
                interval=tuple(row["interval_95"]),
                speeds=(row["tokens_per_forward"], row["tokens_per_second"]),
            )
        )
    return plots.trade_off(points, ("tokens per pass", "tokens per second"))


def main(arguments: list[str] | None = None) -> int:
    """Write the record and its figure; print the table."""
    parser = argparse.ArgumentParser("eval.tradeoff", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("record", type=Path)
    parser.add_argument("--seeds", action="store_true")
    options = parser.parse_args(arguments)
    record = record_of(json.loads(options.results.read_text(encoding="utf-8")))
    record = over_seeds(record) if options.seeds else record
    atomic.write_text(options.record, json.dumps(record, indent=1) + "\n")
    drawing = figure(record).replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    atomic.write_text(options.record.with_suffix(".svg"), drawing)
    sys.stdout.write(f"{table(record)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
