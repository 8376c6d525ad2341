# SPDX-License-Identifier: Apache-2.0
"""What a comparison of caches measures. Imports no jax."""

from dataclasses import dataclass
from typing import Literal

from eval.cache_rows import CacheEntry, CacheRow, all_rows
from eval.config import ModelEntry, Needle, Perplexity, Problems, label
from sqzjax.problems import ProblemConfig


@dataclass(frozen=True, kw_only=True)
class CacheSpeed:
    """Greedy decoding of `new_tokens` after prompts of random tokens that fill the rest of the
    context; medians over `repeats` generations of `batch` prompts, after one that compiles."""

    batch: int = 1
    new_tokens: int = 32
    repeats: int = 3

    def __post_init__(self) -> None:
        least = {"batch": 1, "new_tokens": 2, "repeats": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name}={getattr(self, name)} must be >= {bound}")


@dataclass(frozen=True, kw_only=True)
class Responses:
    """Perplexity of the right responses to `count` made-up problems, each given its prompt.

    The text of models that know nothing else; problems of many `queries` ask much of each prompt.
    """

    kind: Literal["responses"] = "responses"
    name: str = "responses"
    problems: ProblemConfig
    count: int = 16
    seed: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count={self.count} must be >= 1")


@dataclass(frozen=True, kw_only=True)
class KvLeaderboardConfig:
    """One model, and every cache of `caches` tried on it: size, perplexity, retrieval, speed.

    Sizes and speeds are those of a cache of `context` tokens (0: the model's maximum). Texts and
    prompts enter a cache `prefill_chunk` tokens at a time; tokens of a chunk see each other as they
    are, so smaller chunks judge a lossy cache harder, and 1 feeds every token by itself, as
    decoding does (slow: for small models). `baseline` names the row that others are compared with
    (empty: the first one of kind dense). Tasks of kind `problems` and `needle` measure retrieval;
    the figure shows the first. Finished rows are kept when the same command runs again.
    """

    kind: Literal["kv_leaderboard"] = "kv_leaderboard"
    model: ModelEntry
    caches: tuple[CacheEntry, ...]
    perplexity: tuple[Perplexity | Responses, ...] = ()
    retrieval: tuple[Problems | Needle, ...] = ()
    speed: CacheSpeed | None = CacheSpeed()
    context: int = 0
    prefill_chunk: int = 32
    batch_size: int = 8
    seed: int = 0
    baseline: str = ""
    title: str = "Caches compared"
    workdir: str = "runs/kv_leaderboard"

    def __post_init__(self) -> None:
        for name, least in (("context", 0), ("prefill_chunk", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be >= {least}")
        if self.model.cache is not None or self.model.decoder is not None:
            raise ValueError("model.cache and model.decoder must be null; list caches in caches")
        names = [label(task) for task in self.tasks]
        if all(isinstance(task, Responses) for task in self.tasks):
            raise ValueError(
                "perplexity and retrieval hold no task besides responses; give at least one"
            )
        if len(set(names)) < len(names):
            raise ValueError(f"tasks {names} must have different names; give each its own name")
        known = [row.name for row in self.rows]
        if self.baseline and self.baseline not in known:
            raise ValueError(f"baseline={self.baseline!r} must be a row; rows are {known}")

    @property
    def tasks(self) -> tuple[Perplexity | Responses | Problems | Needle, ...]:
        """Everything that says how good a cache is."""
        return (*self.perplexity, *self.retrieval)

    @property
    def rows(self) -> list[CacheRow]:
        """The rows of the table, in order."""
        return all_rows(self.caches)

    @property
    def baseline_name(self) -> str | None:
        """Name of the row that others are compared with; None if there is none."""
        dense = (row.name for row in self.rows if row.settings["kind"] == "dense")
        return self.baseline or next(dense, None)
