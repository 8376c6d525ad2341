# SPDX-License-Identifier: Apache-2.0
"""What a made-up problem is, how one is drawn, and which prompts are kept for evaluation.

The split is a property of the prompt alone: whatever seeds, settings and counts two streams have,
a training stream and an evaluation stream never share a prompt.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from sqzjax.errors import DataError

VERSION = 1
"""Changes whenever an existing setting would yield other problems."""

HELD_OUT = 0.1
"""Share of all prompts that only evaluation sees."""

_WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "it",
    "was",
    "for",
    "on",
    "that",
    "with",
    "as",
    "by",
    "at",
    "from",
    "this",
    "had",
    "not",
    "are",
    "but",
]

T = TypeVar("T")


class Problem(NamedTuple):
    """A prompt, the whole response a model should give, and the answer inside that response."""

    prompt: str
    response: str
    answer: str


class Draws:
    """Random choices of one problem, the same on every platform and numpy version.

    They rest on the raw Philox stream alone: what numpy makes of it may change between versions.
    """

    def __init__(self, seed: int, index: int):
        if index < 0:
            raise ValueError(f"index={index} must be >= 0")
        key = np.array([seed % 2**64, index], np.uint64)
        self._bits = np.random.Philox(key=key)

    def below(self, limit: int) -> int:
        """Return one of 0 .. limit-1; the bias is below limit / 2**64."""
        return int(self._bits.random_raw()) % limit

    def between(self, low: int, high: int) -> int:
        """Return a number of [low, high]."""
        return low + self.below(high - low + 1)

    def choice(self, items: Sequence[T]) -> T:
        """Return one item."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], size: int) -> list[T]:
        """Return `size` different items in random order."""
        pool = list(items)
        for place in range(size):
            other = self.between(place, len(pool) - 1)
            pool[place], pool[other] = pool[other], pool[place]
        return pool[:size]


def filler(draw: Draws, size: int) -> str:
    """Return `size` characters of words without digits or punctuation."""
    text = ""
    while len(text) < size:
        text += draw.choice(_WORDS) + " "
    return text[:size]


@dataclass(frozen=True, kw_only=True)
class ProblemKind(ABC):
    """A family of problems; the fields of a subclass are its settings."""

    @abstractmethod
    def problem(self, index: int, seed: int) -> Problem:
        """Return the problem of a number: a function of settings, index and seed alone."""

    def extract(self, text: str) -> str | None:
        """Return the answer that a response gives, None if it gives none."""
        return text.strip() or None

    def score(self, problem: Problem, text: str) -> bool:
        """Tell whether a response gives exactly the right answer."""
        return self.extract(text) == problem.answer


def is_held_out(prompt: str, share: float = HELD_OUT) -> bool:
    """Tell whether a prompt belongs to evaluation; a smaller share holds out a part of a larger."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=8, person=b"problems").digest()
    return int.from_bytes(digest, "little") < share * 2.0**64


def stream(
    config: ProblemKind,
    *,
    split: Literal["train", "eval"] = "train",
    seed: int = 0,
    held_out: float = HELD_OUT,
) -> Iterator[Problem]:
    """Yield problems of one side of the split without end; `eval` never repeats a prompt.

    Raise DataError when no further prompt turns up, as small families run dry: among 1000 / share
    tries, chance alone leaves a present prompt of that share unseen once in exp(1000) times.
    """
    share = held_out if split == "eval" else 1 - held_out
    if not 0 < share <= 1:
        raise ValueError(f"held_out={held_out} leaves nothing for the {split} split; use (0, 1)")
    seen: set[str] = set()
    tries, limit = 0, math.ceil(1000 / share)
    for index in count():
        problem = config.problem(index, seed)
        wanted = is_held_out(problem.prompt, held_out) == (split == "eval")
        if wanted and problem.prompt not in seen:
            tries = 0
            if split == "eval":
                seen.add(problem.prompt)
            yield problem
        tries += 1
        if tries > limit:
            raise DataError(
                f"{config} has no further prompt for the {split} split after {len(seen)} of them "
                f"({limit} tries); ask for fewer problems or for larger ones"
            )
