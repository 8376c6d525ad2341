# SPDX-License-Identifier: Apache-2.0
"""Pareto plots of caches: bytes per token against quality, a point a cache."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from eval import plots

_MARKERS = "os^Dv"


class Point(NamedTuple):
    """One cache: bytes per token, its quality, and the interval of that."""

    name: str
    method: str
    cost: float
    quality: float
    interval: tuple[float, float]


def points_of(rows: Sequence[dict[str, Any]], part: str, task: str, value: str) -> list[Point]:
    """Return the rows that have both figures."""
    points = []
    for row in rows:
        metrics = row[part].get(task, {})
        if row["bytes"] and metrics.get(value) is not None:
            quality = metrics[value]
            low, high = metrics.get("interval_95", (quality, quality))
            cost = row["bytes"]["per_token"]
            points.append(Point(row["name"], row["kind"], cost, quality, (low, high)))
    return points


def frontier(points: Sequence[Point], *, higher_is_better: bool) -> list[Point]:
    """Return the points that no other one equals or beats in both, by cost."""
    sign = -1 if higher_is_better else 1
    kept: list[Point] = []
    for point in sorted(points, key=lambda one: (one.cost, sign * one.quality)):
        if not kept or sign * point.quality < sign * kept[-1].quality:
            kept.append(point)
    return kept


def pareto(points: Sequence[Point], *, higher_is_better: bool, measure: str) -> str:
    """Draw quality against bytes per token (logarithmic) and name the caches of the frontier."""
    methods = list(dict.fromkeys(point.method for point in points))
    best = frontier(points, higher_is_better=higher_is_better)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for index, method in enumerate(methods):
            own = [point for point in points if point.method == method]
            below = [max(point.quality - point.interval[0], 0) for point in own]
            above = [max(point.interval[1] - point.quality, 0) for point in own]
            axes.errorbar(
                [point.cost for point in own],
                [point.quality for point in own],
                yerr=[below, above] if higher_is_better else None,
                fmt=_MARKERS[index // len(plots.COLOURS) % len(_MARKERS)],
                color=plots.colour(index),
                elinewidth=0.8,
                markersize=5,
                label=method,
            )
        line = [(point.cost, point.quality) for point in best]
        axes.plot(*zip(*line), color=plots.MUTED, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
        for point in best:
            axes.annotate(
                point.name,
                (point.cost, point.quality),
                xytext=(4, -11 if higher_is_better else 5),
                textcoords="offset points",
                fontsize=8,
                color=plots.MUTED,
            )
        _scale(axes, points, higher_is_better)
        axes.set_xlabel("bytes per token (everything counted)")
        axes.set_ylabel(f"{measure}, {'accuracy' if higher_is_better else 'perplexity'}")
        figure.legend(loc="outside upper left", ncols=6, fontsize=9)

    return plots.svg(draw, (10.2, 4.8))


def _scale(axes: Any, points: Sequence[Point], higher_is_better: bool) -> None:
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.margins(x=0.08, y=0.1)
    if higher_is_better:
        axes.set_ylim(-0.03, 1.06)
    elif max(p.quality for p in points) > 4 * min(p.quality for p in points):
        axes.set_yscale("log")  # one cache that fails would flatten all others
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
