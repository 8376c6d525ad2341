# SPDX-License-Identifier: Apache-2.0
"""The results as a table on the terminal: one line per task, one column per model."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def show(document: dict[str, Any], workdir: Path) -> None:
    """Print headline figures, failures, and where the report lies."""
    console = Console()
    table = Table(title=document["title"], title_justify="left")
    table.add_column("task")
    names = [model["name"] for model in document["models"]]
    for name in names:
        table.add_column(name, justify="right")
    results = [result for result in document["results"] if result["model"]]
    for task in dict.fromkeys(result["task"] for result in results):
        cells = {r["model"]: headline(r) for r in results if r["task"] == task}
        table.add_row(task, *(cells.get(name, "not loaded") for name in names))
    console.print(table)
    for result in document["results"]:
        if result["status"] == "failed":
            where = f"{result['task']} on {result['model'] or 'its models'}"
            console.print(f"failed: {where}: {result['error']}", markup=False)
    for model in document["models"]:
        if "error" in model:
            console.print(f"failed to load {model['name']}: {model['error']}", markup=False)
    console.print(f"Report: {workdir / 'report.html'}", markup=False, soft_wrap=True)


def headline(result: dict[str, Any]) -> str:
    """Return the one figure that stands for a result."""
    if result["status"] != "ok":
        return result["status"]
    metrics = result["metrics"]
    match result["kind"]:
        case "perplexity":
            sign = "≤ " if metrics.get("estimate") else ""
            return f"perplexity {sign}{metrics['perplexity']:.4g}"
        case "generation" | "problems":
            low, high = metrics["interval_95"]
            return f"{metrics['accuracy']:.1%} ({low:.1%} to {high:.1%})"
        case "needle":
            parts = [
                f"{name} {metrics[name]['accuracy']:.0%}"
                for name in ("likelihood", "generation")
                if name in metrics
            ]
            return ", ".join(parts)
        case "training_curve":
            return f"loss {metrics['final']['train/loss']:.4g}"
        case "samples":
            return f"{len(metrics['samples'])} texts"
        case "lm_eval":
            return ", ".join(metrics["metrics"])
        case kind:
            return str(kind)
