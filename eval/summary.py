# SPDX-License-Identifier: Apache-2.0
"""The results as a table on the terminal: of tasks and models the fewer are its columns."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def show(document: dict[str, Any], workdir: Path) -> None:
    """Print headline figures, failures, and where the report lies."""
    console = Console(markup=False)
    table = Table(title=document["title"], title_justify="left")
    results = [result for result in document["results"] if result["model"]]
    cells = {(r["task"], r["model"]): headline(r) for r in results}
    tasks = list(dict.fromkeys(task for task, _ in cells))
    names = [model["name"] for model in document["models"]]
    by_model = len(names) > len(tasks)
    table.add_column("model" if by_model else "task")
    for name in tasks if by_model else names:
        table.add_column(name, justify="right")
    for line in names if by_model else tasks:
        keys = [(task, line) for task in tasks] if by_model else [(line, name) for name in names]
        table.add_row(line, *(cells.get(key, "not loaded") for key in keys))
    console.print(table)
    for result in document["results"]:
        if result["status"] == "failed":
            where = f"{result['task']} on {result['model'] or 'its models'}"
            console.print(f"failed: {where}: {result['error']}")
    for model in document["models"]:
        if "error" in model:
            console.print(f"failed to load {model['name']}: {model['error']}")
    console.print(f"Report: {workdir / 'report.html'}", soft_wrap=True)


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
