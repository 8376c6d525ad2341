# SPDX-License-Identifier: Apache-2.0
"""Made-up problems with answers that can be checked exactly; numpy alone, no file, no jax."""

from sqzjax.problems.addition import Addition
from sqzjax.problems.base import HELD_OUT, VERSION, Problem, ProblemKind, is_held_out, stream
from sqzjax.problems.lookup import Lookup
from sqzjax.problems.recall import Recall
from sqzjax.problems.sorting import Sorting
from sqzjax.problems.sudoku import Sudoku4
from sqzjax.problems.words import WordProblems

ProblemConfig = Addition | Sorting | Sudoku4 | WordProblems | Recall | Lookup

__all__ = [
    "HELD_OUT",
    "VERSION",
    "Addition",
    "Lookup",
    "Problem",
    "ProblemConfig",
    "ProblemKind",
    "Recall",
    "Sorting",
    "Sudoku4",
    "WordProblems",
    "is_held_out",
    "stream",
]
