# SPDX-License-Identifier: Apache-2.0
"""Grade-school word problems, in the form of GSM8K: question, one line a step, `#### answer`.

The texts are made from a dozen templates of two to four steps; they need reading and arithmetic
with small numbers, and cost no file. Real questions come as JSONL through a generation task.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sqzjax.problems.base import Draws, Problem, ProblemKind

_NAMES = [
    "Mia",
    "Noah",
    "Lena",
    "Omar",
    "Ruth",
    "Ivan",
    "Tara",
    "Hugo",
    "Anna",
    "Ben",
    "Zoe",
    "Carl",
]
_THINGS = [
    "apples",
    "pencils",
    "books",
    "marbles",
    "stickers",
    "cards",
    "shells",
    "stamps",
    "cookies",
    "flowers",
]
_ANSWER = re.compile(r"\s*(-?\d[\d,]*)(?![.,]?\d)")  # 42 but not 42.5


class Text(NamedTuple):
    """A question, its steps as sentences, and the number they arrive at."""

    question: str
    steps: tuple[str, ...]
    answer: int


@dataclass(frozen=True, kw_only=True)
class WordProblems(ProblemKind):
    """Solve a story in as many steps as one of `steps` (2, 3 and 4 exist)."""

    kind: Literal["word_problems"] = "word_problems"
    steps: tuple[int, ...] = (2, 3, 4)

    def __post_init__(self) -> None:
        if not self.steps or not set(self.steps) <= set(TEMPLATES):
            raise ValueError(f"steps={self.steps} must be some of {tuple(TEMPLATES)}")

    def problem(self, index: int, seed: int) -> Problem:
        """Return the problem of a number; every template of a chosen length is equally likely."""
        draw = Draws(seed, index)
        made = draw.choice([make for steps in self.steps for make in TEMPLATES[steps]])(draw)
        lines = [*made.steps, f"#### {made.answer}"]
        prompt = f"Question: {made.question}\nAnswer:"
        return Problem(prompt, " " + "\n".join(lines), str(made.answer))

    def extract(self, text: str) -> str | None:
        """Return the number after the last `####`, without commas."""
        _, mark, tail = text.rpartition("####")
        found = _ANSWER.match(tail) if mark else None
        return str(int(found[1].replace(",", ""))) if found else None


def _purchase(draw: Draws) -> Text:
    name, (first, second) = draw.choice(_NAMES), draw.sample(_THINGS, 2)
    a, b, p, q = (draw.between(2, 12) for _ in range(4))
    return Text(
        f"{name} buys {a} {first} for {p} dollars each and {b} {second} for {q} dollars each. "
        f"How many dollars does {name} spend?",
        (
            f"The {first} cost {a} * {p} = {a * p} dollars.",
            f"The {second} cost {b} * {q} = {b * q} dollars.",
            f"Together that is {a * p} + {b * q} = {a * p + b * q} dollars.",
        ),
        a * p + b * q,
    )


def _change(draw: Draws) -> Text:
    name, thing = draw.choice(_NAMES), draw.choice(_THINGS)
    a, p = draw.between(2, 9), draw.between(2, 9)
    paid = draw.choice([100, 120, 150, 200])
    return Text(
        f"{name} pays for {a} {thing} at {p} dollars each with {paid} dollars. How many dollars "
        f"does {name} get back?",
        (
            f"The {thing} cost {a} * {p} = {a * p} dollars.",
            f"{name} gets back {paid} - {a * p} = {paid - a * p} dollars.",
        ),
        paid - a * p,
    )


def _share(draw: Draws) -> Text:
    name, thing = draw.choice(_NAMES), draw.choice(_THINGS)
    friends, each, given = draw.between(2, 9), draw.between(2, 12), draw.between(2, 15)
    total = friends * each + given
    a = draw.between(2, total - 2)
    return Text(
        f"{name} finds {a} {thing} on Monday and {total - a} on Tuesday, loses {given} of them and "
        f"shares the rest equally among {friends} friends. How many {thing} does each friend get?",
        (
            f"{name} finds {a} + {total - a} = {total} {thing}.",
            f"After the loss there are {total} - {given} = {friends * each} left.",
            f"Each friend gets {friends * each} / {friends} = {each}.",
        ),
        each,
    )


def _reading(draw: Draws) -> Text:
    name = draw.choice(_NAMES)
    pages, days, more, left = (draw.between(2, 15) for _ in range(4))
    read = pages * days + more
    return Text(
        f"A book has {read + left} pages. {name} reads {pages} pages a day for {days} days and "
        f"{more} pages on the day after. How many pages are left?",
        (
            f"In {days} days {name} reads {days} * {pages} = {days * pages} pages.",
            f"With the last day that makes {days * pages} + {more} = {read} pages.",
            f"There are {read + left} - {read} = {left} pages left.",
        ),
        left,
    )


def _comparison(draw: Draws) -> Text:
    (a, b, c), thing = draw.sample(_NAMES, 3), draw.choice(_THINGS)
    x, times = draw.between(3, 15), draw.between(2, 5)
    many = x * times
    fewer = draw.between(1, many - 1)
    return Text(
        f"{a} has {x} {thing}. {b} has {times} times as many as {a}, and {c} has {fewer} fewer "
        f"than {b}. How many {thing} do they have together?",
        (
            f"{b} has {times} * {x} = {many} {thing}.",
            f"{c} has {many} - {fewer} = {many - fewer} {thing}.",
            f"{a} and {b} have {x} + {many} = {x + many}.",
            f"All three have {x + many} + {many - fewer} = {x + 2 * many - fewer}.",
        ),
        x + 2 * many - fewer,
    )


def _discount(draw: Draws) -> Text:
    name, thing = draw.choice(_NAMES), draw.choice(["coats", "bags", "lamps", "chairs", "clocks"])
    price, percent = 20 * draw.between(1, 9), draw.choice([5, 10, 20, 25, 50])
    many, off = draw.between(2, 6), price * percent // 100
    return Text(
        f"One of the {thing} costs {price} dollars. {name} gets {percent}% off the price and buys "
        f"{many} of them. How many dollars does {name} pay?",
        (
            f"The discount is {price} * {percent} / 100 = {off} dollars.",
            f"One costs {price} - {off} = {price - off} dollars.",
            f"{name} pays {many} * {price - off} = {many * (price - off)} dollars.",
        ),
        many * (price - off),
    )


def _halves(draw: Draws) -> Text:
    (a, b), thing = draw.sample(_NAMES, 2), draw.choice(_THINGS)
    parts, each = draw.choice([2, 3, 4]), draw.between(2, 15)
    half = parts * each
    return Text(
        f"{a} has {2 * half} {thing} and gives half of them to {b}. {b} passes on 1 of every "
        f"{parts} of these. How many {thing} does {b} keep?",
        (
            f"{b} gets {2 * half} / 2 = {half} {thing}.",
            f"{b} passes on {half} / {parts} = {each}.",
            f"{b} keeps {half} - {each} = {half - each}.",
        ),
        half - each,
    )


def _wages(draw: Draws) -> Text:
    name = draw.choice(_NAMES)
    hours, days, wage = draw.between(2, 8), draw.between(2, 6), draw.between(5, 15)
    total = hours * days * wage
    rent = draw.between(2, min(60, total - 1))
    saved = total - rent
    return Text(
        f"{name} works {hours} hours a day for {days} days at {wage} dollars an hour and then "
        f"pays {rent} dollars for a ticket. How many dollars are left?",
        (
            f"{name} works {hours} * {days} = {hours * days} hours.",
            f"That earns {hours * days} * {wage} = {total} dollars.",
            f"After the ticket {total} - {rent} = {saved} dollars are left.",
        ),
        saved,
    )


def _backwards(draw: Draws) -> Text:
    name, thing = draw.choice(_NAMES), draw.choice(_THINGS)
    start, given = draw.between(20, 60), draw.between(2, 19)
    bought = draw.between(2, 30)
    end = start - given + bought
    return Text(
        f"{name} gave away {given} {thing} and then bought {bought}. Now {name} has {end} {thing}. "
        f"How many {thing} did {name} have at first?",
        (
            f"Before buying there were {end} - {bought} = {end - bought} {thing}.",
            f"At first there were {end - bought} + {given} = {start}.",
        ),
        start,
    )


def _seats(draw: Draws) -> Text:
    rows, seats, group = draw.between(3, 12), draw.between(3, 12), draw.between(2, 5)
    groups = draw.between(1, (rows * seats - 1) // group)
    taken = rows * seats - groups * group
    return Text(
        f"A hall has {rows} rows of {seats} seats, and {taken} seats are taken. Families of "
        f"{group} sit down in all the others. How many families are there?",
        (
            f"The hall has {rows} * {seats} = {rows * seats} seats.",
            f"Of them {rows * seats} - {taken} = {groups * group} are free.",
            f"That is enough for {groups * group} / {group} = {groups} families.",
        ),
        groups,
    )


def _journey(draw: Draws) -> Text:
    name, vehicle = draw.choice(_NAMES), draw.choice(["car", "bus", "train", "van"])
    first, second = 5 * draw.between(6, 20), 5 * draw.between(6, 20)
    a, b = draw.between(2, 6), draw.between(2, 6)
    done, left = first * a + second * b, draw.between(5, 80)
    return Text(
        f"{name} travels {done + left} miles by {vehicle}: {a} hours at {first} miles per hour, "
        f"then {b} hours at {second} miles per hour. How many miles remain?",
        (
            f"The first part is {a} * {first} = {a * first} miles.",
            f"The second part is {b} * {second} = {b * second} miles.",
            f"So far that makes {a * first} + {b * second} = {done} miles.",
            f"There remain {done + left} - {done} = {left} miles.",
        ),
        left,
    )


def _ages(draw: Draws) -> Text:
    a, b = draw.sample(_NAMES, 2)
    age, times, more, years = (draw.between(2, n) for n in (12, 4, 9, 15))
    other = age * times + more
    return Text(
        f"{a} is {age} years old. {b} is {more} years older than {times} times the age of {a}. "
        f"How old will {b} be in {years} years?",
        (
            f"{times} times the age of {a} is {times} * {age} = {times * age}.",
            f"{b} is {times * age} + {more} = {other} years old.",
            f"In {years} years {b} will be {other} + {years} = {other + years}.",
        ),
        other + years,
    )


TEMPLATES: dict[int, tuple[Callable[[Draws], Text], ...]] = {
    2: (_change, _backwards),
    3: (_purchase, _share, _reading, _discount, _halves, _wages, _seats, _ages),
    4: (_comparison, _journey),
}
"""Templates by their number of steps."""
