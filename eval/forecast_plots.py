# SPDX-License-Identifier: Apache-2.0
"""Figures of forecasts: scores against lead time, spectra, maps."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval import plots

_BASELINES = {"persistence": (0, (4, 3)), "climatology": (0, (1, 2))}
_DIFFERENCE, _FIELD = "RdBu_r", "viridis"


def by_lead(
    record: Mapping[str, Any],
    score: str,
    channels: Sequence[str],
    *,
    reference: float | None = None,
) -> str:
    """Draw a score of every forecaster against lead time, a panel for each channel.

    Without channels the score is one number per lead. `reference` is a level drawn as a line.
    Lines end where a score is None.
    """
    slots = [record["channels"].index(name) for name in channels]
    days = np.array(record["leads"]) / 24

    def draw(figure: Any) -> None:
        count = len(slots) or 1
        panels = figure.subplots(1, count, squeeze=False)[0]
        for place, axes in enumerate(panels):
            for index, entry in enumerate(record["forecasts"]):
                if entry[score] is None:
                    continue
                values = np.array(entry[score], np.float64)
                values = values[:, slots[place]] if slots else values
                axes.plot(
                    days, values, label=entry["name"] if not place else None, **line(index, entry)
                )
            if reference is not None:
                axes.axhline(reference, color=plots.MUTED, linewidth=0.8, zorder=1)
            axes.set_xlabel("lead time (days)")
            axes.set_xlim(0, days[-1])
            if slots:
                axes.set_title(channels[place], fontsize=10, loc="left", color=plots.INK)
        figure.legend(loc="outside upper left", ncols=5, fontsize=9)

    return plots.svg(draw, (10.2, 3.4))


def line(index: int, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return how the line of a forecaster is drawn: baselines grey and broken."""
    if entry["kind"] == "baseline":
        return {"color": plots.MUTED, "linestyle": _BASELINES[entry["name"]], "linewidth": 1.3}
    return {"color": plots.colour(index), "linewidth": 1.6}


def spectra(record: Mapping[str, Any], channel: str) -> str:
    """Draw power against degree at each lead, forecasts over the truth."""
    found, slot = record["spectra"], record["shown"].index(channel)
    leads = found["leads"]

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, len(leads), sharey=True, squeeze=False)[0]
        for place, axes in enumerate(panels):
            truth = np.array(found["truth"][place][slot])
            degrees = np.arange(len(truth))
            keep = slice(1, None)  # degree 0 is the mean
            axes.plot(degrees[keep], truth[keep], color=plots.INK, linewidth=2.2, label="truth")
            for index, entry in enumerate(record["forecasts"]):
                if entry["kind"] == "emulator":
                    power = np.array(found[entry["name"]][place][slot], np.float64)
                    axes.plot(degrees[keep], power[keep], label=entry["name"], **line(index, entry))
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel("degree")
            axes.set_title(hours(leads[place]), fontsize=10, loc="left", color=plots.INK)
        panels[0].set_ylabel("power per order")
        handles = panels[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper left", ncols=5, fontsize=9)

    return plots.svg(draw, (10.2, 3.4))


def maps(record: Mapping[str, Any], fields: Mapping[str, np.ndarray], lead: int, slot: int) -> str:
    """Draw truth, and each model's forecast and its difference from the truth, of one channel."""
    names = [entry["name"] for entry in record["forecasts"] if entry["kind"] == "emulator"]
    truth = fields[f"truth_{lead}"][slot]
    shown = [fields[f"{name}_{lead}"][slot] for name in names]
    low, high = _range(np.stack([truth, *shown]))
    errors = [field - truth for field in shown]
    worst = max(_range(np.abs(error))[1] for error in errors) or 1.0

    def draw(figure: Any) -> None:
        panels = figure.subplots(len(names), 3, squeeze=False)
        for row, name in enumerate(names):
            cells = [
                (truth, "truth", _FIELD, (low, high)),
                (shown[row], name, _FIELD, (low, high)),
                (errors[row], f"{name} - truth", _DIFFERENCE, (-worst, worst)),
            ]
            for axes, (field, title, palette, (bottom, top)) in zip(panels[row], cells):
                image = axes.imshow(
                    field,
                    cmap=palette,
                    vmin=bottom,
                    vmax=top,
                    extent=_extent(record),
                    aspect="auto",
                )
                axes.set_title(title, fontsize=9, loc="left", color=plots.INK)
                axes.grid(False)
                axes.set_xticks([])
                axes.set_yticks([])
                figure.colorbar(image, ax=axes, shrink=0.85)

    return plots.svg(draw, (10.2, 0.3 + 1.9 * len(names)))


def _range(fields: np.ndarray) -> tuple[float, float]:
    """Return all but the extremes of the finite values: a model may have diverged."""
    finite = fields[np.isfinite(fields)].astype(np.float64)
    low, high = np.percentile(finite, [0.5, 99.5]) if finite.size else (0.0, 0.0)
    return float(low), float(high)


def _extent(record: Mapping[str, Any]) -> tuple[float, float, float, float]:
    rows, columns = record["grid"]["latitudes"], record["grid"]["longitudes"]
    return (0.0, float(columns), float(rows), 0.0)


def hours(lead: int) -> str:
    """Return a lead in words: "6 h", "5 days"."""
    return f"{lead} h" if lead < 48 or lead % 24 else f"{lead // 24} days"
