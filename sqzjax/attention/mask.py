# SPDX-License-Identifier: Apache-2.0
"""Which keys a query may see, as a rule on absolute positions.

A rule on positions serves training, chunked prefill, decoding against a cache and left-padded
batches alike: nothing depends on where a token happens to be stored.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np

from sqzjax.typing import Array, Bool, Int

_NO_LIMIT = np.iinfo(np.int32).max


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Visibility rule: `causal`, `bidirectional`, or `block_causal` with its `block_size`.

    Block-causal: a query sees its own block and all earlier ones, blocks being counted from
    position 0 (SDAR, arXiv 2510.06303).
    """

    kind: Literal["causal", "bidirectional", "block_causal"] = "causal"
    block_size: int = 0

    def __post_init__(self) -> None:
        if self.kind == "block_causal" and self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} must be >= 1 for kind='block_causal'")

    def visible(
        self,
        query_positions: Int[Array, "B T"],
        key_positions: Int[Array, "B S"],
        window: int | Int[Array, ""] | None = None,
    ) -> Bool[Array, "B T S"]:
        """Return which keys each query sees; a negative position sees and shows nothing.

        `window` keeps keys less than `window` positions away (Mistral's convention: the query
        itself counts as one of them).
        """
        query = query_positions[:, :, None]
        key = key_positions[:, None, :]
        seen = (query >= 0) & (key >= 0)
        if self.kind == "causal":
            seen &= key <= query
        elif self.kind == "block_causal":
            seen &= key // self.block_size <= query // self.block_size
        if window is not None:
            seen &= jnp.abs(query - key) < window
        return seen

    def span(
        self, positions: Int[Array, "B T"], window: int | Int[Array, ""] | None = None
    ) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
        """Return the first position that each query sees and the one after the last.

        The same rule as `visible`: every mask of this library is a range of positions. Padding
        queries get an empty range.
        """
        limits = jnp.full_like(positions, _NO_LIMIT)
        if self.kind == "causal":
            limits = positions + 1
        elif self.kind == "block_causal":
            limits = (positions // self.block_size + 1) * self.block_size
        starts = jnp.zeros_like(positions)
        if window is not None:
            starts = jnp.maximum(positions - window + 1, 0)
            # positions + window may exceed the integers where "no window" is a huge one.
            limits = positions + jnp.minimum(limits - positions, window)
        return starts, jnp.where(positions >= 0, limits, 0)


def same_segment(
    query_segments: Int[Array, "B T"], key_segments: Int[Array, "B S"]
) -> Bool[Array, "B T S"]:
    """Return where query and key belong to the same packed document (negative ids are padding)."""
    query = query_segments[:, :, None]
    return (query == key_segments[:, None, :]) & (query >= 0)
