# SPDX-License-Identifier: Apache-2.0
"""Answers read from text, and intervals."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.config import Extraction
from eval.extract import canonical, extract, wilson
from tests import tolerances

NUMERIC = Extraction(kind="numeric")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("He has 3 apples and 4 pears, so 3 + 4 = 7 pieces.", "7"),
        ("It is 5.\n#### 18", "18"),
        ("#### 1\nno, wait\n#### 2 (not 3)", "2"),
        ("#### $1,080.50.", "1080.5"),
        ("The total is $2,500,000", "2500000"),
        ("about -3.0 degrees", "-3"),
        ("10-5", "5"),
        ("so 10 - 5 = 5.0", "5"),
        ("of 1,2 and 3,4", "4"),
        (".50", "0.5"),
        ("007", "7"),
        ("-0", "0"),
        ("none at all", None),
        ("", None),
        ("5 came before #### nothing", None),
    ],
)
def test_numbers(text, answer):
    assert extract(text, NUMERIC) == answer


@given(st.integers(-(10**9), 10**9), st.integers(0, 4))
def test_writing_a_number_differently_does_not_change_it(number, zeros):
    plain = canonical(str(number))
    assert canonical(f"{number:,}") == plain
    assert canonical(f"{number}.{'0' * zeros}" if zeros else str(number)) == plain
    assert extract(f"It is {number:,}.", NUMERIC) == plain


def test_regex_takes_the_last_match_and_its_group():
    how = Extraction(kind="regex", pattern=r"answer is \(?([A-D])")
    assert extract("The answer is (A). No, the answer is B.", how) == "b"
    assert extract("It is A", how) is None
    whole = Extraction(kind="regex", pattern=r"[A-D]\b", case_sensitive=True)
    assert extract("A or C", whole) == "C"
    optional = Extraction(kind="regex", pattern=r"x(y)?")
    assert extract("x", optional) is None


def test_exact_ignores_space_and_case_unless_told():
    assert extract("  New\n York ", Extraction()) == "new york"
    assert extract(" Yes", Extraction(case_sensitive=True)) == "Yes"


def test_bad_extraction_settings_are_refused():
    with pytest.raises(ValueError, match="belongs to kind='regex'"):
        Extraction(kind="regex")
    with pytest.raises(ValueError, match="belongs to kind='regex'"):
        Extraction(kind="exact", pattern="a")
    with pytest.raises(ValueError, match="no regular expression"):
        Extraction(kind="regex", pattern="(")


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    # Newcombe 1998, table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_matches_published_values(right, total, low, high):
    assert wilson(right, total) == pytest.approx((low, high), abs=tolerances.FOUR_DIGITS)


def test_wilson_limits():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(20, 20)[1] == pytest.approx(1.0)
