# SPDX-License-Identifier: Apache-2.0
"""Tables of a scaling report as text: headings and rows, for the page and for Markdown."""

from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]
Table = tuple[list[str], list[list[str]]]


def tables(record: Record) -> dict[str, Table]:
    """Return headings and rows of every table by name."""
    return {
        "optima": _optima(record),
        "laws": _laws(record),
        "targets": _targets(record),
        "held_out": _held_out(record),
        "sizes": _sizes(record),
        "parametric": _parametric(record),
        "six_nd": _six_nd(record),
        "schedules": _schedules(record),
    }


def _optima(record: Record) -> Table:
    columns = [
        "budget (FLOPs)",
        "runs",
        "best size",
        "interval",
        "loss",
        "interval of the loss",
        f"data ({record['runs']['unit']})",
    ]
    rows = [
        [
            number(one["budget"]),
            str(one["points"]),
            count(one["size"]),
            span(one["size_interval"], count),
            number(one["loss"]),
            span(one["loss_interval"]),
            count(one["data"]),
        ]
        for one in record["isoflop"]["optima"]
    ]
    for one in record["isoflop"]["refusals"]:
        rows.append([number(one["budget"]), "-", f"refused: {one['reason']}", "-", "-", "-", "-"])
    return columns, rows


def _laws(record: Record) -> Table:
    columns = [
        "fit",
        "quantity",
        "law",
        "interval of the exponent",
        "interval of the floor",
        "error",
    ]
    rows = []
    for law in record["laws"]:
        for quantity, name in (("size", "best size"), ("data", "data"), ("loss", "loss")):
            one = law[quantity]
            if one:
                error = f"{law['loss_error']:.2%}" if quantity == "loss" else "-"
                rows.append(
                    [law["name"], name, law_text(one), span(one["exponent_interval"]), "-", error]
                )
        bent = law["saturating"]
        if bent:
            rows.append(
                [
                    law["name"],
                    "loss with a floor",
                    bent_text(bent),
                    span(bent["exponent_interval"]),
                    span(bent["floor_interval"]),
                    f"{bent['error']:.2%}",
                ]
            )
    envelope = record["envelope"]
    if envelope["error"]:
        rows.append(["envelope", "-", f"none: {envelope['error']}", "-", "-", "-"])
    else:
        for quantity in ("size", "data", "loss"):
            if envelope[quantity]:
                rows.append(
                    [
                        f"envelope ({len(envelope['winners'])} sizes win)",
                        quantity,
                        law_text(envelope[quantity]),
                        "-",
                        "-",
                        "-",
                    ]
                )
    return columns, rows


def _targets(record: Record) -> Table:
    columns = [
        "FLOPs",
        "fit",
        "best size",
        "interval of the size",
        "loss, power law",
        "interval",
        "loss, with a floor",
        "interval of that",
        "measured loss",
    ]
    rows = []
    for law in record["laws"]:
        for one in law["targets"]:
            row = _size_of_target(one, law["name"])
            row += [number(one["loss"]), span(one["loss_interval"])]
            row += [number(one.get("saturating")), span(one.get("saturating_interval"))]
            rows.append([*row, number(one["measured_loss"])])
    measured = {one["flops"]: one["measured_loss"] for one in record["laws"][0]["targets"]}
    fit = record["parametric"]
    for one in fit["targets"] if fit and not fit["error"] else ():
        row = [*_size_of_target(one, "parametric"), "-", "-"]
        row += [number(one["loss"]), span(one["loss_interval"])]
        rows.append([*row, number(measured.get(one["flops"]))])
    return columns, rows


def _size_of_target(one: Record, name: str) -> list[str]:
    return [number(one["flops"]), name, count(one["size"]), span(one["size_interval"], count)]


