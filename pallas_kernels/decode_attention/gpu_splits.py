# SPDX-License-Identifier: Apache-2.0
"""Splits of a cache among blocks of a Hopper GPU's grid: the slots of each, and the joined parts.

A plan has the fields `config` (with `block_kv` and `splits`), `slots` and `rows`.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import MASK_VALUE

LAYOUT = plgpu.Layout.WGMMA


@dataclass(frozen=True)
class Slots:
    """What the slots of one sequence hold; scalars of the kernel."""

    plan: Any
    newest: Any  # slot of the newest token
    shift: Any  # its position minus its slot
    first: Any  # of the slots to visit, first and end
    end: Any

    @classmethod
    def of(cls, plan: Any, length, first, end) -> "Slots":
        newest = lax.rem(length - 1, plan.slots)
        return cls(plan, newest, length - 1 - newest, first, jnp.minimum(end, plan.slots))

    def share(self, split):
        """Return (first tile, number of tiles) of a split: the span's tiles dealt out evenly."""
        config = self.plan.config
        first = lax.div(self.first, config.block_kv)
        end = lax.div(self.end + (config.block_kv - 1), config.block_kv)
        tiles = jnp.where(self.end > self.first, end - first, 0)
        each = lax.div(tiles + (config.splits - 1), config.splits)
        return first + split * each, jnp.clip(tiles - split * each, 0, each)

    def positions(self, block):
        """Return the position that each slot of a tile holds, negative where none to see."""
        plan = self.plan
        shape = (plan.config.block_kv, plan.rows)
        slot = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=LAYOUT)
        slot += block * plan.config.block_kv
        position = slot + jnp.where(slot > self.newest, self.shift - plan.slots, self.shift)
        return jnp.where((slot >= self.first) & (slot < self.end), position, -1)


def merge_splits(out: Array, lse: Array) -> tuple[Array, Array]:
    """Join the splits: O^T `[B, K, splits, H, R]`, lse `[B, K, splits, R]` -> `[B, K, R, H]`."""
    if out.shape[2] == 1:
        return out[:, :, 0].swapaxes(-1, -2), lse[:, :, 0]
    top = jnp.max(lse, axis=2)
    weights = jnp.where(lse > MASK_VALUE, jnp.exp(lse - top[:, :, None]), 0.0)
    total = jnp.sum(weights, axis=2)
    safe = jnp.where(total > 0, total, 1.0)
    # A sum, not a product of matrices: it fuses with the transposition.
    merged = jnp.sum(out * (weights / safe[:, :, None])[:, :, :, None], axis=2)
    return merged.swapaxes(-1, -2), jnp.where(total > 0, top + jnp.log(safe), MASK_VALUE)
