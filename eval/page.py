# SPDX-License-Identifier: Apache-2.0
"""Pieces of a self-contained HTML page: text is escaped here and nowhere else."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Markup:
    """HTML that is safe as it is; every plain string is escaped on its way into one."""

    html: str


Content = str | Markup


def text(content: Content) -> str:
    """Return HTML of some content."""
    return content.html if isinstance(content, Markup) else escape(content, quote=True)


def element(tag: str, *children: Content, **attributes: str) -> Markup:
    """Return an element; `class_` spells the attribute `class`."""
    names = {name.rstrip("_"): escape(value, quote=True) for name, value in attributes.items()}
    opening = "".join(f' {name}="{value}"' for name, value in names.items())
    return Markup(f"<{tag}{opening}>{''.join(map(text, children))}</{tag}>")


def join(*parts: Content) -> Markup:
    """Put contents one after another."""
    return Markup("\n".join(map(text, parts)))


def table(
    headings: Sequence[Content],
    rows: Sequence[Sequence[Content]],
    *,
    text_columns: int = 1,
    marked: Sequence[int] = (),
) -> Markup:
    """Return a table: the first `text_columns` are left-aligned, numbers right-aligned.

    Rows in `marked` are muted (baselines).
    """

    def cells(tag: str, row: Sequence[Content]) -> Markup:
        made = (
            element(tag, cell, class_="text" if index < text_columns else "number")
            for index, cell in enumerate(row)
        )
        return join(*made)

    body = (
        element("tr", cells("td", row), class_="muted" if index in marked else "row")
        for index, row in enumerate(rows)
    )
    head = element("thead", element("tr", cells("th", headings)))
    return element("div", element("table", head, element("tbody", *body)), class_="scroll")


def section(title: Content, *children: Content, note: str = "") -> Markup:
    """Return a titled section with an explanatory line."""
    lead = (element("p", note, class_="note"),) if note else ()
    return element("section", element("h2", title), *lead, *children)


def document(title: str, *children: Content) -> str:
    """Return the whole page."""
    body = element("body", element("main", *children))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n{body.html}\n</html>\n"
    )


CSS = """
:root { --ink: #1f2933; --muted: #66727f; --line: #e1e6eb; --soft: #f6f8fa; --accent: #1f6feb; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 40px 28px 72px; }
header { border-bottom: 2px solid var(--ink); padding-bottom: 18px; margin-bottom: 8px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 10px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 0 0 4px; letter-spacing: -0.005em; }
h3 { font-size: 15px; margin: 22px 0 8px; }
section { padding-top: 34px; }
p { margin: 6px 0; }
.note, .meta { color: var(--muted); font-size: 13.5px; max-width: 96ch; }
.meta { margin: 0; }
.scroll { overflow-x: auto; margin-top: 12px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: right; color: var(--muted); font-weight: 600; font-size: 12.5px;
  padding: 6px 12px; border-bottom: 1px solid #b9c2cb; vertical-align: bottom; }
td { padding: 7px 12px; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child { padding-left: 2px; }
th.text, td.text { text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.muted td { color: var(--muted); }
tr.muted td.text { font-style: italic; }
strong { font-weight: 650; }
.range { color: var(--muted); font-size: 12.5px; margin-left: 6px; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 8px; }
figure { margin: 16px 0 0; }
svg { max-width: 100%; height: auto; display: block; }
.row-of { display: flex; flex-wrap: wrap; gap: 12px 32px; align-items: flex-start; }
.row-of h3 { margin: 14px 0 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 14px; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px;
  background: var(--soft); }
.card h3 { margin: 0 0 6px; font-size: 13px; }
.card p { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; line-height: 1.5; }
.prompt { color: var(--muted); }
details { margin-top: 14px; }
summary { cursor: pointer; color: var(--accent); font-size: 13.5px; }
.right { color: #22733f; } .wrong { color: #b3261e; }
.failed { border-left: 4px solid #b3261e; background: #fdf3f2; padding: 10px 14px; margin-top: 12px;
  border-radius: 0 6px 6px 0; overflow-wrap: anywhere; }
code, pre { font: 12.5px/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, monospace; }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 8px;
  padding: 12px 14px; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
@media print { main { max-width: none; padding: 0; } section { break-inside: avoid; } }
"""
