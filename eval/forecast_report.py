# SPDX-License-Identifier: Apache-2.0
"""The page and the table of an evaluation of forecasts, from its record and its maps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from eval import forecast_plots as plots
from eval.cells import best_of, drawn, figure, named
from eval.page import Content, Markup, document, element, section, table
from eval.tables import table as markdown_table
from sqzjax import config as configs
from sqzjax.io import atomic

Record = Mapping[str, Any]
_LARGE = 10.0
"""Shares from here on are told as multiples."""
_TABLE_LEADS = (6, 12, 24, 48, 72, 120, 240)
_SCORES_NOTE = (
    "Rows are weighted by the cosine of latitude; squares are averaged over {starts} starts from "
    "{first} to {last} ({split}) before the root is taken."
)
_CORRELATION_NOTE = (
    "Correlation of the deviations from climatology at the valid time, mean over the starts. "
    "Climatology is the mean of the training period{waves}."
)
_TABLE_NOTE = "Root mean square error over each channel's standard deviation, mean of {channels}."
_SPECTRA_NOTE = (
    "Power of each degree divided by the number of its orders, mean over the starts. What lies "
    "below the truth at high degrees is blurred."
)
_SHARPNESS_NOTE = (
    "Power of degrees above {low:.0%} and up to {high:.0%} of the largest over the truth's, "
    "geometric mean of the channels: below 1 is blurred, above 1 is noise."
)


def write(record: Record, maps: Mapping[str, np.ndarray], workdir: Path) -> None:
    """Write `report.html` and `table.md`."""
    atomic.write_text(workdir / "report.html", render(record, maps))
    atomic.write_text(workdir / "table.md", markdown(record) + "\n")


def render(record: Record, maps: Mapping[str, np.ndarray]) -> str:
    """Return the page."""
    parts: list[Content] = [_header(record), _findings(record), _main(record)]
    note = _SCORES_NOTE.format(
        starts=record["starts"],
        first=record["period"][0],
        last=record["period"][1],
        split=record["config"]["split"],
    )
    shown = record["shown"]
    rmse = drawn(plots.by_lead(record, "rmse", shown))
    correlation = drawn(plots.by_lead(record, "correlation", shown))
    parts += [
        section("Error against lead time", rmse, note=note),
        section(
            "Anomaly correlation",
            correlation,
            note=_CORRELATION_NOTE.format(waves=_waves(record["config"]["climatology"])),
        ),
    ]
    if record["spectra"]["leads"]:
        drawings = [
            Markup(element("h3", name).html + drawn(plots.spectra(record, name)).html)
            for name in shown
        ]
        parts.append(section("Spectra", *drawings, note=_SPECTRA_NOTE))
        low, high = record["config"]["small_scales"]
        sharp = drawn(plots.by_lead(record, "sharpness", (), reference=1.0))
        parts.append(section("Sharpness", sharp, note=_SHARPNESS_NOTE.format(low=low, high=high)))
    parts += [_maps(record, maps)] if maps else []
    parts += [_channels(record), _settings(record)]
    return document(record["title"], *parts)


def _header(record: Record) -> Markup:
    grid = record["grid"]
    what = (
        f"{record['archive']}: {len(record['channels'])} channels, {grid['latitudes']} x "
        f"{grid['longitudes']} points ({grid['layout']})"
    )
    device = record["device"]
    when = (
        f"{record['created'].replace('T', ' ')}, {record['cores']} cores, {device['kind']} "
        f"({device['machine']}), {record['seconds']:,.0f} s"
    )
    packages = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    models = [
        f"{entry['name']}: {entry['source']}, {entry['parameters']:,} parameters"
        for entry in record["forecasts"]
        if entry["kind"] == "emulator"
    ]
    lines = [element("p", line, class_="meta") for line in (what, *models, when, packages)]
    return element("header", element("h1", record["title"]), *lines)


def findings(record: Record) -> list[str]:
    """Return what the scores say of each model, in words; None in a record is not finite."""
    scores = {entry["name"]: entry for entry in record["forecasts"]}
    lines = []
    for entry in record["forecasts"]:
        if entry["kind"] != "emulator":
            continue
        told = [
            _better_until(record, entry, scores[baseline])
            for baseline in ("persistence", "climatology")
        ]
        line = f"{entry['name']} {' and '.join(told)}"
        lines.append(line + _divergence(record, entry) + _sharpness(record, entry) + ".")
    return lines


def _divergence(record: Record, entry: Record) -> str:
    """Say when the errors cease to be numbers."""
    errors = entry["normalised_rmse"]
    if None not in errors:
        return ""
    count = errors.index(None)
    if count == 0:
        return f"; it diverges within {plots.hours(record['leads'][0])}"
    return f"; it diverges after {plots.hours(record['leads'][count - 1])}"


def _sharpness(record: Record, entry: Record) -> str:
    """Say how much of the small scales is left, as far as it is known."""
    sharpness = entry["sharpness"] or [None]
    first, last = sharpness[0], sharpness[-1]
    if first is None:
        return ""
    of = " of" if first < _LARGE else ""
    told = f"; it has {_share(first)}{of} the truth's small-scale power after the first step"
    if last is None:
        return told
    return f"{told} and {_share(last)} after {plots.hours(record['leads'][-1])}"


def _share(value: float) -> str:
    return f"{value:.0%}" if value < _LARGE else f"{value:.3g} times"


def _waves(climatology: Mapping[str, int]) -> str:
    """Say what of the season and the hour the climatology knows."""
    annual, daily = climatology["annual"], climatology["daily"]
    if not annual:
        return " and knows no seasons, so the seasonal cycle counts as skill"
    return f", with {annual} waves of the year and {daily} of the day"


def _better_until(record: Record, entry: Record, baseline: Record) -> str:
    """Say up to which lead all forecasts of a model have the smaller error."""
    ours, theirs = (np.array(e["normalised_rmse"], np.float64) for e in (entry, baseline))
    better = ours < theirs  # false where None, which becomes NaN
    name = baseline["name"]
    if better.all():
        return f"beats {name} at every lead to {plots.hours(record['leads'][-1])}"
    count = int(np.argmin(better))
    if count == 0:
        return f"does not beat {name} at {plots.hours(record['leads'][0])}"
    return f"beats {name} to {plots.hours(record['leads'][count - 1])}"


def _findings(record: Record) -> Markup:
    items = (element("li", line) for line in findings(record))
    return section("Findings", element("ul", *items))


def _table_leads(record: Record) -> list[int]:
    """Return the places of the leads that tables show: the usual ones, the first and the last."""
    leads = record["leads"]
    usual = {leads.index(lead) for lead in _TABLE_LEADS if lead in leads}
    return sorted(usual | {0, len(leads) - 1})


def _main(record: Record) -> Markup:
    places = _table_leads(record)
    headings: list[Content] = ["forecast", *(plots.hours(record["leads"][p]) for p in places)]
    best = {
        place: best_of([entry["normalised_rmse"][place] for entry in record["forecasts"]], min)
        for place in places
    }
    rows: list[list[Content]] = []
    for index, entry in enumerate(record["forecasts"]):
        values = [entry["normalised_rmse"][place] for place in places]
        cells = [figure(v, 4, best=v == best[place]) for v, place in zip(values, places)]
        rows.append([named(entry["name"], index), *cells])
    marked = [i for i, entry in enumerate(record["forecasts"]) if entry["kind"] == "baseline"]
    note = _TABLE_NOTE.format(channels=f"{len(record['channels'])} channels")
    return section("Scores", table(headings, rows, marked=marked), note=note)


def _maps(record: Record, maps: Mapping[str, np.ndarray]) -> Markup:
    leads = sorted({int(name.rsplit("_", 1)[1]) for name in maps})
    drawings = []
    for lead in leads:
        for slot, channel in enumerate(record["shown"]):
            title = element("h3", f"{channel}, {plots.hours(lead)}")
            drawings.append(Markup(title.html + drawn(plots.maps(record, maps, lead, slot)).html))
    note = f"Forecasts from {record['period'][0]}, in the archive's units."
    return section("Maps", *drawings, note=note)


def _channels(record: Record) -> Markup:
    """Return error, bias and correlation of every channel at some leads, folded away."""
    blocks: list[Content] = []
    names = [entry["name"] for entry in record["forecasts"]]
    titles = {
        "rmse": "root mean square error",
        "bias": "bias (forecast minus truth)",
        "correlation": "anomaly correlation",
    }
    for score, told in titles.items():
        for place in _table_leads(record):
            rows: list[list[Content]] = []
            for slot, channel in enumerate(record["channels"]):
                values = [entry[score][place][slot] for entry in record["forecasts"]]
                rows.append([channel, *(figure(value, 3) for value in values)])
            title = f"{told}, {plots.hours(record['leads'][place])}"
            blocks += [element("h3", title), table(["channel", *names], rows)]
    details = element("details", element("summary", "Every channel"), *blocks)
    return section("Channels", details, note="In the archive's units.")


def _settings(record: Record) -> Markup:
    settings = element("pre", configs.dump(record["config"]))
    return section("Settings", element("details", element("summary", "Every setting"), settings))


def markdown(record: Record) -> str:
    """Return the table of errors and sharpness in Markdown, with the findings below it."""
    places = _table_leads(record)
    rows = [
        {
            "name": entry["name"],
            **{str(place): entry["normalised_rmse"][place] for place in places},
            "sharp": entry["sharpness"] and entry["sharpness"][-1],
        }
        for entry in record["forecasts"]
    ]
    columns = [("normalised RMSE", "name", "{}")]
    columns += [(plots.hours(record["leads"][p]), str(p), "{:.4f}") for p in places]
    columns.append((f"sharpness, {plots.hours(record['leads'][-1])}", "sharp", "{:.2f}"))
    return "\n".join([*markdown_table(rows, columns), "", *(f"- {x}" for x in findings(record))])
