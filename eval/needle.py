# SPDX-License-Identifier: Apache-2.0
"""Find a number hidden in filler text, over a grid of context lengths and depths.

Texts are made here, nothing is downloaded. Two measures: writing the number out (exact match), and
the rank of the true number among others by log-likelihood, which tells a cache that lost the
needle from one that kept it even with a model too small to answer. Chance of the second is
1 / (alternatives + 1).
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.config import Needle
from eval.extract import wilson
from eval.scoring import LikelihoodScorer, Request
from eval.tasks import TextModel
from sqzjax.decode.sampling_config import SamplingConfig
from sqzjax.errors import DataError
from sqzjax.io.tokenizer import Tokenizer

FILLER = (
    "The grass is green and the sky is blue. ",
    "A small boat went down the river to the old mill. ",
    "The children played in the garden until the sun went down. ",
    "Every morning the baker opened his shop and lit the fire. ",
    "There was a big tree on the hill, and birds sang in it all day. ",
    "The cat slept on the warm stone wall. ",
)
PLACES = ("Paris", "London", "Rome", "Cairo", "Lima", "Oslo", "Tokyo", "Delhi")


@dataclass(frozen=True)
class Case:
    """One haystack with its question: prompt tokens, the true number, and wrong ones."""

    length: int
    depth: float
    prompt: tuple[int, ...]
    number: str
    others: tuple[str, ...]


def build_cases(task: Needle, tokenizer: Tokenizer, seed: int) -> list[Case]:
    """Make `samples` haystacks per cell; prompt and answer together have at most `length` tokens.

    Filler, places and numbers are drawn per length and sample, so the cells of a column differ by
    depth alone.
    """
    sentences = filler_sentences(task.filler)
    sizes = [len(ids) for ids in tokenizer.encode_batch(sentences)]
    cases = []
    for length in task.lengths:
        for sample in range(task.samples):
            # Seeds are strings so that no two combinations collide.
            draw = random.Random(f"{seed}/{length}/{sample}")
            numbers = _numbers(draw, task.digits, task.alternatives + 1)
            place, start = draw.choice(PLACES), draw.randrange(len(sentences))
            haystack = _Haystack(
                needle=task.needle.format(place=place, number=numbers[0]).strip() + " ",
                question=task.question.format(place=place),
                sentences=tuple(sentences[start:] + sentences[:start]),
                sizes=tuple(sizes[start:] + sizes[:start]),
            )
            # One token to spare: generation stops a token after the number.
            room = 1 + max(len(answer_tokens(tokenizer, number)) for number in numbers)
            for depth in task.depths:
                prompt = tuple(haystack.prompt(tokenizer, length - room, depth))
                cases.append(Case(length, depth, prompt, numbers[0], tuple(numbers[1:])))
    return cases


def filler_sentences(path: str) -> list[str]:
    """Return the sentences of the filler file, or the built-in ones."""
    if not path:
        return list(FILLER)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read filler {path}: {error}") from error
    sentences = [piece for piece in re.findall(r"[^.!?]+[.!?]+\s*", text) if piece.strip()]
    if not sentences:
        raise DataError(f"filler {path} holds no sentence that ends in . ! or ?")
    return sentences


def _numbers(draw: random.Random, digits: int, count: int) -> list[str]:
    low = 10 ** (digits - 1)
    return [str(number) for number in draw.sample(range(low, 10 * low), count)]


@dataclass(frozen=True)
class _Haystack:
    """A needle with its question, and the filler sentences around it in the order of use."""

    needle: str
    question: str
    sentences: tuple[str, ...]
    sizes: tuple[int, ...]  # tokens of each sentence on its own, an estimate inside a text

    def prompt(self, tokenizer: Tokenizer, length: int, depth: float) -> list[int]:
        """Return the longest prompt of whole sentences within `length` tokens."""
        size = len(tokenizer.encode(self.needle + self.question, add_bos=None))
        if size > length:
            raise DataError(
                f"needle and question take {size} tokens, more than the {length} that are left "
                "beside the answer; use longer lengths"
            )
        count = 0
        while size < length:
            size += self.sizes[count % len(self.sizes)]
            count += 1
        while True:
            ids = tokenizer.encode(self._text(count, depth), add_bos=None)
            if len(ids) <= length or not count:
                return ids
            count -= 1

    def _text(self, count: int, depth: float) -> str:
        filler = [self.sentences[i % len(self.sentences)] for i in range(count)]
        before = round(depth * count)
        text = "".join([*filler[:before], self.needle, *filler[before:]])
        return text.strip() + self.question


def run(
    task: Needle,
    model: TextModel,
    scorer: LikelihoodScorer | None,
    *,
    batch_size: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Return per-cell and overall scores of the measures that `task.mode` asks for."""
    cases = build_cases(task, model.tokenizer, seed)
    result: dict[str, Any] = {
        "lengths": list(task.lengths),
        "depths": list(task.depths),
        "samples_per_cell": task.samples,
        "prompt_tokens": [min(len(c.prompt) for c in cases), max(len(c.prompt) for c in cases)],
    }
    if task.mode in ("likelihood", "both"):
        if scorer is None:
            raise DataError("mode=likelihood needs a causal model; use mode=generate")
        ranks = likelihood_ranks(cases, model.tokenizer, scorer, progress)
        result["chance"] = 1 / (task.alternatives + 1)
        result["likelihood"] = _grid(task, cases, [float(rank == 1) for rank in ranks])
        result["mean_rank"] = float(np.mean(ranks))
    if task.mode in ("generate", "both"):
        hits = generation_hits(task, cases, model, batch_size, progress)
        result["generation"] = _grid(task, cases, hits)
    return result


