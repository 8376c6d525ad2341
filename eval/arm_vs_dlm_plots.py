# SPDX-License-Identifier: Apache-2.0
"""Figures of the comparison of autoregressive and diffusion decoding, from its record alone.

A regime keeps its colour and a model its line style in every figure; hollow marks do not fit in
the device's memory.
"""

from collections.abc import Sequence
from typing import Any

from eval.plots import COLOURS, INK, MUTED
from eval.plots import svg as svg

Row = dict[str, Any]
NAMES = {
    "arm_prefill": "prefill",
    "arm_decode": "decode",
    "full_dlm": "whole sequence",
    "block_uncached": "block without cache",
    "block_cached": "block with cache",
}
_MARKS = dict(zip(NAMES, "v^Xsod", strict=False))
_SHADES = dict(zip(NAMES, COLOURS, strict=False))
_LINES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
_MEASURES = (
    ("intensity", "operations per byte"),
    ("ms", "step (ms)"),
    ("ms_per_token", "ms per token of a sequence"),
    ("tokens_per_second", "tokens/s of the batch"),
)
Series = list[tuple[tuple[str, str], list[Row]]]


def series_of(rows: Sequence[Row]) -> Series:
    """Group rows by model and regime, in order of appearance."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["model"], row["regime"]), []).append(row)
    return list(found.items())


def rooflines(rows: Sequence[Row], devices: Sequence[dict[str, Any]], models: Sequence[str]) -> str:
    """Draw achievable operations/s against intensity, a panel per device, a line per regime.

    `rows` differ in batch along a line, which starts at the smallest.
    """

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, len(devices), sharey=True, squeeze=False)[0]
        for axes, device in zip(panels, devices, strict=True):
            here = [row for row in rows if row["device"] == device["name"]]
            low = min(row["intensity"] for row in here) / 2
            high = max([*(row["intensity"] for row in here), device["ridge"]]) * 3
            top, ridge = device["ridge"] * device["bandwidth"] / 1e12, device["ridge"]
            roof = [low * device["bandwidth"] / 1e12, top, top]
            axes.plot([low, ridge, high], roof, color=INK, linewidth=1.6)
            axes.axvline(ridge, color=MUTED, linestyle=(0, (2, 3)), linewidth=1)
            for (model, _), found in series_of(here):
                speed = [row["intensity"] * row["gbyte"] / row["ms"] for row in found]
                places = [row["intensity"] for row in found]
                _line(axes, places, speed, found, _style(models, model))
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel("operations per byte")
            title = f"{device['name']}: ridge {ridge:.0f}"
            axes.set_title(title, fontsize=10, loc="left", color=INK)
        panels[0].set_ylabel("operations/s (10¹²)")
        _legend(figure, panels[0])

    return svg(draw, (10.2, 4.6))


def against(rows: Sequence[Row], axis: str, label: str, ridge: float, models: Sequence[str]) -> str:
    """Draw intensity, step time, time per token and throughput against one of the settings."""

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, 4, squeeze=False)[0]
        for axes, (field, title) in zip(panels, _MEASURES, strict=True):
            for (model, _), found in series_of(rows):
                places = [row[axis] for row in found]
                values = [row[field] for row in found]
                _line(axes, places, values, found, _style(models, model))
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            ticks = sorted({row[axis] for row in rows})
            axes.set_xticks(ticks, [_tokens(tick) for tick in ticks])
            _readable(axes, [row[field] for row in rows])
            axes.set_xlabel(label)
            axes.set_title(title, fontsize=10, loc="left", color=INK)
        panels[0].axhline(ridge, color=MUTED, linestyle=(0, (2, 3)), linewidth=1)
        panels[0].annotate(
            "ridge",
            (0, ridge),
            xycoords=("axes fraction", "data"),
            xytext=(3, 3),
            textcoords="offset points",
            fontsize=8,
            color=MUTED,
        )
        _legend(figure, panels[0])

    return svg(draw, (10.2, 3.7))


def break_even(
    rows: Sequence[Row], batches: Sequence[int], models: Sequence[str], title: str
) -> str:
    """Draw the ratio of step times against batch, a panel per context, a colour per block.

    A dotted level is what a pass yields: above it autoregressive decoding is faster.
    """

    def draw(figure: Any) -> None:
        contexts = sorted({row["context"] for row in rows})
        blocks = sorted({row["block"] for row in rows})
        panels = figure.subplots(1, len(contexts), sharey=True, squeeze=False)[0]
        for axes, context in zip(panels, contexts, strict=True):
            for row in (row for row in rows if row["context"] == context):
                shade = COLOURS[blocks.index(row["block"]) % len(COLOURS)]
                axes.plot(
                    batches,
                    row["break_even"],
                    color=shade,
                    linestyle=_style(models, row["model"]),
                    marker="o",
                    markersize=4,
                    linewidth=1.5,
                    label=f"{row['model']}, block {row['block']}",
                )
                axes.axhline(row["tokens_per_pass"], color=shade, linestyle=":", linewidth=1)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.set_xticks(batches, [str(batch) for batch in batches])
            axes.yaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
            axes.set_xlabel("batch")
            axes.set_title(f"context {context:,}", fontsize=10, loc="left", color=INK)
        panels[0].set_ylabel("break-even (tokens per pass)")
        figure.suptitle(title, fontsize=10, x=0.01, ha="left", color=MUTED)
        _legend(figure, panels[0])

    return svg(draw, (10.2, 4.2))


def generations(rows: Sequence[Row]) -> str:
    """Draw seconds of whole generations, prefill below the rest; one panel per prompt and length.

    Panels have scales of their own, because times span orders of magnitude.
    """

    def draw(figure: Any) -> None:
        prompts = sorted({row["prompt"] for row in rows})
        lengths = sorted({row["length"] for row in rows})
        panels = figure.subplots(len(prompts), len(lengths), squeeze=False)
        for line, prompt in zip(panels, prompts, strict=True):
            for axes, length in zip(line, lengths, strict=True):
                here = [r for r in rows if (r["prompt"], r["length"]) == (prompt, length)]
                places = range(len(here))
                shades = [_SHADES[row["regime"]] for row in here]
                prefill = [row["prefill_s"] for row in here]
                rest = [row["seconds"] - row["prefill_s"] for row in here]
                axes.barh(places, prefill, height=0.66, color=INK)
                axes.barh(places, rest, left=prefill, height=0.66, color=shades)
                names = [f"{row['model']}, {NAMES[row['regime']]}" for row in here]
                axes.set_yticks(places, names if axes is line[0] else [""] * len(names))
                axes.tick_params(axis="y", labelsize=8)
                axes.invert_yaxis()
                axes.grid(axis="y", visible=False)
                axes.margins(x=0.2)
                for place, row in zip(places, here, strict=True):
                    axes.annotate(
                        f"{row['seconds']:,.0f}"
                        if row["seconds"] >= 100
                        else f"{row['seconds']:.3g}",
                        (row["seconds"], place),
                        xytext=(3, 0),
                        textcoords="offset points",
                        va="center",
                        fontsize=8,
                    )
                title = f"prompt {prompt:,}, response {length:,}"
                axes.set_title(title, fontsize=9, loc="left", color=INK)
        for axes in panels[-1]:
            axes.set_xlabel("seconds (dark: prefill)")

    height = 0.7 + len({row["prompt"] for row in rows}) * (0.6 + 0.19 * _count(rows))
    return svg(draw, (10.2, height))


def measured(fed: Sequence[int], times: Sequence[float], floor: float, slope: float) -> str:
    """Draw measured step times against tokens fed, and the fitted floor and slope."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot(fed, times, "o", color=COLOURS[0], label="measured (best)")
        axes.plot(
            fed,
            [floor + slope * tokens for tokens in fed],
            color=COLOURS[1],
            linewidth=1.4,
            label=f"{floor:.2f} ms + {slope:.4f} ms x tokens",
        )
        axes.axhline(floor, color=MUTED, linestyle=(0, (2, 3)), linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(fed, [str(tokens) for tokens in fed])
        _readable(axes, times)
        axes.set_xlabel("tokens fed")
        axes.set_ylabel("step (ms)")
        axes.legend(loc="upper left", fontsize=9)

    return svg(draw, (6.4, 3.6))


def _line(
    axes: Any,
    places: Sequence[float],
    values: Sequence[float],
    rows: Sequence[Row],
    style: Any,
) -> None:
    regime = rows[0]["regime"]
    shade = _SHADES[regime]
    label = f"{rows[0]['model']}, {NAMES[regime]}"
    axes.plot(places, values, color=shade, linestyle=style, linewidth=1.2)
    for filled in (True, False):
        chosen = [index for index, row in enumerate(rows) if row["fits"] is filled]
        axes.plot(
            [places[index] for index in chosen],
            [values[index] for index in chosen],
            color=shade,
            linestyle="",
            marker=_MARKS[regime],
            markersize=5,
            markerfacecolor=shade if filled else "white",
        )
    # An empty line of its own, so that the legend shows style and mark together.
    both = {"linestyle": style, "marker": _MARKS[regime]}
    axes.plot([], [], color=shade, markersize=5, linewidth=1.2, label=label, **both)


def _style(models: Sequence[str], model: str) -> Any:
    """Line of a diffusion model by its place in `models`; the autoregressive one is solid."""
    return _LINES[models.index(model) % len(_LINES)] if model in models else _LINES[0]


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8.5)


def _readable(axes: Any, values: Sequence[float]) -> None:
    """Label a logarithmic axis at enough places even where it spans less than a decade or two."""
    from matplotlib.ticker import LogLocator

    narrow = max(values) < 100 * min(values)
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
    axes.yaxis.set_major_formatter("{x:,g}")


def _tokens(number: int) -> str:
    return f"{number // 1024}K" if number >= 1024 and number % 1024 == 0 else str(number)


def _count(rows: Sequence[Row]) -> int:
    return len(series_of(rows))
