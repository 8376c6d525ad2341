# SPDX-License-Identifier: Apache-2.0
"""Made-up problems: right answers by other means, one prompt on one side of the split, no drift."""

import itertools
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from sqzjax import config as configs
from sqzjax import problems
from sqzjax.errors import DataError
from sqzjax.problems import Addition, Lookup, Recall, Sorting, Sudoku4, WordProblems
from sqzjax.problems.base import Draws
from sqzjax.problems.words import TEMPLATES
from tests import tolerances
from tests.chi_square import p_value


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A configuration with problems in it."""

    problems: tuple[problems.ProblemConfig, ...]


ROOT = Path(__file__).resolve().parents[2]
KINDS = [
    Addition(),
    Addition(digits=6, terms=3),
    Addition(digits=2, scratchpad=False),
    Sorting(),
    Sorting(length=5, maximum=30),
    Sudoku4(),
    Sudoku4(givens=4),
    WordProblems(),
    Recall(),
    Recall(length=2048, pairs=64, queries=8),
    Lookup(),
    Lookup(length=1024, pairs=36, queries=8),
    Lookup(length=112, pairs=36, queries=7, together=True),
]


def some(kind, count=200, seed=5):
    return [kind.problem(index, seed) for index in range(count)]


# What every kind must do


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_response_scores_and_near_misses_do_not(kind):
    for problem in some(kind, 40):
        assert kind.score(problem, problem.response)
        assert kind.score(problem, problem.response + "\n")
        for text in ("", problem.prompt, problem.response[:-1], problem.response + "0"):
            assert not kind.score(problem, text), text


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_problems_depend_on_index_and_seed_alone(kind):
    assert some(kind, 5) == some(kind, 5)
    assert len({problem.prompt for problem in some(kind, 60)}) > 45
    assert some(kind, 5, seed=1) != some(kind, 5, seed=2)


def test_problems_are_the_same_in_another_process_and_on_every_platform():
    """A change here invalidates trained models' splits: raise problems.VERSION with it."""
    assert [kind.problem(0, 0) for kind in (Addition(), Sorting(), Sudoku4())] == PINNED
    code = (
        "import sys; from sqzjax.problems import *\n"
        f"print([kind.problem(3, 7) for kind in {KINDS!r}])\n"
        "assert 'jax' not in sys.modules, 'importing problems must not start jax'"
    )
    command = [sys.executable, "-c", code]
    settings = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
    printed = subprocess.run(command, env={"PYTHONHASHSEED": "1"}, **settings).stdout
    assert printed.strip() == str([kind.problem(3, 7) for kind in KINDS])


