# SPDX-License-Identifier: Apache-2.0
"""Count the instructions of loops in SASS listings, by their control flow."""

import collections
import heapq
import re
from typing import Any

_LABEL = re.compile(r"\s*(\.L_x_\w+):")
_INSTRUCTION = re.compile(r".*?/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")
_LEAVES = ("EXIT", "RET")


def read(text: str) -> dict[str, Any]:
    """Return the instructions of a listing, and of its longest loop.

    `sass_loop` counts all that can be run again after itself, inner loops included, with the
    commonest `opcodes`; `sass_least` what the shortest way round runs, which is what a warp does
    that skips all that is another warp's.
    """
    labels: dict[str, int] = {}
    code: list[tuple[str, str, str]] = []
    for line in text.splitlines():
        if found := _LABEL.match(line):
            labels[found[1]] = len(code)
        if found := _INSTRUCTION.match(line):
            code.append((found[1] or "", found[2], found[3]))
    after = [_next(code, labels, index) for index in range(len(code))]
    loop = max(_loops(after), key=len, default=set())
    counts = collections.Counter(code[i][1].split(".")[0] for i in sorted(loop))
    return {
        "sass_total": len(code),
        "sass_loop": len(loop),
        "sass_least": _way_round(after, loop),
        "opcodes": dict(counts.most_common(10)),
    }


def _next(code: list[tuple[str, str, str]], labels: dict[str, int], index: int) -> list[int]:
    """Return the instructions that may follow one."""
    guard, opcode, operands = code[index]
    after = [index + 1] if index + 1 < len(code) else []
    if opcode.startswith(_LEAVES):
        return after if guard else []
    label = re.search(r"\.L_x_\w+", operands) if opcode.startswith("BRA") else None
    if label is None or label[0] not in labels:
        return after
    # A second predicate stands among the operands.
    conditional = guard or re.match(r"\s*!?U?P\d", operands)
    return [labels[label[0]], *(after if conditional else [])]


def _loops(after: list[list[int]]) -> list[set[int]]:
    """Return the sets of instructions that reach each other; a branch to itself is padding."""
    before: list[list[int]] = [[] for _ in after]
    for index, following in enumerate(after):
        for other in following:
            before[other].append(index)
    found, done = [], set()
    for index, following in enumerate(after):
        for start in following:
            if start <= index and start not in done:
                loop = _reached(after, start) & _reached(before, start)
                done |= loop
                found.append(loop)
    return [loop for loop in found if len(loop) > 1]


def _reached(edges: list[list[int]], start: int) -> set[int]:
    seen, todo = {start}, [start]
    while todo:
        for other in edges[todo.pop()]:
            if other not in seen:
                seen.add(other)
                todo.append(other)
    return seen


def _way_round(after: list[list[int]], loop: set[int]) -> int:
    """Return the instructions on the shortest way from the loop's last backward branch to itself.

    What waits turns in small circles of its own, which this way does not enter.
    """
    back = [i for i in loop if any(j in loop and j <= i for j in after[i])]
    if not back:
        return 0
    start = min(back, key=lambda i: min(j for j in after[i] if j in loop))
    best, todo = {}, [(1, j) for j in after[start] if j in loop]
    heapq.heapify(todo)
    while todo:
        length, index = heapq.heappop(todo)
        if index == start:
            return length
        if index in best:
            continue
        best[index] = length
        for other in after[index]:
            if other in loop:
                heapq.heappush(todo, (length + 1, other))
    return 0
