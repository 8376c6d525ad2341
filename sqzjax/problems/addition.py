# SPDX-License-Identifier: Apache-2.0
"""Addition in columns: each step needs the carry of the one before.

The scratchpad writes one column sum after the other, least significant first, each with the carry
that enters it (none enters the first), then the answer: `58+67=` is answered by
`8+7=15,5+6+1=12:125`. Without it the answer stands alone and must be found in one go.
"""

from dataclasses import dataclass
from typing import Literal

from sqzjax.problems.base import Draws, Problem, ProblemKind


@dataclass(frozen=True, kw_only=True)
class Addition(ProblemKind):
    """Add `terms` numbers of exactly `digits` digits."""

    kind: Literal["addition"] = "addition"
    digits: int = 3
    terms: int = 2
    scratchpad: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.digits <= 18 or not 2 <= self.terms <= 9:
            raise ValueError(
                f"digits={self.digits} must lie in [1, 18] and terms={self.terms} in [2, 9]"
            )

    def problem(self, index: int, seed: int) -> Problem:
        """Return the problem of a number."""
        draw = Draws(seed, index)
        least = 10 ** (self.digits - 1) if self.digits > 1 else 0
        numbers = [draw.between(least, 10**self.digits - 1) for _ in range(self.terms)]
        answer = str(sum(numbers))
        response = f"{self._columns(numbers)}:{answer}" if self.scratchpad else answer
        return Problem("+".join(map(str, numbers)) + "=", response, answer)

    def extract(self, text: str) -> str | None:
        """Return what follows the last colon; without a scratchpad, the whole text."""
        if self.scratchpad and ":" not in text:
            return None
        return text.rsplit(":", 1)[-1].strip() or None

    def _columns(self, numbers: list[int]) -> str:
        steps, carry = [], None
        for place in range(self.digits):
            column = [number // 10**place % 10 for number in numbers]
            column += [] if carry is None else [carry]
            steps.append("+".join(map(str, column)) + f"={sum(column)}")
            carry = sum(column) // 10
        return ",".join(steps)
