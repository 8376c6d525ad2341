# SPDX-License-Identifier: Apache-2.0
"""Run greedy generation here and in Hugging Face transformers, in turn, on the same prompts.

The two sides alternate run by run, so that a machine whose speed drifts treats both alike.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

_WORKER = Path(__file__).with_name("bench_transformers.py")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Speeds of one model, batch and transformers cache, in the same run; medians over repeats.

    `same_tokens` is the share of new tokens on which the two sides agree up to each row's first
    difference: below 1 where rounding tips a near tie between two logits.
    """

    batch: int
    cache: str
    tokens_per_second: float
    transformers_tokens_per_second: float
    speedup: float
    same_tokens: float
    seconds: tuple[float, ...]
    transformers_seconds: tuple[float, ...]


class Peer:
    """A process that generates with transformers; use as a context manager.

    `python` is the interpreter of the environment described in `eval.bench_transformers`.
    """

    def __init__(self, python: str, threads: int):
        if not Path(python).is_file():
            raise ValueError(
                f"transformers_python={python!r} is no file; give the interpreter of an "
                "environment with torch and transformers (see eval/bench_transformers.py)"
            )
        self.versions: dict[str, Any] = {}
        self._command = [python, str(_WORKER), "--threads", str(threads)]

    def __enter__(self) -> Self:
        # jax settings of this process mean nothing there; the hub must never be asked.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def generate(
        self, path: Path, prompts: Sequence[Sequence[int]], new_tokens: int, cache: str
    ) -> tuple[float, np.ndarray]:
        """Return wall seconds and the new tokens `[B, new_tokens]` of one generation."""
        request = {"path": str(path), "prompts": prompts, "new_tokens": new_tokens, "cache": cache}
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the empty answer below reports it
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(
                f"the transformers worker ended with exit code {self._process.wait()}; "
                "its message is above"
            )
        reply = json.loads(answer)
        self.versions = reply["versions"]
        return reply["seconds"], np.asarray(reply["tokens"])


def compare(
    run_here: Callable[[Sequence[Sequence[int]]], Any],
    peer: Peer,
    path: Path,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    caches: Sequence[str],
    repeats: int,
) -> list[Comparison]:
    """Alternate `run_here` (prompts to new tokens) with every transformers cache."""
    expected = np.asarray(run_here(prompts))
    theirs = {name: peer.generate(path, prompts, new_tokens, name)[1] for name in caches}
    here: list[float] = []
    there: dict[str, list[float]] = {name: [] for name in caches}
    for _ in range(repeats):
        start = time.perf_counter()
        np.asarray(run_here(prompts))
        here.append(time.perf_counter() - start)
        for name in caches:
            there[name].append(peer.generate(path, prompts, new_tokens, name)[0])
    total = len(prompts) * new_tokens
    ours = total / float(np.median(here))
    rows = []
    for name in caches:
        speed = total / float(np.median(there[name]))
        rows.append(
            Comparison(
                batch=len(prompts),
                cache=name,
                tokens_per_second=ours,
                transformers_tokens_per_second=speed,
                speedup=ours / speed,
                same_tokens=agreement(expected, theirs[name]),
                seconds=tuple(here),
                transformers_seconds=tuple(there[name]),
            )
        )
    return rows


def agreement(left: np.ndarray, right: np.ndarray) -> float:
    """Return the mean share of each row that precedes its first difference."""
    if left.shape != right.shape:
        raise ValueError(f"token arrays of shapes {left.shape} and {right.shape} must match")
    same = np.cumprod(left == right, axis=1)
    return float(same.mean())
