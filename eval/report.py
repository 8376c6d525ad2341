# SPDX-License-Identifier: Apache-2.0
"""The HTML report: one self-contained file made from `results.json` alone.

Models stand side by side in every section; the best figure of a column is bold.
"""

from collections.abc import Callable, Sequence
from typing import Any

from eval import plots
from eval.cells import best_of, drawn, figure, named, percent, span
from eval.page import Content, Markup, document, element, join, section, table
from eval.report_questions import questions
from sqzjax import config as configs

Result = dict[str, Any]


def render(results: dict[str, Any]) -> str:
    """Return the page for a results document."""
    parts: list[Content] = [_header(results), _models(results)]
    parts += [_failures(results)] if _failed(results) else []
    names = [model["name"] for model in results["models"]]
    for kind, make in _SECTIONS:
        tasks: dict[str, list[Result]] = {}
        for result in results["results"]:
            if result["kind"] == kind and result["status"] == "ok":
                tasks.setdefault(result["task"], []).append(result)
        parts += [make(task, found, names) for task, found in tasks.items()]
    parts.append(_appendix(results))
    return document(results["title"], *parts)


def _header(results: dict[str, Any]) -> Markup:
    device, versions = results["device"], results["versions"]
    count = f"{device['count']} x " if device["count"] > 1 else ""
    where = (
        f"{results['created'].replace('T', ' ')} on {count}{device['kind']} ({device['machine']})"
    )
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return element(
        "header",
        element("h1", results["title"]),
        element("p", where, class_="meta"),
        element("p", packages, class_="meta"),
    )


def _models(results: dict[str, Any]) -> Markup:
    rows: list[list[Content]] = []
    for index, model in enumerate(results["models"]):
        name = named(model["name"], index)
        if "error" in model:
            rows.append([name, model["source"], "not loaded", "", "", "", ""])
            continue
        rows.append(
            [
                name,
                model["source"],
                _quantity(model["parameters"]),
                model["family"],
                model["dtype"],
                _cache(model["cache"]),
                f"{model['max_length']:,}",
            ]
        )
    headings = ["model", "weights", "parameters", "family", "compute", "cache", "max tokens"]
    return section("Models", table(headings, rows, text_columns=2))


def _failed(results: dict[str, Any]) -> list[tuple[str, str]]:
    failed = [(f"Loading {m['name']}", m["error"]) for m in results["models"] if "error" in m]
    for result in results["results"]:
        if result["status"] == "failed":
            where = f"{result['task']} on {result['model'] or 'its own models'}"
            failed.append((where, result["error"]))
    return failed


def _failures(results: dict[str, Any]) -> Markup:
    blocks = (
        element("div", element("strong", where), ": ", error, class_="failed")
        for where, error in _failed(results)
    )
    return section("What failed", *blocks)


# One function per kind of task ------------------------------------------------------------------


def _training(task: str, found: list[Result], names: list[str]) -> Markup:
    runs, rows, reference = [], [], {}
    for result in found:
        metrics = result["metrics"]
        runs.append((result["model"], metrics["series"]))
        reference |= {name: values["nll"] for name, values in metrics["baselines"].items()}
        held_out = min(metrics["best"].values(), default=None)
        rows.append(
            [
                named(result["model"], names.index(result["model"])),
                f"{metrics['steps']:,}",
                figure(metrics["final"]["train/loss"], 4),
                figure(held_out, 4),
                figure(metrics["tokens_per_second"], 0),
            ]
        )
    headings = ["model", "steps", "last training loss", "best held-out loss", "tokens/s (median)"]
    note = "Cross-entropy in nats per token. Dashed lines are count-based baselines."
    plot = plots.loss_curves(runs, reference)
    return section("Training", drawn(plot), table(headings, rows), note=note)