def _held_out(record: Record) -> Table:
    columns = [
        "budget (FLOPs)",
        "best size",
        "predicted size",
        "loss",
        "power law",
        "with a floor",
        "parametric",
    ]
    rows = []
    for one in record["held_out"]:
        row = [
            number(one["budget"]),
            count(one["size"]),
            _off(one, "predicted_size", "size"),
            number(one["loss"]),
        ]
        row += [_off(one, name, "loss") for name in ("power_law", "saturating", "parametric")]
        rows.append(row)
    return columns, rows


def _off(row: Record, name: str, truth: str) -> str:
    """Return a prediction with its error."""
    value = row[name]
    if value is None:
        return "-"
    shown = count(value) if truth == "size" else number(value)
    return f"{shown} ({value / row[truth] - 1:+.1%})"


def _sizes(record: Record) -> Table:
    targets = record["config"]["targets"]
    columns = ["N", "law of the best size", *(f"at {number(one['flops'])}" for one in targets)]
    rows = []
    for one in record["sizes"]:
        law = one["law"]
        if law is None:
            rows.append([one["size"], f"none: {one['error']}", *("-" for _ in targets)])
        else:
            rows.append(
                [
                    one["size"],
                    law_text(law["size"]),
                    *(count(target["size"]) for target in law["targets"]),
                ]
            )
    return columns, rows


def _parametric(record: Record) -> Table:
    columns, fit = ["constant", "value", "interval"], record["parametric"]
    if not fit:
        return columns, []
    if fit["error"]:
        return columns, [["none", fit["error"], "-"]]
    rows = [[name, number(fit[name]), span(ends)] for name, ends in fit["intervals"].items()]
    rows.append(
        [
            "exponent of the best size",
            number(fit["size_exponent"]),
            span(fit["size_exponent_interval"]),
        ]
    )
    rows.append(["objective (sum)", number(fit["objective"], 6), "-"])
    state = "converged" if fit["converged"] else "not converged"
    rows.append([f"gradient ({state})", f"{fit['gradient']:.1e}", "-"])
    rows.append(["starts", f"{fit['starts']:,}, {fit['agreeing']} of the best 200 end here", "-"])
    return columns, rows


def _six_nd(record: Record) -> Table:
    rows = record["six_nd"]
    names = list(rows[0]["ratios"]) if rows else []
    columns = ["size", "parameters", *(f"FLOPs / 6ND by {name}" for name in names)]
    return columns, [
        [one["size"], count(one["sizes"]["params"]), *(f"{one['ratios'][n]:.4g}" for n in names)]
        for one in rows
    ]


def _schedules(record: Record) -> Table:
    columns = [
        "run",
        "trunk at the branch",
        "cooled",
        "change",
        "cosine, as many FLOPs",
        "cooled against it",
    ]
    rows = []
    for one in record.get("schedules", ()):
        row = [one["name"], *(number(one[name]) for name in ("trunk", "cooled"))]
        row += [f"{one['cooled'] / one['trunk'] - 1:+.1%}", number(one["cosine"])]
        row += [f"{one['cooled'] / one['cosine'] - 1:+.1%}" if one["cosine"] else "-"]
        rows.append(row)
    return columns, rows


def law_text(law: Record) -> str:
    """Write a power law."""
    return f"{number(law['coefficient'], 5)} C^{law['exponent']:.4f}"


def bent_text(law: Record) -> str:
    """Write a law with a floor."""
    return (
        f"{number(law['floor'])} + {number(law['coefficient'])} "
        f"(C/{number(law['reference'])})^-{law['exponent']:.3f}"
    )


def number(value: float | None, digits: int = 4) -> str:
    """Write a number with so many digits, a dash for None."""
    return "-" if value is None else f"{value:.{digits}g}".replace("e+", "e")


def count(value: float | None) -> str:
    """Write a number of parameters or samples with its unit."""
    if value is None:
        return "-"
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g}"


def span(ends: Sequence[float] | None, write: Any = number) -> str:
    """Write an interval, a dash for None."""
    return "-" if ends is None else f"{write(ends[0])} to {write(ends[1])}"
