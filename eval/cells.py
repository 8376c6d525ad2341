# SPDX-License-Identifier: Apache-2.0
"""Cells of the report's tables: numbers, shares, names with their colour."""

from collections.abc import Callable, Sequence

from eval import plots
from eval.page import Content, Markup, element


def named(name: str, index: int) -> Markup:
    """Return the name of a model behind a dot of its colour."""
    dot = element("span", class_="dot", style=f"background:{plots.colour(index)}")
    return Markup(dot.html + element("strong", name).html)


def drawn(svg: str) -> Markup:
    """Return a drawing as a figure."""
    return element("figure", Markup(svg))


def figure(value: float | None, digits: int, best: bool = False) -> Content:
    """Return a number with so many digits after the point, a dash for None."""
    if value is None:
        return "-"
    digits = 0 if abs(value) >= 10_000 else digits
    shown = f"{value:,.{digits}f}" if abs(value) < 1e12 else f"{value:.4g}"
    return element("strong", shown) if best else shown


def percent(value: float, best: bool = False) -> Content:
    """Return a share as a percentage."""
    shown = f"{100 * value:.1f} %"
    return element("strong", shown) if best else shown


def span(interval: Sequence[float]) -> str:
    """Return an interval of shares."""
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"


def best_of(values: Sequence[float | None], choose: Callable[..., float]) -> float | None:
    """Return the best value, None where all are equal: then nothing is set bold."""
    known = [value for value in values if value is not None]
    return choose(known) if len(set(known)) > 1 else None