PINNED = [
    ("159+258=", "9+8=17,5+5+1=11,1+2+1=4:417", "417"),
    ("nodqddho>", "dddhnooq", "dddhnooq"),
    ("1...32..43.2...4", "1423324143122134", "1423324143122134"),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_kinds_come_from_configurations(kind):
    assert configs.load(Holder, configs.to_dict(Holder(problems=(kind,)))).problems == (kind,)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Addition(digits=0), "digits=0"),
        (lambda: Addition(terms=1), "terms=1"),
        (lambda: Sorting(length=1), "length=1"),
        (lambda: Sorting(alphabet="abca"), "alphabet="),
        (lambda: Sorting(alphabet="ab>"), "alphabet="),
        (lambda: Sudoku4(givens=3), "givens=3"),
        (lambda: WordProblems(steps=(5,)), "steps="),
        (lambda: Recall(pairs=2, queries=3), "queries=3"),
        (lambda: Recall(length=83), "use 84 or more"),
        (lambda: Lookup(pairs=37), "pairs=37"),
        (lambda: Lookup(length=32), "use 33 or more"),
        (lambda: Lookup(length=34, queries=2, together=True), "use 37 or more"),
        (lambda: Lookup(queries=0, together=True), "queries=0"),
        (lambda: Lookup(queries=17), "<= pairs=16"),
        (lambda: Addition().problem(-1, 0), "index=-1"),
        (lambda: next(problems.stream(Addition(), held_out=1.0)), "held_out=1.0"),
    ],
)
def test_bad_settings_say_what_is_wrong(make, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        make()


def test_the_shortest_recall_is_what_the_error_says():
    assert len(Recall(length=84).problem(0, 0).prompt) == 84


# The split


def test_no_prompt_is_on_both_sides():
    """Two digits alone make 8100 prompts: streams of other seeds meet the same ones again."""
    kind = Addition(digits=2)

    def prompts(split):
        streams = [problems.stream(kind, split=split, seed=seed) for seed in range(4)]
        return {p.prompt for stream in streams for p in itertools.islice(stream, 600)}

    train, held = prompts("train"), prompts("eval")
    assert len(held) > 500 and len(train) > 1500
    assert not train & held


def test_a_small_family_yields_every_held_out_prompt_once_and_then_says_so():
    kind = Addition(digits=1)
    every = [f"{a}+{b}=" for a in range(10) for b in range(10)]
    held = {prompt for prompt in every if problems.is_held_out(prompt)}
    assert 0 < len(held) < 30
    stream = problems.stream(kind, split="eval", seed=2)
    asked = [next(stream).prompt for _ in held]
    assert sorted(asked) == sorted(held)
    with pytest.raises(DataError, match=f"after {len(held)} of them"):
        next(stream)


def test_the_held_out_share_is_as_asked_and_shares_are_nested():
    prompts = [problem.prompt for problem in some(Sorting(), 4000)]
    for share in (0.05, 0.1, 0.3):
        held = sum(problems.is_held_out(prompt, share) for prompt in prompts)
        expected = len(prompts) * np.array([share, 1 - share])
        counts = np.array([held, len(prompts) - held])
        assert p_value(counts, expected) > tolerances.SAMPLING_P_VALUE
        assert all(problems.is_held_out(p, 0.5) for p in prompts if problems.is_held_out(p, share))


def test_draws_are_uniform():
    for limit in (3, 10):
        counts = np.bincount([Draws(1, i).between(5, 4 + limit) - 5 for i in range(3000)])
        expected = np.full(limit, 3000 / limit)
        assert p_value(counts, expected) > tolerances.SAMPLING_P_VALUE
    orders = Counter(tuple(Draws(2, i).sample("abc", 3)) for i in range(3000))
    assert p_value(np.array(list(orders.values())), np.full(6, 500.0)) > tolerances.SAMPLING_P_VALUE


# Answers by other means


@pytest.mark.parametrize(("digits", "terms"), [(1, 2), (3, 2), (6, 3), (18, 9)])
def test_additions_and_their_columns(digits, terms):
    kind = Addition(digits=digits, terms=terms)
    for problem in some(kind, 50):
        numbers = problem.prompt.removesuffix("=").split("+")
        assert {len(number) for number in numbers} == {digits} and len(numbers) == terms
        columns, answer = problem.response.split(":")
        assert answer == problem.answer == str(sum(map(int, numbers)))
        written, carry = "", 0
        for place, step in enumerate(columns.split(",")):
            left, right = step.split("=")
            parts = [int(part) for part in left.split("+")]
            assert parts[:terms] == [int(number[-1 - place]) for number in numbers]
            assert sum(parts) == int(right)
            assert parts[terms:] == ([carry] if place else [])
            written, carry = str(int(right) % 10) + written, int(right) // 10
        assert int(str(carry) + written) == int(answer)
        assert not kind.score(problem, answer), "the scratchpad is part of the format"


@pytest.mark.parametrize(
    "kind", [Sorting(), Sorting(alphabet="zyx"), Sorting(length=6, maximum=200)]
)
def test_sorted_items_are_those_of_the_prompt(kind):
    for problem in some(kind, 50):
        question = problem.prompt.removesuffix(">")
        if kind.maximum:
            items = [int(item) for item in question.split()]
            assert [int(item) for item in problem.answer.split()] == sorted(items)
            assert max(items) <= kind.maximum
        else:
            assert "".join(sorted(question, key=kind.alphabet.index)) == problem.answer
        assert len(question.split() if kind.maximum else question) == kind.length


def solve(cells: str) -> list[str]:
    """Return every full grid that agrees with the cells, by trying digits one after another."""
    if "." not in cells:
        return [cells]
    at = cells.index(".")
    row, column = divmod(at, 4)
    found = []
    for digit in "1234":
        used = any(
            cells[i] == digit
            for i in range(16)
            if i // 4 == row
            or i % 4 == column
            or (i // 8 == row // 2 and i % 4 // 2 == column // 2)
        )
        if not used:
            found += solve(cells[:at] + digit + cells[at + 1 :])
    return found


@pytest.mark.parametrize("givens", [4, 5, 8, 12, 15])
def test_a_sudoku_has_one_solution(givens):
    for problem in some(Sudoku4(givens=givens), 10):
        assert 16 - problem.prompt.count(".") == givens
        assert solve(problem.prompt) == [problem.answer]


def test_there_are_288_grids_of_four():
    from sqzjax.problems.sudoku import solutions

    assert len({tuple(grid) for grid in solutions().tolist()}) == len(solve("." * 16)) == 288


@pytest.mark.parametrize("steps", sorted(TEMPLATES))
def test_every_step_of_a_word_problem_is_right_and_uses_known_numbers(steps):
    shapes = set()
    for problem in some(WordProblems(steps=(steps,)), 400):
        *lines, last = problem.response.strip().split("\n")
        assert len(lines) == steps
        # "2" and "100" stand for "half" and "%".
        known = {*map(int, re.findall(r"\d+", problem.prompt)), 2, 100}
        result = None
        for line in lines:
            (left, right) = re.findall(r"([\d */+-]*\d) = (\d+)", line)[0]
            numbers = [int(number) for number in re.findall(r"\d+", left)]
            assert set(numbers) <= known, (problem, line)
            result = int(right)
            assert calculate(left) == result >= 0, (problem, line)
            known.add(result)
        assert last == f"#### {result}" and problem.answer == str(result)
        shapes.add(re.sub(r"\d+|[A-Z][a-z]+", "", problem.response)[:60])
    assert len(TEMPLATES[steps]) <= len(shapes)
    assert sum(map(len, TEMPLATES.values())) >= 8


def calculate(text: str) -> float:
    """Evaluate a chain of operations of equal rank, or a single one, from left to right."""
    first, *rest = text.split()
    value = float(first)
    for sign, number in itertools.batched(rest, 2):
        other = float(number)
        value = {"+": value + other, "-": value - other, "*": value * other, "/": value / other}[
            sign
        ]
    return value


def test_word_problems_read_the_number_behind_the_mark():
    kind = WordProblems()
    read = {"#### 1,234.": "1234", "#### 5\n#### 42": "42", "####42 apples": "42"}
    for text, number in read.items():
        assert kind.extract(text) == number
    for text in ("42", "#### none", "#### 42.5", "#### 1,234.5", ""):
        assert kind.extract(text) is None


@pytest.mark.parametrize("kind", [Recall(), Recall(length=600, pairs=100, queries=5)])
def test_recall_asks_for_what_the_prompt_holds(kind):
    places = []
    for problem in some(kind, 150):
        assert len(problem.prompt) == kind.length
        pairs = re.findall(r"([a-z]\d)=([A-Z]);", problem.prompt)
        asked = re.findall(r"\?([a-z]\d)", problem.prompt)
        assert len(dict(pairs)) == len(pairs) == kind.pairs
        assert len(set(asked)) == len(asked) == kind.queries
        assert problem.answer == "".join(dict(pairs)[key] for key in asked)
        places += [problem.prompt.index(key + "=") / kind.length for key in asked]
    assert min(places) < 0.1 and max(places) > 0.8 and 0.4 < np.mean(places) < 0.6


@pytest.mark.parametrize("kind", [Lookup(), Lookup(length=33), Lookup(length=600, pairs=36)])
def test_lookup_asks_for_what_the_prompt_holds(kind):
    """A capital or digit is a key wherever it stands, the letter behind it its value."""
    places = []
    for problem in some(kind, 150):
        assert len(problem.prompt) == kind.length
        pairs = re.findall(r"([A-Z\d])([a-z])", problem.prompt[:-1])
        assert len(dict(pairs)) == len(pairs) == kind.pairs
        assert problem.answer == dict(pairs)[problem.prompt[-1]]
        places.append(problem.prompt.index(problem.prompt[-1]) / kind.length)
    assert min(places) < 0.1 and max(places) > 0.8 and 0.4 < np.mean(places) < 0.6


def test_lookups_asked_together_are_answered_in_the_order_asked():
    kind = Lookup(length=80, pairs=4, queries=5, together=True)
    for problem in some(kind, 50):
        assert len(problem.prompt) == kind.length
        pairs = re.findall(r"([A-Z\d])([a-z])", problem.prompt)
        asked = re.fullmatch(r".*?((?:[A-Z\d] ){5})=", problem.prompt)[1].split()
        assert len(dict(pairs)) == len(pairs) == kind.pairs
        assert problem.answer == "".join(key + dict(pairs)[key] for key in asked)


def test_further_lookups_follow_the_answers():
    kind = Lookup(length=120, pairs=20, queries=20)
    for problem in some(kind, 50):
        pairs = dict(re.findall(r"([A-Z\d])([a-z])", problem.prompt[:-1]))
        told = problem.prompt[-1] + problem.response
        assert dict(zip(told[::2], told[1::2], strict=True)) == pairs
