# SPDX-License-Identifier: Apache-2.0
"""The page of a comparison of autoregressive and diffusion decoding, from its record alone."""

from collections.abc import Sequence
from typing import Any

from eval import arm_vs_dlm_plots as plots
from eval.arm_vs_dlm import expand
from eval.page import Content, Markup, document, element, section, table
from sqzjax import config as configs

Row = dict[str, Any]


def render(record: dict[str, Any]) -> str:
    """Return the page of a record that `run_arm_vs_dlm` returned or that was read from JSON."""
    config = record["config"]
    parts: list[Content] = [_header(record), _findings(record), _devices(record), _roofs(record)]
    parts += [_steps(record, device) for device in record["hardware"]]
    parts += [_contests(record), _generations(record), _plans(record), _left_out(record)]
    parts += [_measured(record["measured"])] if record["measured"] else []
    settings = element("details", element("summary", "Every setting"), _yaml(config))
    return document(config["title"], *parts, section("Settings", settings))


def findings(record: dict[str, Any]) -> list[str]:
    """Return what the tables say at the first device, context and batch, in plain sentences."""
    config, device = record["config"], record["hardware"][0]
    steps = [row for row in expand(record, "steps") if row["device"] == device["name"]]
    contests = expand(record, "contests")
    context, last = config["contexts"][0], config["contexts"][-1]
    block, batch = _usual_block(config), config["batches"][0]
    model = config["diffusion"][0]["name"]
    lines = []

    def step(regime: str, context: int = context, batch: int = batch) -> Row:
        names = (config["autoregressive"]["name"], model)
        keys = {"regime": regime, "context": context, "batch": batch}
        found = [r for r in steps if r["model"] in names and r.items() >= keys.items()]
        return next((r for r in found if r["block"] == block), found[0])

    decode, cached, full = (step(n) for n in ("arm_decode", "block_cached", "full_dlm"))
    lines.append(
        f"At batch {batch} and a context of {context:,}, decoding {decode['model']} does "
        f"{decode['intensity']:.1f} operations per byte, a cached block of {block} of {model} "
        f"{cached['intensity']:.1f}, a step over its whole sequence {full['intensity']:.0f}; the "
        f"ridge of {device['name']} is {device['ridge']:.0f}."
    )
    growth = {
        name: step(name, last)["ms_per_token"] / step(name)["ms_per_token"]
        for name in ("arm_decode", "block_cached", "full_dlm")
    }
    lines.append(
        f"From a context of {context:,} to {last:,} a token takes {growth['arm_decode']:.1f} times "
        f"as long decoding, {growth['block_cached']:.1f} times with cached blocks and "
        f"{growth['full_dlm']:.0f} times over the whole sequence ({device['name']})."
    )
    lines += _crossings(record, contests, context, block)
    lines.append(_whole(record))
    plan = next(
        row
        for row in expand(record, "plans")
        if (row["model"], row["context"], row["device"]) == (model, context, device["name"])
    )
    if plan["nearest"]:
        pair = plan["nearest"]
        lines.append(
            f"Nearest the ridge of {device['name']} at a context of {context:,} is a block of "
            f"{pair['block']} at batch {pair['batch']} ({pair['intensity']:.0f} operations per "
            "byte)."
        )
    share = next(
        row
        for row in expand(record, "left_out")
        if (row["model"], row["block"], row["device"]) == (model, block, device["name"])
    )
    lines.append(
        f"Head and softmax take {share['head_percent'] + share['sampling_percent']:.1f} % of a "
        f"cached step of {block} at batch 1 ({share['sampling_percent']:.1f} % the softmax)."
    )
    if kept := record["measured"]:
        knee = kept["floor_ms"] / kept["slope_ms"]
        lines.append(
            f"Measured, a {kept['num_layers']}-layer model of width {kept['hidden_size']} on "
            f"{kept['cores']} cores ({kept['device']}) takes {kept['floor_ms']:.2f} ms + "
            f"{kept['slope_ms']:.4f} ms per token fed: {knee:.0f} tokens take twice the floor."
        )
    return lines


