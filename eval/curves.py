# SPDX-License-Identifier: Apache-2.0
"""Loss curves and baselines that a training run left in its working folder."""

import json
import math
from pathlib import Path
from typing import Any

from sqzjax.errors import DataError

MAX_POINTS = 600
"""A curve is thinned to this many points: a report need not carry a million steps."""

TRAIN_LOSS = "train/loss"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read `metrics.jsonl`; a torn last line of a killed run is dropped, any other is an error."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise DataError(f"{path}, line {number}: not valid JSON: {error}") from error
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    if not rows:
        raise DataError(f"{path} holds no line with a step")
    return rows


def training_curve(workdir: Path) -> dict[str, Any]:
    """Return the loss series of a run, its last and best values, and its median throughput.

    A resumed run repeats steps after its checkpoint; the later line counts.
    """
    rows = {row["step"]: {} for row in read_metrics(workdir / "metrics.jsonl")}
    for row in read_metrics(workdir / "metrics.jsonl"):
        rows[row["step"]] |= row
    ordered = [rows[step] for step in sorted(rows)]
    names = sorted({key for row in ordered for key in row if is_loss(key)})
    series = {name: _series(ordered, name) for name in names}
    series = {name: points for name, points in series.items() if points}
    if TRAIN_LOSS not in series:
        raise DataError(f"{workdir / 'metrics.jsonl'} has no finite {TRAIN_LOSS}")
    speeds = sorted(v for _, v in _series(ordered, "throughput/tokens_per_second"))
    held_out = [name for name in series if name != TRAIN_LOSS]
    return {
        "series": {name: thin(points) for name, points in series.items()},
        "steps": ordered[-1]["step"],
        "final": {name: points[-1][1] for name, points in series.items()},
        "best": {name: min(value for _, value in series[name]) for name in held_out},
        "tokens_per_second": speeds[len(speeds) // 2] if speeds else None,
        "baselines": baselines(workdir),
    }


def is_loss(key: str) -> bool:
    """Tell whether a metric is the training loss or a loss on held-out data."""
    return key == TRAIN_LOSS or (key.startswith("eval/") and key.endswith(("loss", "nll")))


def _series(rows: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    return [(step, float(value)) for step, value in points if math.isfinite(value)]


def thin(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Average neighbours so that at most `MAX_POINTS` remain; the last step keeps its place."""
    size = -(-len(points) // MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def baselines(workdir: Path) -> dict[str, dict[str, float]]:
    """Return the count-based baselines of `baselines.json`, empty if the run wrote none.

    Format: `{"unigram": {"nll": nats per token, "perplexity": ...}, "bigram": {...}}`.
    """
    path = workdir / "baselines.json"
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(name): {"nll": float(values["nll"]), "perplexity": math.exp(values["nll"])}
            for name, values in document.items()
            if isinstance(values, dict)
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(f"{path} is no baselines file: {error!r}") from error
