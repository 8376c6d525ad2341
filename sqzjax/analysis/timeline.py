# SPDX-License-Identifier: Apache-2.0
"""Divide the time of a profiled program among its operations.

A trace holds one interval per executed instruction and thread. Intervals nest (a loop spans its
body) and threads overlap; here every instant goes to the innermost running instructions in equal
parts, so that the shares add up to the time in which anything ran. Imports no jax.
"""

import heapq
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sqzjax.analysis.numbers import Number

PARTS = ("attention", "linear", "head", "sampling", "rest")
"""Parts of a decode step: attention with its cache, the layers' kernels, output head, choice of the
token, everything else (norms, activations, embedding, copies)."""

_CONTAINERS = re.compile(r"(while|call|conditional|async)\b")
_LINEAR = re.compile(r"/(q|k|v|o|gate|up|down)/")


@dataclass(frozen=True)
class Interval:
    """One execution of an instruction on one thread (or stream), in nanoseconds."""

    name: str
    thread: str
    start: Number
    end: Number


def part_of(scope: str) -> str:
    """Return the part of a decode step that an instruction's scopes (`op_name`) belong to."""
    if _LINEAR.search(scope):
        return "linear"
    if "DecoderLM.head" in scope or scope.startswith(("/params/head/", "/params/embed/")):
        return "head"
    if "/caches/" in scope or ("/attention/" in scope and "attn_norm" not in scope):
        return "attention"
    return "sampling" if "/while/" in scope and "DecoderLM" not in scope else "rest"


def breakdown(intervals: Iterable[Interval], scopes: Mapping[str, str]) -> dict[str, float]:
    """Return the nanoseconds of every part; `scopes` maps instruction names to `op_name`s."""
    spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for name, time in busy_times(intervals).items():
        spent[part_of(scopes.get(name, ""))] += time
    return spent


def busy_times(intervals: Iterable[Interval]) -> dict[str, float]:
    """Return the nanoseconds of each instruction; they sum to the time in which any of them ran.

    Of nested intervals on a thread the one that began last counts, of several threads each an
    equal part. Loops and calls count for nothing themselves.
    """
    events: list[tuple[Number, int, int]] = []
    kept = [i for i in intervals if i.end > i.start and not _CONTAINERS.match(i.name)]
    for number, interval in enumerate(kept):
        # Ends come before the starts of the same instant.
        heapq.heappush(events, (interval.start, 1, number))
        heapq.heappush(events, (interval.end, 0, number))
    spent: dict[str, float] = {}
    running: dict[str, list[int]] = {}
    last: Number = 0.0
    while events:
        now, begins, number = heapq.heappop(events)
        if running:
            share = (now - last) / len(running)
            for stack in running.values():
                name = kept[stack[-1]].name
                spent[name] = spent.get(name, 0.0) + share
        last = now
        stack = running.setdefault(kept[number].thread, [])
        if begins:
            stack.append(number)
        else:
            stack.remove(number)
            if not stack:
                del running[kept[number].thread]
    return spent
