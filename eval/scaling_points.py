# SPDX-License-Identifier: Apache-2.0
"""Runs of a sweep as columns; losses that do not compare are never put together."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.scaling_config import ScalingConfig
from sqzjax.errors import DataError

VERSION = 1
SIZES = ("params", "counted_params", "body_params")
_KEPT = 0.02
"""A budget whose runs spend another amount than it by more than this share is not what it says."""


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Columns of the chosen runs; `known` are optima (budget, size, loss) found by others.

    `budget` is in FLOPs that were spent: `moved` pairs nominal budgets with them where they differ.
    """

    names: tuple[str, ...]
    schedule: str
    loss_kind: str
    unit: str
    source: str
    left_out: dict[str, int]
    budget: np.ndarray
    flops: np.ndarray
    loss: np.ndarray
    data: np.ndarray | None
    epochs: np.ndarray | None
    sizes: dict[str, np.ndarray]
    labels: tuple[str, ...]
    known: tuple[tuple[float, float, float], ...]
    tokens_per_sample: float | None
    schedules: tuple[dict[str, Any], ...] = ()
    moved: tuple[tuple[float, float], ...] = ()

    @property
    def amount(self) -> np.ndarray | None:
        """Data in tokens, in samples where their tokens are unknown, None where data are."""
        if self.data is None or self.tokens_per_sample is None:
            return self.data
        return self.data * self.tokens_per_sample

    @property
    def amount_unit(self) -> str:
        """What `amount` counts."""
        return self.unit if self.tokens_per_sample is None else "tokens"

    def flops_per_pair(self, size: str, own: Any = slice(None)) -> float:
        """Return k of C = k N D: 6 for tokens, else the geometric mean of (some of) the runs."""
        if self.tokens_per_sample is not None or self.data is None:
            return 6.0
        pairs = self.sizes[size][own] * self.data[own]
        return float(np.exp(np.log(self.flops[own] / pairs).mean()))


