# SPDX-License-Identifier: Apache-2.0
"""Sorting: every output depends on all of the input, but not on the outputs before it.

Right for seeing what parallel decoding costs: `dbca>` is answered by `abcd`.
"""

from dataclasses import dataclass
from typing import Literal

from sqzjax.problems.base import Draws, Problem, ProblemKind


@dataclass(frozen=True, kw_only=True)
class Sorting(ProblemKind):
    """Sort `length` letters of `alphabet` into its order, or numbers of [0, `maximum`] if > 0."""

    kind: Literal["sorting"] = "sorting"
    length: int = 8
    alphabet: str = "abcdefghijklmnopqrstuvwxyz"
    maximum: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.length <= 1024 or self.maximum < 0:
            raise ValueError(
                f"length={self.length} must lie in [2, 1024] and maximum={self.maximum} be >= 0"
            )
        letters = set(self.alphabet)
        bad = letters & {">"} or {letter for letter in letters if letter.isspace()}
        if len(letters) < 2 or len(letters) != len(self.alphabet) or bad:
            raise ValueError(
                f"alphabet={self.alphabet!r} must be two or more different letters, none of them "
                "'>' or a space"
            )

    def problem(self, index: int, seed: int) -> Problem:
        """Return the problem of a number."""
        draw = Draws(seed, index)
        size = self.maximum + 1 if self.maximum else len(self.alphabet)
        ranks = [draw.below(size) for _ in range(self.length)]
        answer = self._write(sorted(ranks))
        return Problem(f"{self._write(ranks)}>", answer, answer)

    def _write(self, ranks: list[int]) -> str:
        if self.maximum:
            return " ".join(map(str, ranks))
        return "".join(self.alphabet[rank] for rank in ranks)
