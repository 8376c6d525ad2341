# SPDX-License-Identifier: Apache-2.0
"""Figures of a report as inline SVG, drawn with matplotlib (extra `plot`).

Without matplotlib a figure is a sentence that says so; the tables carry every number anyway.
"""

import io
import re
import uuid
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

INK, MUTED, GRID = "#1f2933", "#66727f", "#e4e8ec"
COLOURS = ("#1f6feb", "#d9480f", "#2b8a3e", "#862e9c", "#0b7285", "#a61e4d", "#5f3dc4", "#846358")
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"],
    "font.size": 10,
    "svg.fonttype": "path",
    "text.color": INK,
    "axes.edgecolor": "#c3cad1",
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
Points = Sequence[Sequence[float]]


def colour(index: int) -> str:
    """Return the colour of the model with this number, the same in every figure."""
    return COLOURS[index % len(COLOURS)]


def loss_curves(runs: Sequence[tuple[str, dict[str, Points]]], reference: dict[str, float]) -> str:
    """Draw training losses (lines) and held-out losses (dots) with baselines as dashed lines."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        values: list[float] = []
        for index, (name, series) in enumerate(runs):
            for key, points in series.items():
                steps, losses = zip(*points)
                values += losses[len(losses) // 50 :]
                text = f"{name}, {key.removesuffix('/loss')}"
                train = key.startswith("train/")
                style = {"linewidth": 1.4} if train else {"marker": "o", "markersize": 4}
                shade = colour(index) if train else _darker(colour(index))
                axes.plot(steps, losses, color=shade, label=text, **style)
        top = max([*values, *reference.values()])
        bottom = min([*values, *reference.values()])
        for name, level in reference.items():
            axes.axhline(level, color=MUTED, linestyle=(0, (4, 3)), linewidth=1)
            axes.annotate(
                f"{name} {level:.2f}",
                (1, level),
                xycoords=("axes fraction", "data"),
                xytext=(-4, 4),
                textcoords="offset points",
                ha="right",
                fontsize=9,
                color=MUTED,
            )
        room = 0.06 * (top - bottom or 1)
        axes.set_ylim(bottom - room, top + 2 * room)
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats per token)")
        axes.margins(x=0.01)
        figure.legend(loc="outside upper left", ncols=4, fontsize=9)

    return svg(draw, (10.2, 4.1))


def heat_map(
    cells: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], title: str
) -> str:
    """Draw shares between 0 and 1 as a grid with the percentages written into it."""

    def draw(figure: Any) -> None:
        from matplotlib.colors import LinearSegmentedColormap

        axes = figure.subplots()
        palette = LinearSegmentedColormap.from_list("share", ["#fbe9e2", "#f3e3b3", "#2f9e6b"])
        axes.pcolormesh(cells, vmin=0, vmax=1, cmap=palette, edgecolors="white", linewidth=2)
        axes.invert_yaxis()
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xticks([j + 0.5 for j in range(len(columns))], columns)
        axes.set_yticks([i + 0.5 for i in range(len(rows))], rows)
        axes.set_xlabel("context (tokens)")
        axes.set_ylabel("depth")
        axes.set_title(title, fontsize=10, loc="left", color=INK)
        for i, row in enumerate(cells):
            for j, value in enumerate(row):
                axes.text(
                    j + 0.5, i + 0.5, f"{100 * value:.0f}", ha="center", va="center", fontsize=9
                )

    width = min(10.2, 1.7 + 0.62 * len(columns))
    return svg(draw, (max(3.4, width), 1.25 + 0.34 * len(rows)))


def bars(names: Sequence[str], values: Sequence[float], unit: str) -> str:
    """Draw one horizontal bar per name with its value."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        places = range(len(names))
        axes.barh(places, values, height=0.62, color=COLOURS[0])
        axes.set_yticks(places, names)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(unit)
        axes.margins(x=0.14)
        for place, value in zip(places, values, strict=True):
            text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
            axes.annotate(
                text, (value, place), xytext=(5, 0), textcoords="offset points", va="center"
            )

    return svg(draw, (10.2, 0.8 + 0.36 * len(names)))


class TradeOff(NamedTuple):
    """One model: its accuracy with an interval, and how fast it is by each measure."""

    name: str
    shade: str
    accuracy: float
    interval: tuple[float, ...]
    speeds: tuple[float, ...]


def trade_off(points: Sequence[TradeOff], measures: Sequence[str]) -> str:
    """Draw accuracy against each measure of speed, a point a model; up and right is better.

    The dashed line joins the models that no other one beats in both.
    """

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
        for place, (axes, measure) in enumerate(zip(panels, measures, strict=True)):
            for point in points:
                height, speed = 100 * point.accuracy, point.speeds[place]
                below, above = (abs(100 * end - height) for end in point.interval)
                axes.errorbar(
                    speed,
                    height,
                    yerr=[[below], [above]],
                    fmt="o",
                    capsize=3,
                    color=point.shade,
                    label=point.name if not place else None,
                )
            front = frontier([(point.speeds[place], point.accuracy) for point in points])
            line = [(speed, 100 * accuracy) for speed, accuracy in front]
            axes.plot(*zip(*line), color=MUTED, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
            axes.set_xlabel(measure)
            axes.margins(x=0.12)
            axes.set_xlim(left=0)
        panels[0].set_ylabel("accuracy (%)")
        figure.legend(loc="outside upper left", ncols=4, fontsize=9)

    return svg(draw, (10.2, 3.9))


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (speed, accuracy) that no other one beats or equals in both, by speed."""
    kept: list[tuple[float, float]] = []
    for point in sorted(set(points), reverse=True):
        if not kept or point[1] > kept[-1][1]:
            kept.append(point)
    return kept[::-1]


def svg(draw: Callable[[Any], None], size: tuple[float, float]) -> str:
    """Draw on a figure of so many inches and return it as an element for a page."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return '<p class="note">Figure left out: matplotlib is not installed (extra plot).</p>'
    # A fresh salt per figure: equal element ids in one page would share clip paths.
    settings: Any = _STYLE | {"svg.hashsalt": uuid.uuid4().hex}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue())


def _inline(svg: str) -> str:
    """Keep the drawing alone: no XML prolog, no metadata with addresses, a scalable size."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    width = re.search(r'<svg[^>]*width="([\d.]+)pt"', svg)
    pixels = float(width[1]) * 96 / 72 if width else 800
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', rf'\1 role="img" style="width:{pixels:.0f}px"', svg, count=1
    )


def _darker(shade: str) -> str:
    parts = (int(shade[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{int(part * 0.62):02x}" for part in parts)