def _perplexity(task: str, found: list[Result], names: list[str]) -> Markup:
    keys = (("perplexity", 3), ("nll", 4), ("bits_per_byte", 4), ("word_perplexity", 2))
    best = {key: best_of([r["metrics"][key] for r in found], min) for key, _ in keys}
    rows: list[list[Content]] = []
    for result in found:
        metrics = result["metrics"]
        sign = "≤ " if metrics.get("estimate") else ""
        cells = [
            join(sign, figure(metrics[key], digits, metrics[key] == best[key]))
            for key, digits in keys
        ]
        name = named(result["model"], names.index(result["model"]))
        rows.append([name, *cells, f"{metrics['tokens']:,}", f"{metrics['documents']:,}"])
    levels = {
        (name, values["nll"]): values["perplexity"]
        for result in found
        for name, values in result["metrics"]["baselines"].items()
    }
    marked = range(len(rows), len(rows) + len(levels))
    for (name, nll), perplexity in levels.items():
        rows.append([name, figure(perplexity, 3), figure(nll, 4), "", "", "", ""])
    metrics = found[0]["metrics"]
    headings = ["model", "perplexity", "nats/token", "bits/byte", "per word", "tokens", "documents"]
    windows = sorted({(r["metrics"]["context"], r["metrics"]["stride"]) for r in found})
    shapes = ", ".join(f"{context}/{stride}" for context, stride in windows)
    note = (
        f"Data {found[0]['settings']['data']}; windows of context/stride {shapes} tokens, every "
        f"token scored once; BOS before each document: {metrics['bos']}. Models with different "
        "tokenizers compare by bits/byte or per word, not by perplexity."
    )
    samples = {e["samples"] for r in found if (e := r["metrics"].get("estimate"))}
    if samples:
        shown = ", ".join(map(str, sorted(samples)))
        note += f" ≤: upper bound of a masked diffusion model, {shown} masks a window at most."
    return section(f"Perplexity: {task}", table(headings, rows, marked=marked), note=note)


def _needle(task: str, found: list[Result], names: list[str]) -> Markup:
    measures = {"likelihood": "true number ranked first", "generation": "number written out"}
    rows: list[list[Content]] = []
    blocks = []
    for result in found:
        metrics, name = result["metrics"], result["model"]
        row: list[Content] = [named(name, names.index(name))]
        maps = []
        for key, title in measures.items():
            if key not in metrics:
                row.append("-")
                continue
            share, low_high = metrics[key]["accuracy"], metrics[key]["interval_95"]
            row.append(join(percent(share), element("span", span(low_high), class_="range")))
            depths = [f"{100 * depth:.0f} %" for depth in metrics["depths"]]
            lengths = [f"{length:,}" for length in metrics["lengths"]]
            maps.append(drawn(plots.heat_map(metrics[key]["cells"], depths, lengths, title)))
        rows.append([*row, figure(metrics.get("mean_rank"), 2)])
        heading = element("h3", named(name, names.index(name)))
        blocks.append(element("div", heading, element("div", *maps, class_="row-of")))
    settings, chance = found[0]["settings"], found[0]["metrics"].get("chance")
    note = (
        f"A {settings['digits']}-digit number hidden in filler text, "
        f"{settings['samples']} texts per cell; cells are percentages."
    )
    if chance:
        note += f" Ranking is among {settings['alternatives'] + 1} numbers: chance {chance:.0%}."
    headings = ["model", *measures.values(), "mean rank"]
    return section(f"Needle: {task}", table(headings, rows), *blocks, note=note)


def _samples(task: str, found: list[Result], names: list[str]) -> Markup:
    blocks = []
    for index, first in enumerate(found[0]["metrics"]["samples"]):
        cards = []
        for result in found:
            output = result["metrics"]["samples"][index]["output"]
            title = element("h3", named(result["model"], names.index(result["model"])))
            prompt = element("span", first["prompt"], class_="prompt")
            cards.append(element("div", title, element("p", prompt, output), class_="card"))
        blocks.append(element("div", *cards, class_="cards", style="margin-top:14px"))
    sampling = found[0]["settings"]["sampling"]
    shown = {key: value for key, value in sampling.items() if value not in (None, [], False)}
    keys = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    note = ", ".join(f"{key} {shown[key]}" for key in keys if key in shown)
    return section("Samples", *blocks, note=f"The prompt is grey. Sampling: {note}.")


def _lm_eval(task: str, found: list[Result], names: list[str]) -> Markup:
    rows: list[list[Content]] = []
    scores = [r["metrics"]["metrics"] for r in found]
    for name, values in scores[0].items():
        for metric in values:
            row: list[Content] = [name, metric]
            for score in scores:
                measured = score.get(name, {}).get(metric, {"value": None, "stderr": None})
                error = measured["stderr"]
                spread = "" if error is None else f"± {error:.4f}"
                cell = figure(measured["value"], 4)
                row.append(join(cell, element("span", spread, class_="range")))
            rows.append(row)
    headings = ["task", "metric", *(r["model"] for r in found)]
    note = "Tasks of lm-evaluation-harness, with its standard errors."
    return section(f"lm-eval: {task}", table(headings, rows, text_columns=2), note=note)