def _crossings(
    record: dict[str, Any], contests: Sequence[Row], context: int, block: int
) -> list[str]:
    config, device = record["config"], record["hardware"][0]["name"]
    lines = []
    for entry in config["diffusion"]:
        keys = {"model": entry["name"], "regime": "block_cached", "block": block}
        rows = [row for row in contests if row.items() >= keys.items()]
        here = {row["context"]: row for row in rows if row["device"] == device}
        crossing = {c: _batch(row["crossing_batch"], config) for c, row in here.items()}
        others = ", ".join(f"{crossing[c]} at {c:,}" for c in crossing if c != context)
        least = here[context]["break_even_per_step"]
        need = "cannot break even" if least is None else f"breaks even at {least:.2f} tokens a step"
        lines.append(
            f"{entry['name']} in cached blocks of {block} {need} at batch "
            f"{config['batches'][0]}; with {config['tokens_per_step']:g} tokens a step "
            f"{config['autoregressive']['name']} is faster from a batch of {crossing[context]} at "
            f"a context of {context:,}" + (f" ({others})" if others else "") + f" on {device}."
        )
    return lines


def _whole(record: dict[str, Any]) -> str:
    """Say what a generation of middling size takes."""
    config, device = record["config"], record["hardware"][0]["name"]
    prompt, length = (sorted(config[n])[len(config[n]) // 2] for n in ("prompts", "lengths"))
    models = (config["autoregressive"]["name"], config["diffusion"][0]["name"])
    keys = {"prompt": prompt, "length": length, "device": device}
    seconds = {
        row["regime"]: row["seconds"]
        for row in expand(record, "generations")
        if row.items() >= keys.items() and row["model"] in models
    }
    return (
        f"A prompt of {prompt:,} and a response of {length:,} take {models[0]} "
        f"{seconds['arm_decode']:.2f} s, {models[1]} {seconds['block_cached']:.2f} s in cached "
        f"blocks, {seconds['block_uncached']:.1f} s in blocks without a cache and "
        f"{seconds['full_dlm']:.1f} s over the whole sequence (batch 1, {device})."
    )


def _usual_block(config: dict[str, Any]) -> int:
    """Block of the figures: that of whole generations where it is computed, else the middle one."""
    blocks = sorted(config["blocks"])
    usual = config["generation_block"]
    return usual if usual in blocks else blocks[len(blocks) // 2]


def _batch(value: int | None, config: dict[str, Any]) -> str:
    return f"over {config['largest_batch']}" if value is None else str(value)


def _header(record: dict[str, Any]) -> Markup:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return element(
        "header",
        element("h1", record["config"]["title"]),
        element("p", record["created"].replace("T", " "), class_="meta"),
        element("p", versions, class_="meta"),
    )


def _findings(record: dict[str, Any]) -> Markup:
    points = (element("li", line) for line in findings(record))
    note = "Predicted from shapes and data sheets, lower bounds without launches and cache misses."
    return section("Findings", element("ul", *points), note=note)


def _devices(record: dict[str, Any]) -> Markup:
    rows: list[list[Content]] = [
        [
            device["name"],
            device["source"] or "given",
            f"{device['peak_flops'] / 1e12:,.0f}",
            f"{device['bandwidth'] / 1e9:,.0f}",
            f"{device['ridge']:.0f}",
            f"{device['memory_bytes'] / 1e9:.0f}" if device["memory_bytes"] else "-",
        ]
        for device in record["hardware"]
    ]
    headings = ["device", "source", "TFLOP/s", "GB/s", "ridge (operations/B)", "memory (GB)"]
    return section("Devices", table(headings, rows, text_columns=2))


def _roofs(record: dict[str, Any]) -> Markup:
    config = record["config"]
    context, block = config["contexts"][0], _usual_block(config)
    rows = _chosen(record, context=context, block=block)
    note = (
        f"Context {context:,}, block {block}; points of a line are batches "
        f"{', '.join(map(str, config['batches']))}. Hollow: does not fit in memory. Below the roof "
        "where operators wait for different things."
    )
    figure = plots.rooflines(rows, record["hardware"], _models(config))
    return section("Roofline", _drawn(figure), note=note)


def _steps(record: dict[str, Any], device: dict[str, Any]) -> Markup:
    config, models = record["config"], _models(record["config"])
    context, batch, block = config["contexts"][0], config["batches"][0], _usual_block(config)
    views = (
        ("batch", f"context {context:,}, block {block}", {"context": context, "block": block}),
        ("context", f"batch {batch}, block {block}", {"batch": batch, "block": block}),
        ("block", f"batch {batch}, context {context:,}", {"batch": batch, "context": context}),
    )
    blocks: list[Content] = []
    for axis, fixed, keys in views:
        rows = [row for row in _chosen(record, **keys) if row["device"] == device["name"]]
        if axis == "block":
            rows = [row for row in rows if row["regime"].startswith("block")]
        label = {"batch": "batch", "context": "context", "block": "block size"}[axis]
        blocks.append(element("h3", f"Against {label} ({fixed})"))
        blocks.append(_drawn(plots.against(rows, axis, label, device["ridge"], models)))
    rows = [row for row in expand(record, "steps") if row["device"] == device["name"]]
    shown = _columns(rows, _STEP, text_columns=2)
    blocks.append(element("details", element("summary", "Every step"), shown))
    note = (
        f"A denoising step finishes {config['tokens_per_step']:g} tokens; a cached block needs one "
        f"more pass that stores it. A step over the whole sequence generates {config['response']} "
        "tokens together. Per token: of the prompt in prefill."
    )
    return section(f"Steps on {device['name']}", *blocks, note=note)


def _contests(record: dict[str, Any]) -> Markup:
    config, rows = record["config"], expand(record, "contests")
    figures = []
    for device in record["hardware"]:
        cached = [
            row
            for row in rows
            if (row["device"], row["regime"]) == (device["name"], "block_cached")
        ]
        title = f"{device['name']}, blocks with cache; dotted: tokens that a pass yields"
        drawn = plots.break_even(cached, config["batches"], _models(config), title)
        figures.append(_drawn(drawn))
    headings = ["model", "regime", "device", "context", "block", "tokens/pass"]
    headings += [f"break-even, batch {batch}" for batch in config["batches"]]
    headings += ["tokens/step to win", "batch from which it loses"]
    cells: list[list[Content]] = [
        [
            row["model"],
            plots.NAMES[row["regime"]],
            row["device"],
            f"{row['context']:,}",
            str(row["block"]),
            f"{row['tokens_per_pass']:.2f}",
            *(f"{ratio:.2f}" for ratio in row["break_even"]),
            "-" if (least := row["break_even_per_step"]) is None else f"{least:.2f}",
            _batch(row["crossing_batch"], config),
        ]
        for row in rows
    ]
    shown = table(headings, cells, text_columns=3)
    note = (
        f"Against {config['autoregressive']['name']} at the same context. Break-even: time of a "
        "diffusion pass over that of a decoding pass, the tokens that a pass must yield to be as "
        f"fast. Tokens per step are those needed at batch {config['batches'][0]}, the pass that "
        "stores a block included; a dash: not even a whole block a step is enough. Memory does not "
        "bound the batch here."
    )
    details = element("details", element("summary", "Every break-even"), shown)
    return section("Break-even and crossing batch", *figures, details, note=note)


def _generations(record: dict[str, Any]) -> Markup:
    config, rows = record["config"], expand(record, "generations")
    device = record["hardware"][0]["name"]
    here = [row for row in rows if row["device"] == device]
    shown = _columns(rows, _GENERATION, text_columns=3)
    note = (
        f"One sequence, blocks of {config['generation_block']}, {config['tokens_per_step']:g} "
        f"tokens a step; drawn for {device}."
    )
    return section(
        "Whole generations",
        _drawn(plots.generations(here)),
        element("details", element("summary", "Every generation"), shown),
        note=note,
    )


def _plans(record: dict[str, Any]) -> Markup:
    blocks = sorted(record["config"]["blocks"])
    rows: list[list[Content]] = []
    for row in expand(record, "plans"):
        reached = ["-" if pair is None else str(pair["batch"]) for pair in row["reaching"]]
        pair, start = row["nearest"], [row["model"], row["device"], f"{row['context']:,}"]
        shown = ["nothing fits", "-", "-"]
        if pair:
            place = f"block {pair['block']} x batch {pair['batch']}"
            shown = [place, f"{pair['intensity']:.0f}", f"{pair['ms']:.1f}"]
        rows.append([*start, *shown, *reached])
    headings = ["model", "device", "context", "nearest the ridge", "operations/B", "ms"]
    headings += [f"batch to reach it, block {block}" for block in blocks]
    note = (
        "Cached block steps at batches that are powers of two and fit in memory. A dash: every "
        "batch stays below the ridge, as long contexts do whose keys outweigh the weights."
    )
    return section("Batch planner", table(headings, rows, text_columns=2), note=note)


def _left_out(record: dict[str, Any]) -> Markup:
    rows = expand(record, "left_out")
    note = f"Shares of a cached step at batch 1 and context {record['config']['contexts'][0]:,}."
    return section("Head and sampling", _columns(rows, _SHARES, text_columns=2), note=note)


def _measured(kept: dict[str, Any]) -> Markup:
    drawn = plots.measured(kept["fed"], kept["ms"], kept["floor_ms"], kept["slope_ms"])
    note = (
        f"{kept['num_layers']} layers of width {kept['hidden_size']}, float32, a cache of "
        f"{kept['context']} keys, {kept['cores']} cores of {kept['device']}; best of "
        f"{kept['rounds']}. The fit is off by {kept['largest_error_percent']:.0f} % at most."
    )
    rows: list[list[Content]] = [
        [str(tokens), f"{ms:.3f}"] for tokens, ms in zip(kept["fed"], kept["ms"], strict=True)
    ]
    return section("Measured here", _drawn(drawn), table(["tokens fed", "ms"], rows), note=note)


# Pieces -----------------------------------------------------------------------------------------

# Heading, field, format.
_STEP = (
    ("model", "model", "{}"),
    ("regime", "regime", "{}"),
    ("context", "context", "{:,}"),
    ("block", "block", "{}"),
    ("batch", "batch", "{}"),
    ("tokens fed", "fed", "{:,}"),
    ("GFLOP", "gflop", "{:,.4g}"),
    ("GB", "gbyte", "{:,.4g}"),
    ("operations/B", "intensity", "{:,.4g}"),
    ("ms", "ms", "{:,.4g}"),
    ("ms/token", "ms_per_token", "{:,.4g}"),
    ("tokens/s", "tokens_per_second", "{:,.4g}"),
    ("bound", "bound", "{}"),
    ("fits", "fits", "{}"),
)
_GENERATION = (
    ("model", "model", "{}"),
    ("regime", "regime", "{}"),
    ("device", "device", "{}"),
    ("prompt", "prompt", "{:,}"),
    ("response", "length", "{:,}"),
    ("passes", "passes", "{:,}"),
    ("operations/B", "intensity", "{:,.4g}"),
    ("prefill s", "prefill_s", "{:.4g}"),
    ("seconds", "seconds", "{:.4g}"),
)
_SHARES = (
    ("model", "model", "{}"),
    ("device", "device", "{}"),
    ("block", "block", "{}"),
    ("step ms", "step_ms", "{:.2f}"),
    ("head %", "head_percent", "{:.1f}"),
    ("softmax %", "sampling_percent", "{:.2f}"),
)


def _columns(
    rows: Sequence[Row], columns: Sequence[tuple[str, str, str]], *, text_columns: int
) -> Markup:
    cells: list[list[Content]] = [
        [form.format(_word(row[field])) for _, field, form in columns] for row in rows
    ]
    return table([heading for heading, _, _ in columns], cells, text_columns=text_columns)


def _word(value: Any) -> Any:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return plots.NAMES.get(value, value) if isinstance(value, str) else value


def _chosen(record: dict[str, Any], **keys: int) -> list[Row]:
    """Rows of the steps with these settings; a block size selects among regimes of blocks only."""
    block = keys.pop("block", None)
    return [
        row
        for row in expand(record, "steps")
        if row.items() >= keys.items()
        and (block in (None, row["block"]) or not row["regime"].startswith("block"))
    ]


def _models(config: dict[str, Any]) -> list[str]:
    """Diffusion models in the order of their line styles."""
    return [entry["name"] for entry in config["diffusion"]]


def _drawn(drawing: str) -> Markup:
    return element("figure", Markup(drawing))


def _yaml(config: dict[str, Any]) -> Markup:
    return element("pre", configs.dump(config))
