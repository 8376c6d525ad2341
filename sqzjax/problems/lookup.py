# SPDX-License-Identifier: Apache-2.0
"""Key-value lookup in a long prompt: a capital or digit is a key, the letter after it its value.

Right for training a small model to retrieve within minutes, and for telling caches that lose a
token from caches that keep it: `...Kq..7b...K` is answered by `q`. A key is one character and is
asked the way it was told, so two attention layers suffice (multi-query associative recall, arXiv
2312.04927); `Recall` is harder. Asked together, `...Kq..7b...7 K =` is answered by `7bKq`, so that
the letters of one block look at many places of the prompt: hard for sparse attention.
"""

import string
from dataclasses import dataclass
from typing import Literal

from sqzjax.problems.base import Draws, Problem, ProblemKind, filler

_KEYS = string.ascii_uppercase + string.digits


@dataclass(frozen=True, kw_only=True)
class Lookup(ProblemKind):
    """Look up `queries` of the `pairs` that lie in a prompt of `length` characters of filler.

    Each further query follows the answer before it: more of them teach more per prompt, but no
    model can guess which key comes next, so evaluation wants `queries=1`, or `together`: all keys
    in the prompt, a space after each, and the answer repeats them; some may be asked again.
    """

    kind: Literal["lookup"] = "lookup"
    length: int = 256
    pairs: int = 16
    queries: int = 1
    together: bool = False

    def __post_init__(self) -> None:
        most = self.queries if self.together else self.pairs
        if not 1 <= self.queries <= most or not 1 <= self.pairs <= len(_KEYS):
            raise ValueError(
                f"queries={self.queries} must be >= 1 and, unless together, <= pairs={self.pairs}, "
                f"which must lie in [1, {len(_KEYS)}]"
            )
        if self._filler < 0:
            raise ValueError(
                f"length={self.length} is too short for pairs={self.pairs}; use "
                f"{self.length - self._filler} or more"
            )

    @property
    def _filler(self) -> int:
        asked = len("K ") * self.queries + len("=") if self.together else len("K")
        return self.length - len("Kv") * self.pairs - asked

    def problem(self, index: int, seed: int) -> Problem:
        """Return the problem of a number."""
        draw = Draws(seed, index)
        keys = draw.sample(_KEYS, self.pairs)
        pairs = [key + draw.choice(string.ascii_lowercase) for key in keys]
        cuts = sorted(draw.below(self._filler + 1) for _ in pairs)
        words = filler(draw, self._filler)
        spans = zip([0, *cuts], cuts, strict=False)
        pieces = [words[begin:end] + pair for (begin, end), pair in zip(spans, pairs, strict=True)]
        told = "".join(pieces) + words[cuts[-1] :]
        if self.together:
            asked = [draw.choice(pairs) for _ in range(self.queries)]
            question = "".join(f"{key} " for key, _ in asked)
            answer = "".join(asked)
            return Problem(f"{told}{question}=", answer, answer)
        answer = "".join(draw.sample(pairs, self.queries))
        return Problem(told + answer[0], answer[1:], answer[1:])
