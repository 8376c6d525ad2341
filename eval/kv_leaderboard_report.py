# SPDX-License-Identifier: Apache-2.0
"""The page, the table and the figures of a comparison of caches, from its record alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.cells import drawn, figure, named, percent, span
from eval.kv_leaderboard_plots import pareto, points_of
from eval.page import Content, Markup, document, element, join, section, table
from eval.tables import table as markdown_table
from sqzjax import config as configs
from sqzjax.io import atomic

Row = dict[str, Any]
_NOTE = (
    "Bits, bytes and compression count every array of a full cache of {context:,} tokens, exact "
    "parts in bfloat16; compression is against 16 bits. Texts and prompts entered the caches "
    "{chunk} tokens at a time: tokens of a chunk see each other as they are, so a lossy cache is "
    "judged by what lies further back. Speeds are medians on {device} with a load average of up "
    "to {load:.1f}; they compare implementations on this machine, not methods."
)


def write(record: dict[str, Any], workdir: Path) -> None:
    """Write `report.html`, `table.md` and one drawing for each plot."""
    atomic.write_text(workdir / "report.html", render(record))
    atomic.write_text(workdir / "table.md", markdown(record) + "\n")
    for name, drawing in drawings(record).items():
        if drawing.startswith("<svg"):
            drawing = drawing.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
            atomic.write_text(workdir / f"{name}.svg", drawing)


def render(record: dict[str, Any]) -> str:
    """Return the page."""
    parts: list[Content] = [_header(record), _main(record)]
    parts += [_figure(name, drawing) for name, drawing in drawings(record).items()]
    parts += [_failures(record)] if any(_failed(record)) else []
    settings = element("pre", configs.dump(record["config"]))
    details = element("details", element("summary", "Every setting"), settings)
    seconds = sum(row["seconds"] for row in record["rows"])
    parts.append(section("Settings", details, note=f"All rows took {seconds:,.0f} s."))
    return document(record["title"], *parts)


def drawings(record: dict[str, Any]) -> dict[str, str]:
    """Return the plots by name; one without points is left out."""
    found = {}
    first = {part: next(iter(names), "") for part, names in _tasks(record).items()}
    for part, value in (("perplexity", "perplexity"), ("retrieval", "accuracy")):
        points = points_of(record["rows"], part, first[part], value)
        if points:
            found[part] = pareto(points, higher_is_better=part == "retrieval", measure=first[part])
    return found


def _tasks(record: dict[str, Any]) -> dict[str, list[str]]:
    """Return the names of tasks of each part, in the order of the configuration."""
    return {
        part: [task["name"] for task in record["config"][part]]
        for part in ("perplexity", "retrieval")
    }


def _header(record: dict[str, Any]) -> Markup:
    model, versions = record["model"], record["versions"]
    what = (
        f"{model['name']} ({model['source']}): {model['family']}, {model['parameters']:,} "
        f"parameters, {model['layers']} layers, {model['dtype']}"
    )
    when = f"{record['created'].replace('T', ' ')}, {record['cores']} cores, {_device(record)}"
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [element("p", line, class_="meta") for line in (what, when, packages)]
    return element("header", element("h1", record["title"]), *lines)


def _device(record: dict[str, Any]) -> str:
    device = record["device"]
    return f"{device['kind']} ({device['machine']})"


def _main(record: dict[str, Any]) -> Markup:
    tasks = _tasks(record)
    headings: list[Content] = ["cache", "bits", "bytes/token", "smaller by"]
    for name in tasks["perplexity"]:
        headings += [name, "change"]
    headings += [*tasks["retrieval"], "prefill tokens/s", "decode tokens/s"]
    kinds = _kinds(record["rows"])
    rows: list[list[Content]] = []
    for row in record["rows"]:
        cells: list[Content] = [named(row["name"], kinds.index(row["kind"]))]
        sizes = row["bytes"] or {}
        cells += [figure(sizes.get("average_bits"), 2), figure(sizes.get("per_token"), 0)]
        cells.append(f"{sizes['compression']:.2f} x" if sizes else "-")
        for name in tasks["perplexity"]:
            metrics = row["perplexity"].get(name, {})
            cells += [figure(metrics.get("perplexity"), 3), _change(metrics.get("change"))]
        cells += [_share(row["retrieval"].get(name)) for name in tasks["retrieval"]]
        speed = row["speed"] or {}
        cells.append(figure(speed.get("prefill_tokens_per_second"), 0))
        cells.append(figure(speed.get("decode_tokens_per_second"), 0))
        rows.append(cells)
    marked = [index for index, row in enumerate(record["rows"]) if row["status"] != "ok"]
    return section("Caches", table(headings, rows, marked=marked), note=note(record))


def note(record: dict[str, Any]) -> str:
    """Return what must be known to read the figures."""
    sizes = [row["bytes"]["context"] for row in record["rows"] if row["bytes"]]
    return _NOTE.format(
        context=sizes[0] if sizes else record["config"]["context"],
        chunk=record["config"]["prefill_chunk"],
        device=_device(record),
        load=max((row["load_average"] for row in record["rows"]), default=0.0),
    )


def _kinds(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["kind"] for row in rows))


def _change(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def _share(metrics: dict[str, Any] | None) -> Content:
    if metrics is None:
        return "-"
    interval = element("span", span(metrics["interval_95"]), class_="range")
    return join(percent(metrics["accuracy"]), interval)


def _figure(part: str, drawing: str) -> Markup:
    title = {"perplexity": "Bytes against perplexity", "retrieval": "Bytes against retrieval"}[part]
    note = (
        "One point a cache, coloured by method; the dashed line joins those that no other one "
        "beats in both, and only they are named. Bars are 95 % intervals."
    )
    return section(title, drawn(drawing), note=note)


def _failed(record: dict[str, Any]) -> list[Row]:
    return [row for row in record["rows"] if row["status"] != "ok"]


def _failures(record: dict[str, Any]) -> Markup:
    blocks = (
        element("div", element("strong", row["name"]), ": ", row["error"], class_="failed")
        for row in _failed(record)
    )
    return section("What failed", *blocks)


def markdown(record: dict[str, Any]) -> str:
    """Return the table in Markdown, with the reason of each failed row below it."""
    tasks = _tasks(record)
    columns = [
        ("cache", "name", "{}"),
        ("bits", "bits", "{:.2f}"),
        ("bytes/token", "per_token", "{:,.0f}"),
        ("smaller by", "compression", "{:.2f} x"),
    ]
    for name in tasks["perplexity"]:
        columns += [(name, name, "{:.3f}"), ("change", f"{name} change", "{:+.3f}")]
    columns += [(name, f"{name} share", "{}") for name in tasks["retrieval"]]
    columns += [
        ("prefill tokens/s", "prefill", "{:,.0f}"),
        ("decode tokens/s", "decode", "{:,.0f}"),
    ]
    lines = markdown_table([_flat(row, tasks) for row in record["rows"]], columns)
    lines += ["", note(record)]
    lines += [f"\n{row['name']} failed at {row['error']}" for row in _failed(record)]
    return "\n".join(lines)


def _flat(row: Row, tasks: dict[str, list[str]]) -> Row:
    sizes, speed = row["bytes"] or {}, row["speed"] or {}
    flat = {
        "name": row["name"],
        "bits": sizes.get("average_bits"),
        "per_token": sizes.get("per_token"),
        "compression": sizes.get("compression"),
        "prefill": speed.get("prefill_tokens_per_second"),
        "decode": speed.get("decode_tokens_per_second"),
    }
    for name in tasks["perplexity"]:
        metrics = row["perplexity"].get(name, {})
        flat |= {name: metrics.get("perplexity"), f"{name} change": metrics.get("change")}
    for name in tasks["retrieval"]:
        found = row["retrieval"].get(name)
        share = found and f"{100 * found['accuracy']:.1f} % ({span(found['interval_95'])})"
        flat[f"{name} share"] = share
    return flat