def likelihood_ranks(
    cases: Sequence[Case],
    tokenizer: Tokenizer,
    scorer: LikelihoodScorer,
    progress: Callable[[int], None] | None = None,
) -> list[int]:
    """Return the rank (1 is best) of each case's true number; ties count against it."""
    requests = []
    for case in cases:
        for number in (case.number, *case.others):
            requests.append(Request(case.prompt, answer_tokens(tokenizer, number)))
    scores = iter(scorer.score(requests, progress=progress))
    ranks = []
    for case in cases:
        true = next(scores).logprob
        others = [next(scores).logprob for _ in case.others]
        ranks.append(1 + sum(other >= true for other in others))
    return ranks


def answer_tokens(tokenizer: Tokenizer, number: str) -> list[int]:
    """Return the tokens of a number as they follow a word inside a text.

    Sentencepiece-style tokenizers mark the space in the token, others keep it apart; both are met
    by encoding the number behind a word and cutting the word off.
    """
    prefix = tokenizer.encode("is")
    whole = tokenizer.encode(f"is {number}")
    if whole[: len(prefix)] != prefix:
        return tokenizer.encode(f" {number}")
    return whole[len(prefix) :]


def generation_hits(
    task: Needle,
    cases: Sequence[Case],
    model: TextModel,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> list[float]:
    """Return 1 for each case whose greedy continuation begins with the number."""
    room = max(len(answer_tokens(model.tokenizer, case.number)) for case in cases) + 1
    sampling = SamplingConfig(max_new_tokens=room, temperature=0.0)
    hits = [0.0] * len(cases)
    order = sorted(range(len(cases)), key=lambda i: -len(cases[i].prompt))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        texts = model.generate([cases[i].prompt for i in batch], sampling, row_ids=batch)
        for index, text in zip(batch, texts, strict=True):
            found = re.search(r"\d+", text)
            hits[index] = float(found is not None and found[0] == cases[index].number)
        if progress is not None:
            progress(len(batch))
    return hits


def _grid(task: Needle, cases: Sequence[Case], values: Sequence[float]) -> dict[str, Any]:
    """Return the mean per cell (rows are depths, columns lengths) and over everything."""
    cells = [[0.0] * len(task.lengths) for _ in task.depths]
    for case, value in zip(cases, values, strict=True):
        row, column = task.depths.index(case.depth), task.lengths.index(case.length)
        cells[row][column] += value / task.samples
    right = round(sum(values))
    return {
        "accuracy": right / len(values),
        "interval_95": list(wilson(right, len(values))),
        "cells": cells,
    }
