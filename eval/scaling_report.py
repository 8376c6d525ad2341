# SPDX-License-Identifier: Apache-2.0
"""The page, the tables and the drawings of a scaling report, from its record alone."""

from pathlib import Path
from typing import Any

from eval import scaling_plots
from eval.cells import drawn
from eval.page import Content, Markup, document, element, section, table
from eval.scaling_tables import bent_text, law_text, number, tables
from eval.tables import table as markdown_table
from sqzjax import config as configs
from sqzjax.io import atomic

Record = dict[str, Any]
_FIGURES = {
    "isoflop": (
        "IsoFLOP curves",
        "Losses of each budget over size, the parabola in ln N, and its vertex (star). Hollow "
        "points belong to a budget that was refused.",
    ),
    "laws": (
        "Best size and loss over compute",
        "Bands are {confidence:.0%} intervals. The two laws of the loss meet the same vertices "
        "and part beyond them: a power law goes to zero, the other one to its floor.",
    ),
    "parametric": (
        "The parametric law",
        "Losses of E + A/N^α + B/D^β with the runs it was fitted to, in the same colours.",
    ),
    "residuals": (
        "What the fits leave",
        "Left, every run; right, the vertices against both laws of the loss.",
    ),
}


def write(record: Record, workdir: Path) -> None:
    """Write `report.html`, `table.md` and one SVG for each drawing."""
    figures = scaling_plots.drawings(record)
    atomic.write_text(workdir / "report.html", render(record, figures))
    atomic.write_text(workdir / "table.md", markdown(record))
    for name, drawing in figures.items():
        if drawing.startswith("<svg"):
            drawing = drawing.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
            atomic.write_text(workdir / f"{name}.svg", drawing)


def render(record: Record, figures: dict[str, str]) -> str:
    """Return the page."""
    confidence = record["config"]["bootstrap"]["confidence"]
    shown = {
        name: section(title, drawn(figures[name]), note=note.format(confidence=confidence))
        for name, (title, note) in _FIGURES.items()
        if name in figures
    }
    parts: list[Content] = [_header(record), _findings(record), shown["isoflop"]]
    parts += [_section(record, name) for name in ("optima", "laws")]
    parts.append(shown["laws"])
    parts += [_section(record, name) for name in ("targets", "held_out", "sizes")]
    if "parametric" in shown:
        parts += [_section(record, "parametric"), shown["parametric"]]
    parts += [shown["residuals"], _section(record, "six_nd"), _section(record, "schedules")]
    settings = element("pre", configs.dump(record["config"]))
    details = element("details", element("summary", "Every setting"), settings)
    parts.append(section("Settings", details))
    return document(record["title"], *(part for part in parts if part))


def _header(record: Record) -> Markup:
    runs, versions = record["runs"], record["versions"]
    what = (
        f"{runs['count']} runs, {number(runs['decades'], 2)} decades of compute, schedule "
        f"{runs['schedule']}, loss {runs['loss_kind']}, data in {runs['unit']}."
    )
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    when = f"{record['created'].replace('T', ' ')}, commit {record['commit']}; {packages}"
    lines = [element("p", line, class_="meta") for line in (runs["source"], what, when)]
    return element("header", element("h1", record["title"]), *lines)


def _findings(record: Record) -> Markup:
    lines = [element("li", line) for line in findings(record)]
    failed = [element("p", line, class_="failed") for line in record["warnings"]]
    return section("Findings", element("ul", *lines), *failed)


def findings(record: Record) -> list[str]:
    """Return the laws and their predictions as sentences."""
    lines = []
    for law in record["laws"]:
        text = (
            f"{law['name'].capitalize()}: N = {law_text(law['size'])}, L = {law_text(law['loss'])}"
        )
        if law["data"]:
            text += f", D = {law_text(law['data'])} {record['runs']['unit']}"
            implied = 1 - law["size"]["exponent"]
            text += f" (C = 6ND implies an exponent of {implied:.4f})"
        if law["saturating"]:
            text += f"; with a floor L = {bent_text(law['saturating'])}"
        lines.append(text + ".")
    fit = record["parametric"]
    if fit and not fit["error"]:
        lines.append(
            f"Parametric: L = {fit['E']:.4g} + {fit['A']:.4g} / N^{fit['alpha']:.4f} + "
            f"{fit['B']:.4g} / D^{fit['beta']:.4f}, best size ~ C^{fit['size_exponent']:.3f} "
            f"(D in {fit['unit']})."
        )
    return lines


_TITLES = {
    "optima": ("Best size of each budget", ""),
    "laws": ("Laws of compute", "Error: root mean square of the log residuals of the loss."),
    "targets": (
        "Extrapolation",
        "What each law says beyond the budgets, next to what was measured there.",
    ),
    "held_out": (
        "Held-out budgets",
        "Every law fitted without the largest budgets, asked for the loss at their best size.",
    ),
    "sizes": (
        "Which parameters count",
        "params are all; counted_params leave out biases (emulators) or embeddings (language "
        "models); body_params, where given, also patch embedding and head.",
    ),
    "parametric": ("Parametric fit", ""),
    "six_nd": (
        "Counted FLOPs against 6ND",
        "Counted FLOPs over 6 x parameters x data; with data in samples of unknown tokens, that "
        "number times how far off 6ND is.",
    ),
    "schedules": (
        "Cooldowns",
        "Held-out loss before and after the cooldown, and of a cosine run of its own with as many "
        "FLOPs, where there is one.",
    ),
}


def _section(record: Record, name: str) -> Content:
    title, note = _TITLES[name]
    columns, rows = tables(record)[name]
    if not rows:
        return ""
    return section(title, table(columns, rows), note=note)


def markdown(record: Record) -> str:
    """Return findings and tables in Markdown."""
    lines = [f"# {record['title']}", "", record["runs"]["source"], ""]
    lines += [f"- {line}" for line in findings(record)]
    lines += [f"- Beware: {line}" for line in record["warnings"]]
    for name, (columns, rows) in tables(record).items():
        if rows:
            title, note = _TITLES[name]
            lines += ["", f"## {title}", ""] + ([note, ""] if note else [])
            flat = [dict(zip(columns, row)) for row in rows]
            lines += markdown_table(flat, [(column, column, "{}") for column in columns])
    return "\n".join(lines) + "\n"
