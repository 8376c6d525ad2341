# SPDX-License-Identifier: Apache-2.0
"""Associative recall in a long prompt: pairs of key and value lie scattered in filler words.

Right for caches and sparse attention, which lose exactly this. `...k7=Q;...a3=X;...?a3?k7=` is
answered by `XQ`. Digits occur in keys only: the letter before a digit is where a pair begins.
"""

import string
from dataclasses import dataclass
from typing import Literal

from sqzjax.problems.base import Draws, Problem, ProblemKind, filler

_KEYS = [letter + digit for letter in string.ascii_lowercase for digit in string.digits]


@dataclass(frozen=True, kw_only=True)
class Recall(ProblemKind):
    """Recall the values of `queries` of the `pairs` hidden in a prompt of `length` characters."""

    kind: Literal["recall"] = "recall"
    length: int = 256
    pairs: int = 16
    queries: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.queries <= self.pairs <= len(_KEYS):
            raise ValueError(
                f"queries={self.queries} and pairs={self.pairs} must satisfy 1 <= queries <= pairs "
                f"<= {len(_KEYS)}"
            )
        if self._filler < 0:
            raise ValueError(
                f"length={self.length} is too short for pairs={self.pairs} and queries="
                f"{self.queries}; use {self.length - self._filler} or more"
            )

    @property
    def _filler(self) -> int:
        return self.length - len("k0=V;") * self.pairs - len("?k0") * self.queries - len("=")

    def problem(self, index: int, seed: int) -> Problem:
        """Return the problem of a number."""
        draw = Draws(seed, index)
        keys = draw.sample(_KEYS, self.pairs)
        values = [draw.choice(string.ascii_uppercase) for _ in keys]
        cuts = sorted(draw.below(self._filler + 1) for _ in keys)
        words = filler(draw, self._filler)
        pieces = []
        for key, value, begin, end in zip(keys, values, [0, *cuts], cuts, strict=False):
            pieces += [words[begin:end], f"{key}={value};"]
        asked = draw.sample(range(self.pairs), self.queries)
        question = "".join("?" + keys[place] for place in asked) + "="
        answer = "".join(values[place] for place in asked)
        return Problem("".join(pieces) + words[cuts[-1] :] + question, answer, answer)
