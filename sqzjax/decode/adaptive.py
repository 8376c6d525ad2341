# SPDX-License-Identifier: Apache-2.0
"""Blocks of a diffusion decoder that end where the text does."""

from dataclasses import dataclass

import jax.numpy as jnp

from sqzjax.decode.denoiser import DiffusionState
from sqzjax.typing import Array


@dataclass(frozen=True, kw_only=True)
class AdaptiveBlocks:
    """End blocks at a delimiter that the model is sure of (AdaBlock-dLLM, arXiv 2509.26432).

    When a block opens, the surest position among those within `share` of the answer's length that
    predict one of `delimiters` ends it, if its probability reaches `threshold` (0.3 for LLaDA, 0.5
    for Dream); otherwise the block has the decoder's `block_size`. `most` bounds a block.
    """

    delimiters: tuple[int, ...]
    threshold: float = 0.3
    share: float = 0.25
    most: int = 128

    def __post_init__(self) -> None:
        if not self.delimiters:
            raise ValueError("adaptive.delimiters is empty; name token ids such as the newline's")
        if not 0 < self.share <= 1 or not self.threshold >= 0:
            raise ValueError(
                f"adaptive.share={self.share} must lie in (0, 1] and threshold={self.threshold} "
                "must be >= 0"
            )

    def check(self, vocabulary: int, mask: int) -> None:
        """Raise ValueError if a delimiter is no token that the model can predict."""
        for token in self.delimiters:
            if not 0 <= token < vocabulary or token == mask:
                raise ValueError(
                    f"adaptive.delimiters has {token}, which must lie in [0, {vocabulary}) and not "
                    f"be the mask token {mask}; name ids such as the newline's"
                )

    def ends(self, token: Array, chance: Array, state: DiffusionState, default: Array) -> Array:
        """Return the end of each row's block; `chance` is that of each position's best `token`."""
        left = state.total - state.start
        window = jnp.floor(self.share * state.output.limits.astype(jnp.float32)).astype(jnp.int32)
        place = jnp.arange(token.shape[1])
        within = place < jnp.minimum(jnp.maximum(window, 1), left)[:, None]
        wanted = jnp.any(token[..., None] == jnp.asarray(self.delimiters), axis=-1) & within
        chance = jnp.where(wanted, chance, -1.0)
        sure = jnp.max(chance, axis=1) >= jnp.maximum(self.threshold, 0.0)
        size = jnp.where(sure, jnp.argmax(chance, axis=1) + 1, jnp.minimum(default, left))
        return state.start + size.astype(jnp.int32)
