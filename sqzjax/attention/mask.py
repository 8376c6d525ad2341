# SPDX-License-Identifier: Apache-2.0
"""Which keys a query may see, as a rule on absolute positions.

A rule on positions serves training, chunked prefill, decoding against a cache and left-padded
batches alike: nothing depends on where a token happens to be stored.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from pallas_kernels.attention import AttentionMask
from sqzjax.typing import Array, Bool, Int


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Visibility rule: `causal`, `bidirectional`, or one of blocks with their `block_size`.

    "block_causal": a query sees its own block and all earlier ones, blocks being counted from
    position 0 (SDAR, arXiv 2510.06303). "noisy_clean" is for training such models (BD3-LM, arXiv
    2503.09573): rows hold a noisy copy of a text, then a clean one; noisy tokens see their own
    noisy block and the clean ones before it, clean tokens clean blocks up to their own.
    """

    kind: Literal["causal", "bidirectional", "block_causal", "noisy_clean"] = "causal"
    block_size: int = 0

    def __post_init__(self) -> None:
        if self.kind in ("block_causal", "noisy_clean") and self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} must be >= 1 for kind={self.kind!r}")

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
        if self.kind == "noisy_clean":
            raise ValueError("kind='noisy_clean' needs both copies; see noisy_clean_attention")
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
        return self.rule(window).span(positions)

    def rule(self, window: int | Int[Array, ""] | None = None) -> AttentionMask:
        """Return the mask as the kernels know it; "noisy_clean" is several of theirs."""
        if self.kind == "noisy_clean":
            raise ValueError("kind='noisy_clean' is for training passes without a cache")
        return AttentionMask(self.kind, self.block_size, window)
