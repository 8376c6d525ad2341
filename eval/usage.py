# SPDX-License-Identifier: Apache-2.0
"""What generated text cost: tokens, forward passes and seconds, for accuracy-against-speed plots.

Costs are kept per row, so that a task that was interrupted still adds up to the whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqzjax.decode.outputs import GenerateOutput

Cost = dict[str, float]
_RATES = {"tokens", "forwards", "row_forwards", "seconds"}


@dataclass
class Usage:
    """Costs of each row, in the order of the prompts; pass one to `generate` to have it filled.

    `tokens` are new tokens up to and with the stop id. `forwards` and `seconds` are a row's share
    of its batch, so that sums over rows are those of the run; `row_forwards` are the passes that
    worked on the row itself, and `tokens / row_forwards` does not depend on the batch. What else a
    decoder counts (cache bytes, pages read) is shared out in the same way.
    """

    rows: list[Cost] = field(default_factory=list)

    def add(self, out: GenerateOutput, seconds: float) -> None:
        """Take in the output of one batch.

        A decoder that does not count passes makes one for each token of a row, and rows of one
        that does not count them singly take part in all.
        """
        stats, count = out.stats, len(out.lengths)
        forwards = stats.extra.get("forwards", stats.steps + 1)
        lockstep = forwards * count if "forwards" in stats.extra else stats.new_tokens
        own = stats.extra.get("row_forwards", lockstep)
        shares = {
            "forwards": forwards / count,
            "row_forwards": own / count,
            "seconds": seconds / count,
        }
        counts = {name: value / count for name, value in stats.extra.items() if name not in shares}
        self.rows += [{"tokens": int(length), **shares, **counts} for length in out.lengths]


def total(costs: Sequence[Cost | None]) -> dict[str, Any] | None:
    """Return sums and rates over all rows, None where a row's cost is not known."""
    known = [cost for cost in costs if cost]
    if not known or len(known) < len(costs):
        return None
    tokens, forwards, own, seconds = (
        sum(cost[key] for cost in known)
        for key in ("tokens", "forwards", "row_forwards", "seconds")
    )
    names = set.intersection(*(set(cost) for cost in known)) - _RATES
    sums = {name: sum(cost[name] for cost in known) for name in sorted(names)}
    held = sums.pop("cache_bytes", None)
    more: dict[str, Any] = {"counts": {name: round(value) for name, value in sums.items()}}
    if held is not None:
        more["cache_bytes_per_row"] = held / len(known)
    if sums.get("pages_held"):
        more["density"] = sums["pages_read"] / sums["pages_held"]
    return more | {
        "tokens": int(tokens),
        "mean_tokens": tokens / len(known),
        "forwards": round(forwards),
        "tokens_per_forward": tokens / own if own else 0.0,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
    }
