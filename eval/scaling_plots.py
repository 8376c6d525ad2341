# SPDX-License-Identifier: Apache-2.0
"""Drawings of a scaling report: IsoFLOP curves, laws with intervals, parametric law, residuals."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from eval import plots
from eval.scaling_tables import bent_text, law_text, number
from sqzjax.analysis.scaling_parametric import ParametricLaw

Record = dict[str, Any]
_DASHES = (0, (4, 3))
_POWER, _BENT = plots.COLOURS[1], plots.COLOURS[0]


def drawings(record: Record) -> dict[str, str]:
    """Return every drawing by name; one without numbers is left out."""
    found = {"isoflop": isoflop(record), "laws": laws(record), "residuals": residuals(record)}
    parametric = record["parametric"]
    if parametric and not parametric["error"]:
        found["parametric"] = contours(record)
    return found


def isoflop(record: Record) -> str:
    """Draw the losses of each budget over size with its parabola and vertex."""
    points, fits = record["runs"]["points"], record["isoflop"]
    budgets = sorted({point["budget"] for point in points})
    vertices = {one["budget"]: one for one in fits["optima"]}
    log_loss = record["config"]["log_loss"]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for budget, shade in zip(budgets, _shades(len(budgets))):
            own = sorted((p["N"], p["loss"]) for p in points if p["budget"] == budget)
            sizes, losses = zip(*own)
            one = vertices.get(budget)
            fill = shade if one else "white"
            axes.plot(sizes, losses, "o", markersize=5, color=shade, markerfacecolor=fill)
            label = number(budget, 3) + (" FLOPs" if one else " FLOPs (refused)")
            if one is None:
                axes.plot(sizes, losses, color=shade, linewidth=0.8, linestyle=":", label=label)
                continue
            logs = np.linspace(np.log(sizes[0]), np.log(sizes[-1]), 200)
            curve = np.polyval(one["coefficients"], logs)
            curve = np.exp(curve) if log_loss else curve
            axes.plot(np.exp(logs), curve, color=shade, linewidth=1.4, label=label)
            axes.plot(one["size"], one["loss"], "*", markersize=13, color=shade, mec="white")
        axes.set_xscale("log")
        axes.set_yscale("log")
        _plain_ticks(axes, [point["loss"] for point in points])
        axes.set_xlabel("parameters")
        axes.set_ylabel(f"loss ({record['runs']['loss_kind']})")
        figure.legend(loc="outside right center", fontsize=9)

    return plots.svg(draw, (10.2, 4.8))


def laws(record: Record) -> str:
    """Draw best size and best loss over compute with both laws, intervals and targets."""
    known = record["runs"]["known"]
    chosen = record["laws"][1 if known else 0]
    curves, compute = chosen["curves"], chosen["curves"]["compute"]
    optima = [(one["budget"], one["size"], one["loss"]) for one in record["isoflop"]["optima"]]

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        _curve(left, compute, curves["size"], _POWER, f"N = {law_text(chosen['size'])}")
        _curve(right, compute, curves["loss"], _POWER, f"L = {law_text(chosen['loss'])}")
        if "saturating" in curves:
            text = f"L = {bent_text(chosen['saturating'])}"
            _curve(right, compute, curves["saturating"], _BENT, text)
        for place, axes in ((1, left), (2, right)):
            _marks(axes, optima, place, "vertices of the parabolas", "o", color=plots.INK)
            _marks(axes, known, place, "known optima", "s", color=plots.INK, mfc="white")
            measured = [
                (t["flops"], t["measured_size"], t["measured_loss"]) for t in chosen["targets"]
            ]
            star = {"color": plots.COLOURS[3], "markersize": 13, "zorder": 5}
            _marks(axes, measured, place, "measured, not fitted", "*", **star)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel("training FLOPs")
            axes.legend(fontsize=8.5, loc="upper left" if place == 1 else "upper right")
        left.set_ylabel("best size (parameters)")
        right.set_ylabel(f"loss at the best size ({record['runs']['loss_kind']})")
        _plain_ticks(right, [*curves["loss"]["values"], *(o[2] for o in optima)])

    return plots.svg(draw, (10.2, 4.6))


def contours(record: Record) -> str:
    """Draw the parametric law over size and data with the runs and the best sizes."""
    fit, points = record["parametric"], record["runs"]["points"]
    law = ParametricLaw(*(fit[name] for name in ParametricLaw._fields))
    size, data = np.array([point["N"] for point in points]), np.array(fit["data"])
    loss = np.array([point["loss"] for point in points])

    def draw(figure: Any) -> None:
        from matplotlib.colors import LogNorm

        axes = figure.subplots()
        columns = np.geomspace(size.min() / 1.6, size.max() * 1.6, 120)
        rows = np.geomspace(data.min() / 1.6, data.max() * 1.6, 120)
        surface = np.asarray(law(columns[None], rows[:, None]))
        levels = np.geomspace(min(surface.min(), loss.min()), loss.max() * 1.05, 14)
        norm = LogNorm(levels[0], levels[-1])
        axes.contour(
            columns, rows, surface, levels=levels, norm=norm, cmap="viridis_r", linewidths=1
        )
        dots = axes.scatter(
            size,
            data,
            c=loss,
            norm=norm,
            cmap="viridis_r",
            s=34,
            edgecolor="white",
            linewidth=0.6,
            zorder=3,
        )
        bar = figure.colorbar(dots, ax=axes, shrink=0.9, label=record["runs"]["loss_kind"])
        _plain_ticks(bar.ax, loss.tolist())
        best, seen = law.optimum(
            fit["flops_per_pair"] * columns[[0, -1]] * rows[[0, -1]], fit["flops_per_pair"]
        )
        axes.plot(
            best,
            seen,
            color=plots.COLOURS[1],
            linewidth=1.6,
            label="best size and data of a compute",
        )
        axes.set(xscale="log", yscale="log", xlim=columns[[0, -1]], ylim=rows[[0, -1]])
        axes.set_xlabel("parameters")
        axes.set_ylabel(f"data ({fit['unit']})")
        figure.legend(loc="outside upper left", fontsize=9)

    return plots.svg(draw, (7.6, 5.0))


def residuals(record: Record) -> str:
    """Draw what the fits leave: single runs over size, and optima over compute."""
    points, fits = record["runs"]["points"], record["isoflop"]["optima"]
    parametric = record["parametric"]
    law = record["laws"][0]

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        rows = _parabola_residuals(points, fits, record["config"]["log_loss"])
        left.plot(*zip(*rows), "o", markersize=4, color=_BENT, label="parabolas")
        if parametric and not parametric["error"]:
            left.plot(
                [p["N"] for p in points],
                100 * np.array(parametric["residuals"]),
                "x",
                markersize=5,
                color=_POWER,
                label="E + A/N^α + B/D^β",
            )
        left.set_xlabel("parameters")
        left.set_ylabel("loss of a run against the fit (%)")
        budgets = np.array([one["budget"] for one in fits])
        losses = np.array([one["loss"] for one in fits])
        power = law["loss"]["coefficient"] * budgets ** law["loss"]["exponent"]
        right.plot(budgets, 100 * np.log(losses / power), "o-", color=_POWER, label="A C^-g")
        if law["saturating"]:
            bent = law["saturating"]
            curve = bent["floor"] + bent["coefficient"] * (budgets / bent["reference"]) ** (
                -bent["exponent"]
            )
            right.plot(budgets, 100 * np.log(losses / curve), "s-", color=_BENT, label="E + A C^-g")
        right.set_xlabel("training FLOPs")
        right.set_ylabel("loss at the best size against the law (%)")
        for axes in (left, right):
            axes.axhline(0, color=plots.MUTED, linewidth=0.8)
            axes.set_xscale("log")
            axes.legend(fontsize=9)

    return plots.svg(draw, (10.2, 3.6))


def _parabola_residuals(
    points: Sequence[Record], fits: Sequence[Record], log_loss: bool
) -> list[tuple[float, float]]:
    rows = []
    for one in fits:
        for point in points:
            if point["budget"] == one["budget"]:
                value = float(np.polyval(one["coefficients"], np.log(point["N"])))
                value = np.exp(value) if log_loss else value
                rows.append((point["N"], 100 * float(np.log(point["loss"] / value))))
    return rows


def _marks(
    axes: Any, rows: Sequence[Any], place: int, label: str, marker: str, **style: Any
) -> None:
    """Mark a number of each row against its first one, its compute, where both are known."""
    known = [(row[0], row[place]) for row in rows if row[place]]
    if known:
        axes.plot(*zip(*known), marker, label=label, **({"markersize": 5, "zorder": 4} | style))


def _curve(axes: Any, compute: Sequence[float], curve: Record, shade: str, label: str) -> None:
    axes.plot(compute, curve["values"], color=shade, linewidth=1.5, label=label)
    if curve["interval"]:
        axes.fill_between(compute, *curve["interval"], color=shade, alpha=0.16, linewidth=0)


def _shades(count: int) -> list[str]:
    """Return colours from light to dark, since budgets are ordered."""
    import matplotlib
    from matplotlib.colors import to_hex

    palette = matplotlib.colormaps["viridis_r"]
    return [to_hex(palette(0.12 + 0.85 * index / max(count - 1, 1))) for index in range(count)]


def _plain_ticks(axes: Any, values: Sequence[float]) -> None:
    """Write a logarithmic scale of few decades with plain numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    low, high = min(values), max(values)
    steps = (1, 2, 5) if high / low > 30 else (1, 1.2, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    axes.yaxis.set_major_locator(FixedLocator([t for t in ticks if low / 1.2 <= t <= high * 1.2]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
