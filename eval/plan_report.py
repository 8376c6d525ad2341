# SPDX-License-Identifier: Apache-2.0
"""The tables of a capacity plan."""

from typing import Any

from eval.tables import table

_MEMORY = (
    ("model", "model", "{}"),
    ("program", "phase", "{}"),
    ("mesh", "mesh", "{}"),
    ("parameters", "parameters", "{:.3f}"),
    ("optimizer", "optimizer", "{:.3f}"),
    ("cache", "cache", "{:.3f}"),
    ("XLA arguments", "arguments", "{:.3f}"),
    ("ours / XLA", "arguments_percent", "{:+.2f} %"),
    ("outputs", "outputs", "{:.3f}"),
    ("temporaries", "temporaries", "{:.3f}"),
    ("peak", "peak", "{:.3f}"),
    ("code", "code", "{:.3f}"),
    ("fits", "fits", "{}"),
)
_TIME = (
    ("model", "model", "{}"),
    ("program", "phase", "{}"),
    ("GFLOP", "flops", "{:,.1f}"),
    ("without recomputation", "model_flops", "{:,.1f}"),
    ("XLA GFLOP", "xla_flops", "{:,.1f}"),
    ("GB moved", "traffic", "{:,.2f}"),
    ("GB sent", "sent", "{:,.3f}"),
    ("compute ms", "compute", "{:,.3f}"),
    ("memory ms", "memory", "{:,.3f}"),
    ("link ms", "link", "{:,.3f}"),
    ("bound", "bound", "{}"),
    ("least step ms", "overlapped", "{:,.3f}"),
    ("tokens/s at most", "tokens_per_second", "{:,.0f}"),
)
_STEPS = (
    ("collective", "kind", "{}"),
    ("count", "count", "{:,}"),
    ("devices", "devices", "{}"),
    ("torus axes", "axes", "{}"),
    ("shape", "shape", "`{}`"),
    ("MB each", "megabytes", "{:,.3f}"),
    ("MB sent in all", "sent", "{:,.1f}"),
)
_MAX_STEPS = 12
_NOTES = (
    "Bytes are GB of one device. Arguments, outputs, temporaries and code are XLA's memory "
    "analysis; parameters, optimizer and cache are ours, from shapes and shardings. Outputs share "
    "the arguments' memory where these are donated; peak = arguments + outputs - shared + "
    "temporaries.",
    "Operations are of one device and count causal scores only; XLA counts the body of a loop "
    "once. A time "
    "is the least that the chip's peak figures allow; a step takes at least the longest of the "
    "three, more where they do not overlap.",
)


def markdown(record: dict[str, Any]) -> str:
    """Render the tables of a record that `run_plan` returned or that was read from its JSON."""
    hardware, config = record["hardware"], record["config"]
    rates = (
        f"{hardware['peak_flops'] / 1e12:.0f} TFLOP/s, {hardware['bandwidth'] / 1e9:.0f} GB/s, "
        f"{hardware['memory_bytes'] / 1e9:.1f} GB, {hardware['link_bandwidth'] / 1e9:.0f} GB/s a "
        "link and direction"
    )
    lines = [
        f"# Plan for {config['topology']}",
        "",
        f"Chip: {hardware['name']}; {rates} ({hardware['source']}).",
        f"jax {record['versions']['jax']}, libtpu {record['versions']['libtpu']}, commit "
        f"{record['commit']}, {record['created']}. Compiled, not run.",
        "",
    ]
    compiled = [row for row in record["programs"] if row["status"] == "ok"]
    if compiled:
        lines += ["### Memory", "", *table([_memory(row) for row in compiled], _MEMORY), ""]
        lines += ["### Least time", "", *table([_time(row) for row in compiled], _TIME), ""]
        lines += [*_NOTES, ""]
    for row in compiled:
        lines += _communication(row)
    for row in record["programs"]:
        if row["status"] != "ok":
            lines += [f"**{row['model']} {row['phase']}: {row['status']}.** {_first(row)}", ""]
    return "\n".join(lines)


def _first(row: dict[str, Any]) -> str:
    """Return the telling part of a compiler's message."""
    lines = [line.strip() for line in row["error"].splitlines() if line.strip()]
    return " ".join(lines[:2])


def _memory(row: dict[str, Any]) -> dict[str, Any]:
    sizes = {name: row["bytes"].get(name) for name in ("parameters", "optimizer", "cache")}
    sizes |= {name: row["memory"][name] for name in row["memory"]}
    scaled = {name: None if size is None else size / 1e9 for name, size in sizes.items()}
    mesh = " ".join(f"{axis}={size}" for axis, size in row["mesh"].items() if size > 1) or "1 chip"
    kept = {name: row[name] for name in ("model", "phase", "arguments_percent")}
    return kept | scaled | {"mesh": mesh, "fits": "yes" if row["fits"] else "**no**"}


def _time(row: dict[str, Any]) -> dict[str, Any]:
    limits = row["roofline"]
    giga = ("flops", "model_flops", "traffic", "sent")
    milli = ("compute", "memory", "link", "overlapped")
    shown = {name: limits[name] / 1e9 for name in giga} | {n: 1e3 * limits[n] for n in milli}
    shown |= {name: limits[name] for name in ("bound", "tokens_per_second")}
    flops = row["xla_flops"]
    shown["xla_flops"] = None if flops is None else flops / 1e9
    return shown | {"model": row["model"], "phase": row["phase"]}


def _communication(row: dict[str, Any]) -> list[str]:
    title = f"### Communication of {row['model']}, {row['phase']}"
    steps = row["collectives"]
    if not steps:
        return [title, "", "None.", ""]
    shown = [
        {
            **step,
            "devices": len(step["group"]),
            "megabytes": step["result_bytes"] / 1e6,
            "sent": step["count"] * step["sent_bytes"] / 1e6,
        }
        for step in steps[:_MAX_STEPS]
    ]
    lines = [title, "", *table(shown, _STEPS), ""]
    if rest := steps[_MAX_STEPS:]:
        sent = sum(step["count"] * step["sent_bytes"] for step in rest) / 1e6
        lines += [f"{len(rest)} smaller kinds of step send {sent:,.1f} MB.", ""]
    if row["unknown_loops"]:
        names = ", ".join(row["unknown_loops"])
        lines += [f"Counted once, since their number of trips is not known: {names}.", ""]
    return lines
