# SPDX-License-Identifier: Apache-2.0
"""The report's section of a task with right and wrong answers: accuracy, what it cost, examples."""

from typing import Any

from eval import plots
from eval.cells import best_of, drawn, figure, named, percent, span
from eval.page import Content, Markup, element, section, table

Result = dict[str, Any]

# Heading, field of the usage, digits after the point.
_COSTS = (
    ("mean length", "mean_tokens", 1),
    ("tokens/forward", "tokens_per_forward", 2),
    ("tokens/s", "tokens_per_second", 1),
    ("forwards", "forwards", 0),
    ("seconds", "seconds", 1),
    ("cache bytes a row", "cache_bytes_per_row", 0),
    ("share of pages read", "density", 3),
)


def questions(task: str, found: list[Result], names: list[str]) -> Markup:
    """Return the section of a task for all models; with two or more, accuracy against speed."""
    best = best_of([r["metrics"]["accuracy"] for r in found], max)
    known = [r["metrics"].get("usage") or {} for r in found]
    costs = [cost for cost in _COSTS if any(cost[1] in usage for usage in known)]
    rows: list[list[Content]] = []
    for result in found:
        metrics, usage = result["metrics"], result["metrics"].get("usage") or {}
        rows.append(
            [
                named(result["model"], names.index(result["model"])),
                percent(metrics["accuracy"], metrics["accuracy"] == best),
                span(metrics["interval_95"]),
                f"{metrics['correct']} of {metrics['questions']}",
                f"{metrics['without_answer']}",
                *(figure(usage.get(key), digits) for _, key, digits in costs),
            ]
        )
    headings = ["model", "accuracy", "95 % interval", "correct", "no answer found"]
    headings += [heading for heading, _, _ in costs]
    answers = [_answers(result) for result in found]
    note = f"{_source(found[0]['settings'])} 95 % Wilson interval."
    if costs:
        note += " Tokens and passes per sequence; tokens/s of the whole batch, prefill included."
    blocks = [table(headings, rows), *_trade_off(found, names), *answers]
    return section(f"Task: {task}", *blocks, note=note)


def _source(settings: dict[str, Any]) -> str:
    if "problems" in settings:
        kind = ", ".join(f"{key} {value}" for key, value in settings["problems"].items())
        return f"Made-up problems that training holds out ({kind})."
    shots = settings["few_shot"]["count"] if settings["few_shot"] else 0
    return (
        f"Data {settings['data']}, solved examples before each question: {shots}, answers compared "
        f"by {settings['extract']['kind']} extraction."
    )


def _trade_off(found: list[Result], names: list[str]) -> list[Markup]:
    """Return the plot of accuracy against speed, nothing below two models with known costs."""
    points = [
        plots.TradeOff(
            name=result["model"],
            shade=plots.colour(names.index(result["model"])),
            accuracy=result["metrics"]["accuracy"],
            interval=tuple(result["metrics"]["interval_95"]),
            speeds=(usage["tokens_per_forward"], usage["tokens_per_second"]),
        )
        for result in found
        if (usage := result["metrics"].get("usage"))
    ]
    if len(points) < 2:
        return []
    return [drawn(plots.trade_off(points, ("tokens per forward", "tokens per second")))]


def _answers(result: Result) -> Markup:
    cards = []
    for sample in result["metrics"]["examples"]:
        mark = "right" if sample["correct"] else "wrong"
        answer = "no answer" if sample["extracted"] is None else sample["extracted"]
        verdict = f"{mark}: {answer}, gold {sample['gold']}"
        prompt = sample["prompt"]
        question = prompt if len(prompt) <= 400 else f"... {prompt[-400:]}"
        cards.append(
            element(
                "div",
                element("h3", verdict, class_=mark),
                element("p", element("span", question, class_="prompt"), sample["output"]),
                class_="card",
            )
        )
    title = element("summary", f"First answers of {result['model']}")
    return element("details", title, element("div", *cards, class_="cards"))
