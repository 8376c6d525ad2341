# SPDX-License-Identifier: Apache-2.0
"""Which keys a query may see, as a rule on absolute positions.

A rule on positions serves training, chunked prefill, decoding against a cache and left-padded
batches alike: nothing depends on where a token happens to be stored.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from sqzjax.typing import Array, Bool, Int


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


def same_segment(
    query_segments: Int[Array, "B T"], key_segments: Int[Array, "B S"]
) -> Bool[Array, "B T S"]:
    """Return where query and key belong to the same packed document (negative ids are padding)."""
    query = query_segments[:, :, None]
    return (query == key_segments[:, None, :]) & (query >= 0)