def read(config: ScalingConfig) -> Runs:
    """Read the file of a configuration; DataError says what cannot be used and why."""
    path = Path(config.points)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist; give points the results.json of a sweep (python -m train "
            "configs/sweeps/...) or a file like eval/data/weather_isoflop.json"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no JSON file of runs: {error}") from None
    points = document.get("points") if isinstance(document, dict) else None
    if not isinstance(points, list) or document.get("version") != VERSION:
        raise DataError(f"{path} must be an object with version {VERSION} and a list of points")
    try:
        return _columns(config, document, points)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: a point lacks {error} or has a wrong type there") from None


def chosen(
    points: Sequence[dict[str, Any]], *, schedule: str | None = None, loss_kind: str | None = None
) -> list[dict[str, Any]]:
    """Return the points of one schedule and one loss.

    DataError (a ValueError) where several are left: the loss of a trunk checkpoint says nothing
    about a cooled one, nor one kind of loss about another.
    """
    rows = list(points)
    for name, wanted in (("schedule", schedule), ("loss_kind", loss_kind)):
        found = sorted({str(row[name]) for row in rows})
        rows = [row for row in rows if wanted is None or row[name] == wanted]
        kept = sorted({str(row[name]) for row in rows})
        if wanted is not None and not kept:
            raise DataError(f"no point has {name}={wanted!r}; there are {found}")
        if len(kept) > 1:
            examples = [next(row["name"] for row in rows if row[name] == one) for one in kept]
            raise DataError(
                f"the points mix {name}s {kept} (such as {examples}), whose losses do not compare; "
                f"choose one with {name}=..."
            )
    if not rows:
        raise DataError("there are no points to fit; run the sweep first")
    return rows


def _columns(config: ScalingConfig, document: dict[str, Any], points: list[Any]) -> Runs:
    rows = chosen(points, schedule=config.schedule, loss_kind=config.loss_kind)
    kept = [row for row in rows if _has_loss(row)]
    left_out = {"other schedules or losses": len(points) - len(rows)}
    left_out["without a finite loss"] = len(rows) - len(kept)
    if not kept:
        raise DataError("no point has a finite loss; look into the logs of the runs")
    for row in kept:
        _check_point(row)
    sizes = {name: _column(kept, name) for name in SIZES if all(name in row for row in kept)}
    if config.size not in sizes:
        raise DataError(f"size={config.size} is not in every point; there are {sorted(sizes)}")
    unit = str(document["unit"])
    per_sample = config.tokens_per_sample or document.get("tokens_per_sample")
    known = [
        (one["budget"], one[config.size], one["loss"])
        for one in document.get("optima", [])
        if config.size in one
    ]
    budget, moved = _spent(_column(kept, "budget"), _column(kept, "flops"))
    return Runs(
        names=tuple(str(row["name"]) for row in kept),
        schedule=str(kept[0]["schedule"]),
        loss_kind=str(kept[0]["loss_kind"]),
        unit=unit,
        source=str(document.get("source", config.points)),
        left_out=left_out,
        budget=budget,
        flops=_column(kept, "flops"),
        loss=_column(kept, "loss"),
        data=_optional(kept, "data"),
        epochs=_optional(kept, "epochs"),
        sizes=sizes,
        labels=tuple(str(row["size"]) for row in kept),
        known=tuple(tuple(map(float, one)) for one in known),  # type: ignore[misc]
        tokens_per_sample=1.0 if unit == "tokens" else per_sample,
        schedules=tuple(_schedules(points)),
        moved=moved,
    )


def _check_point(row: dict[str, Any]) -> None:
    """Raise DataError naming the point whose numbers no fit can use."""
    for name in ("budget", "flops", "loss", "data", *SIZES):
        value = row.get(name)
        number = isinstance(value, int | float)
        if value is not None and not (number and 0 < value < np.inf):
            raise DataError(
                f"the point {row['name']} has {name}={value}, which must be positive and finite; "
                "correct it or take the point out"
            )


def _spent(
    budgets: np.ndarray, flops: np.ndarray
) -> tuple[np.ndarray, tuple[tuple[float, float], ...]]:
    """Put the geometric mean of the counted FLOPs in place of budgets that they do not keep.

    Cooldowns on rollouts, say, take more than the steps of their trunk that a budget is made for.
    """
    spent, moved = budgets.copy(), []
    for budget in np.unique(budgets):
        own = budgets == budget
        mean = float(np.exp(np.log(flops[own]).mean()))
        if abs(mean / budget - 1) > _KEPT:
            spent[own] = mean
            moved.append((float(budget), mean))
    return spent, tuple(moved)


def _schedules(points: list[Any]) -> list[dict[str, Any]]:
    """Return cooled losses beside that of the trunk they left, and of a cosine run as long.

    Only of one kind of loss: a cooldown with another one is not comparable. Diverged runs have no
    loss and are left out.
    """
    points = [row for row in points if _has_loss(row)]
    by_workdir = {row["workdir"]: row for row in points if "workdir" in row}
    cosine = {
        (row["size"], row["budget"], row["loss_kind"]): row["loss"]
        for row in points
        if row["schedule"] == "cosine"
    }
    found = []
    for row in points:
        trunk = by_workdir.get(row.get("trunk") or "")
        if row["schedule"] != "cooldown" or trunk is None:
            continue
        if trunk["loss_kind"] != row["loss_kind"]:
            continue
        key = (row["size"], row["budget"], row["loss_kind"])
        losses = {"trunk": trunk["loss"], "cooled": row["loss"], "cosine": cosine.get(key)}
        found.append({"name": row["name"], "size": row["size"], "budget": row["budget"]} | losses)
    return found


def _has_loss(row: dict[str, Any]) -> bool:
    return row.get("loss") is not None and bool(np.isfinite(row["loss"]))


def _column(rows: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], float)


def _optional(rows: Sequence[dict[str, Any]], name: str) -> np.ndarray | None:
    """Return a column, None unless every run has it."""
    return _column(rows, name) if all(row.get(name) is not None for row in rows) else None
