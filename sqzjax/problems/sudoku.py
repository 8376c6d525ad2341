# SPDX-License-Identifier: Apache-2.0
"""Sudoku on a 4x4 grid: the easy cells come in an order that is not left to right.

Right for comparing decoding orders. A prompt is 16 cells row by row, `.` where empty; the response
is the 16 digits of the one solution.
"""

from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Literal

import numpy as np

from sqzjax.problems.base import Draws, Problem, ProblemKind


@dataclass(frozen=True, kw_only=True)
class Sudoku4(ProblemKind):
    """Fill a 4x4 grid of which `givens` cells are shown; four is the fewest that can suffice."""

    kind: Literal["sudoku4"] = "sudoku4"
    givens: int = 7

    def __post_init__(self) -> None:
        if not 4 <= self.givens <= 15:
            raise ValueError(f"givens={self.givens} must lie in [4, 15]")

    def problem(self, index: int, seed: int) -> Problem:
        """Return the problem of a number: cells of a full grid are emptied while it stays unique.

        An order of emptying that ends before `givens` is reached is given up for another.
        """
        draw = Draws(seed, index)
        while True:
            grid = solutions()[draw.below(len(solutions()))]
            shown = _thin(grid, draw.sample(range(16), 16), self.givens)
            if shown.sum() == self.givens:
                answer = "".join(map(str, grid))
                cells = zip(answer, shown, strict=True)
                return Problem("".join(c if s else "." for c, s in cells), answer, answer)


def _thin(grid: np.ndarray, order: list[int], givens: int) -> np.ndarray:
    """Hide cells in order, those that are needed for a unique solution excepted."""
    shown = np.ones(16, bool)
    for cell in order:
        if shown.sum() == givens:
            break
        shown[cell] = False
        shown[cell] = (solutions()[:, shown] == grid[shown]).all(1).sum() > 1
    return shown


@cache
def solutions() -> np.ndarray:
    """Return all 288 full grids as `[288, 16]` digits 1 to 4."""
    rows = list(permutations((1, 2, 3, 4)))
    grids: list[tuple[int, ...]] = [()]
    for _ in range(4):
        grids = [grid + row for grid in grids for row in rows if _fits(grid, row)]
    return np.array(grids, np.int8)


def _fits(grid: tuple[int, ...], row: tuple[int, ...]) -> bool:
    """Tell whether a row can follow those of a grid."""
    above = grid[-4:] if len(grid) % 8 else ()  # the row that shares the boxes
    columns = all(row[at % 4] != value for at, value in enumerate(grid))
    boxes = (set(above[i : i + 2]) & set(row[i : i + 2]) for i in (0, 2))
    return columns and not any(boxes)