def _speed(task: str, found: list[Result], names: list[str]) -> Markup:
    record = found[0]["metrics"]
    hardware = record["hardware"]
    note = (
        f"{hardware['name']}: {hardware['bandwidth'] / 1e9:.1f} GB/s and "
        f"{hardware['peak_flops'] / 1e12:.3g} TFLOP/s ({hardware['source']}). TTFT: time to the "
        "first token, TPOT: time per further token; both in milliseconds."
    )
    blocks: list[Content] = []
    if record["decode"]:
        labels = [f"{row['model']}, batch {row['batch']}" for row in record["decode"]]
        speeds = [row["tokens_per_second"] for row in record["decode"]]
        blocks += [element("h3", "Greedy decoding"), drawn(plots.bars(labels, speeds, "tokens/s"))]
        blocks.append(_columns(record["decode"], _DECODE))
    for title, key, columns in (
        ("Training step", "training", _TRAIN),
        ("Against Hugging Face transformers, same run", "transformers", _PEER),
    ):
        if record.get(key):
            blocks += [element("h3", title), _columns(record[key], columns)]
    return section("Speed", *blocks, note=note)


def _columns(records: Sequence[dict[str, Any]], columns: Sequence[tuple[str, str, int]]) -> Markup:
    rows = [
        [
            value if isinstance(value := record.get(key), str) else figure(value, digits)
            for _, key, digits in columns
        ]
        for record in records
    ]
    return table([heading for heading, _, _ in columns], rows)


# Heading, field, digits after the point.
_DECODE = (
    ("model", "model", 0),
    ("batch", "batch", 0),
    ("tokens/s", "tokens_per_second", 1),
    ("TTFT", "ttft_ms", 2),
    ("TPOT", "tpot_ms", 3),
    ("TPOT p90", "tpot_p90_ms", 3),
    ("cache bytes", "cache_bytes", 0),
    ("bytes per step", "step_bytes", 0),
    ("% of roofline", "roofline_percent", 1),
)
_TRAIN = (
    ("model", "model", 0),
    ("batch", "batch", 0),
    ("sequence", "seq_len", 0),
    ("tokens/s", "tokens_per_second", 1),
    ("step ms", "step_ms", 1),
    ("p90", "step_p90_ms", 1),
    ("MFU %", "mfu_percent", 1),
)
_PEER = (
    ("model", "model", 0),
    ("batch", "batch", 0),
    ("its cache", "cache", 0),
    ("tokens/s", "tokens_per_second", 1),
    ("transformers tokens/s", "transformers_tokens_per_second", 1),
    ("speed-up", "speedup", 2),
    ("same tokens", "same_tokens", 3),
)
_SECTIONS: tuple[tuple[str, Callable[[str, list[Result], list[str]], Markup]], ...] = (
    ("training_curve", _training),
    ("perplexity", _perplexity),
    ("samples", _samples),
    ("generation", questions),
    ("problems", questions),
    ("needle", _needle),
    ("lm_eval", _lm_eval),
    ("speed", _speed),
)


def _appendix(results: dict[str, Any]) -> Markup:
    skipped = [
        f"{r['task']} on {r['model']}: {r['error']}"
        for r in results["results"]
        if r["status"] == "skipped"
    ]
    notes = [element("p", f"Left out: {line}.", class_="note") for line in skipped]
    seconds = sum(result["seconds"] for result in results["results"])
    settings = element("details", element("summary", "Every setting"), _yaml(results["config"]))
    return section("Settings", *notes, settings, note=f"All tasks took {seconds:,.0f} s.")


def _yaml(config: dict[str, Any]) -> Markup:
    return element("pre", configs.dump(config))


# Cells ------------------------------------------------------------------------------------------


def _quantity(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _cache(settings: dict[str, Any] | None) -> str:
    if settings is None:
        return "none"
    rest = ", ".join(f"{k} {v}" for k, v in settings.items() if k != "kind" and v is not None)
    return f"{settings['kind']} ({rest})" if rest else settings["kind"]
