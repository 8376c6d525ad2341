# SPDX-License-Identifier: Apache-2.0
"""Time the candidates of a case: medians of loops that are long enough to be measured.

Every call uses other inputs than the calls before it, of which there are enough that no cache
holds them: weights and caches of a model come from memory in each step, too. On accelerators one
dispatch runs several calls, one after the other, so that short kernels are not timed by Python.
"""

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax import lax

from pallas_kernels.bench.case import MIB, BenchCase, Candidate, Foreign
from pallas_kernels.common import round_up

Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Effort:
    """How long and how often a candidate runs, and what its inputs must exceed."""

    min_seconds: float = 0.02
    repeats: int = 5
    cache_bytes: int = 128 * MIB  # the largest on-chip cache
    max_copies: int = 32  # of the inputs
    calls: int = 8  # per dispatch, on accelerators

    def __post_init__(self) -> None:
        if self.min_seconds <= 0 or self.repeats < 1 or self.calls < 1 or self.max_copies < 2:
            raise ValueError(
                f"min_seconds={self.min_seconds} must be > 0, repeats={self.repeats} and "
                f"calls={self.calls} >= 1, max_copies={self.max_copies} >= 2"
            )


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median of `repeats` loops of `calls`; spread = range / median."""

    median_seconds: float
    spread: float
    calls: int
    repeats: int


@dataclass(frozen=True)
class Measured:
    """The timings of a case, or the errors of candidates that cannot run here."""

    timings: dict[str, Timing | str]
    copies: int
    from_cache: bool  # the inputs were too small to keep them out of the caches


def measure(case: BenchCase, effort: Effort) -> Measured:
    """Time every candidate of a case on the default device."""
    cpu = jax.default_backend() == "cpu"
    first = case.make_inputs(0)
    size = max(1, sum(leaf.nbytes for leaf in jax.tree.leaves(first)))
    wanted = max(2, math.ceil(2 * effort.cache_bytes / size))
    calls = 1 if cpu else min(effort.calls, wanted)
    copies = round_up(min(wanted, effort.max_copies), calls)
    inputs = [first, *(case.make_inputs(seed) for seed in range(1, copies))]
    jax.block_until_ready(inputs)
    timings: dict[str, Timing | str] = {}
    for name, candidate in case.candidates.items():
        if candidate is None:
            continue
        try:
            timings[name] = _time(_loop(candidate, inputs, calls, wait_always=cpu), effort)
        except Exception as error:  # a baseline that does not run here is a result, too
            timings[name] = f"{type(error).__name__}: {error}"[:300]
    return Measured(timings, copies, from_cache=copies * size < 2 * effort.cache_bytes)


@dataclass(frozen=True)
class _Loop:
    """`run(times)` returns when everything is done; it makes `times * calls` calls."""

    run: Callable[[int], None]
    calls: int


def _loop(
    candidate: Candidate, inputs: Sequence[Inputs], calls: int, *, wait_always: bool
) -> _Loop:
    if isinstance(candidate, Foreign):
        return _foreign_loop(candidate, inputs)
    program = jax.jit(_program(candidate))
    # One rotation for all loops: each goes on with the inputs that were used longest ago.
    groups = itertools.cycle([tuple(inputs[i : i + calls]) for i in range(0, len(inputs), calls)])

    def run(times: int) -> None:
        out = None
        for _ in range(times):
            out = program(next(groups))
            if wait_always:
                # A CPU starts the next call before the last has ended.
                jax.block_until_ready(out)
        jax.block_until_ready(out)

    return _Loop(run, calls)


def _foreign_loop(candidate: Foreign, inputs: Sequence[Inputs]) -> _Loop:
    converted = itertools.cycle([candidate.convert(one) for one in inputs])

    def run(times: int) -> None:
        for _ in range(times):
            candidate.fn(*next(converted))
        candidate.wait()

    return _Loop(run, 1)


def _program(fn: Callable[..., Any]) -> Callable[[tuple[Inputs, ...]], list[Any]]:
    def program(groups: tuple[Inputs, ...]) -> list[Any]:
        outputs: list[Any] = []
        for arguments in groups:
            if outputs:
                # Keeps XLA from merging the calls into fewer and larger ones.
                arguments, outputs[-1] = lax.optimization_barrier((arguments, outputs[-1]))
            outputs.append(fn(*arguments))
        return outputs

    return program


def _time(loop: _Loop, effort: Effort) -> Timing:
    loop.run(1)  # compiles
    times = 1
    while (seconds := _seconds(loop, times)) < effort.min_seconds:
        enough = math.ceil(1.2 * times * effort.min_seconds / max(seconds, 1e-9))
        times = max(2 * times, min(enough, 10 * times))
    calls = times * loop.calls
    each = [_seconds(loop, times) / calls for _ in range(effort.repeats)]
    median = statistics.median(each)
    return Timing(median, (max(each) - min(each)) / median, calls, effort.repeats)


def _seconds(loop: _Loop, times: int) -> float:
    start = time.perf_counter()
    loop.run(times)
    return time.perf_counter() - start


def as_dict(timing: Timing | str) -> dict[str, Any]:
    """Return a timing, or the error in its place, for JSON."""
    return {"error": timing} if isinstance(timing, str) else dataclasses.asdict(timing)
