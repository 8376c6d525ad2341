# SPDX-License-Identifier: Apache-2.0
"""Masks of prefill and training attention: for every query, a range of positions."""

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from pallas_kernels.common import check

NO_LIMIT = int(np.iinfo(np.int32).max)
Kind = Literal["causal", "bidirectional", "block_causal", "earlier_blocks", "same_block"]
KINDS = ("causal", "bidirectional", "block_causal", "earlier_blocks", "same_block")


@dataclass(frozen=True)
class AttentionMask:
    """Which keys a query sees, as a rule on positions.

    Blocks of `block_size` are counted from position 0. "block_causal" shows a query its own block
    and all earlier ones, "earlier_blocks" only the latter, "same_block" only the former. `window`
    keeps keys less than `window` positions away (the query itself is one of them); it may be a
    traced scalar, which library kernels cannot use.
    """

    kind: Kind = "causal"
    block_size: int = 0
    window: Any = None

    def __post_init__(self) -> None:
        check("kind", self.kind, self.kind in KINDS, f"must be one of {', '.join(KINDS)}")
        if self.kind not in ("causal", "bidirectional"):
            rule = f"must be >= 1 for kind={self.kind!r}"
            check("block_size", self.block_size, self.block_size >= 1, rule)
        if isinstance(self.window, int | np.integer):
            good = int(self.window) >= 1
            check("window", self.window, good, "must be >= 1, or None for no window")

    def span(self, positions: Any, xp: Any = jnp) -> tuple[Any, Any]:
        """Return the first position that each query sees and the one after the last.

        Starts are >= 0; a negative position (padding) gets an empty range. `xp=numpy` computes on
        the host.
        """
        starts = xp.zeros_like(positions)
        limits = xp.full_like(positions, NO_LIMIT)
        if self.kind == "causal":
            limits = positions + 1
        elif self.kind != "bidirectional":
            block = positions // self.block_size * self.block_size
            starts = block if self.kind == "same_block" else starts
            limits = block if self.kind == "earlier_blocks" else block + self.block_size
        if self.window is not None:
            starts = xp.maximum(starts, positions - self.window + 1)
            # positions + window may exceed the integers where "no window" is a huge one.
            limits = positions + xp.minimum(limits - positions, self.window)
        return xp.maximum(starts, 0), xp.where(positions >= 0, limits, 0)
