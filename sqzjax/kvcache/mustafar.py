# SPDX-License-Identifier: Apache-2.0
"""Mustafar: prune small numbers of keys and values, keep the rest with a bitmap (2505.22913).

Every vector of a token and head keeps its largest magnitudes, a fixed number, in the order of their
channels, and one bit per channel says where they belong. No calibration, no change of precision,
and it composes with nothing to be undone; pick it where 16-bit numbers must stay. A step expands a
tile at a time. Bytes per vector of H channels: `2 (H - floor(s H)) + H / 8`; 37 % at s = 0.7 and
H = 128. The published format pads variable counts to eight and adds offsets (45 to 47 %).
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import UInt32

from pallas_kernels.packing import pack, unpack
from pallas_kernels.partials import fold
from pallas_kernels.products import score_keys, weigh_values
from pallas_kernels.streamed import Tile
from sqzjax.attention.partial import Partial
from sqzjax.checks import check_count
from sqzjax.kvcache import tiles
from sqzjax.kvcache.base import AttentionSpec, NewTokens, Query
from sqzjax.kvcache.coded import CodedCache, CodedState
from sqzjax.typing import Array, Float, PyTree


@dataclass(frozen=True, kw_only=True)
class Mustafar(CodedCache):
    """Keep `H - floor(sparsity * H)` numbers of each key and value, after rotation.

    The newest `residual_length` tokens stay dense; older ones are pruned `group_size` at a time
    (the paper: 32 and 256).
    """

    kind: Literal["mustafar"] = "mustafar"
    key_sparsity: float = 0.5
    value_sparsity: float = 0.5
    residual_length: int = 32
    group_size: int = 32
    sinks: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("key", self.key_sparsity), ("value", self.value_sparsity)):
            if not 0 <= value < 1:
                raise ValueError(
                    f"{name}_sparsity={value} must lie in [0, 1), the share of zeros; 0.5 and 0.7 "
                    "are usual"
                )
        check_count("group_size", self.group_size, 1, "32 is usual")

    def group(self, spec: AttentionSpec) -> int:
        return self.group_size

    def keep(self, new: NewTokens) -> PyTree:
        return {"k": jnp.moveaxis(new.k, 2, 1), "v": jnp.moveaxis(new.v, 2, 1)}

    def encode(self, kept: PyTree, fitted: PyTree) -> PyTree:
        width = kept["k"].shape[-1]
        return {
            "k": compress(kept["k"], kept_of(width, self.key_sparsity)),
            "v": compress(kept["v"], kept_of(width, self.value_sparsity)),
        }

    def decode(self, codes: PyTree, kept: PyTree) -> PyTree:
        return {name: expand(**codes[name], width=x.shape[-1]) for name, x in kept.items()}

    def attend_body(self, state: CodedState, query: Query, starts: Array, limits: Array) -> Partial:
        width = query.q.shape[-1]
        kv_heads, block = state.body["k"]["values"].shape[1], tiles.tile_size(state)
        q = fold(query.q, kv_heads)

        def rows(name: str, start: Any) -> Array:
            leaves = jax.tree.map(
                lambda x: tiles.cut(x, start, block, state.slots), state.body[name]
            )
            return expand(**leaves, width=width).astype(query.q.dtype)

        def read(start: Any) -> Tile:
            return Tile(
                lambda: score_keys(q, rows("k", start)),
                lambda weights: weigh_values(weights.astype(q.dtype), rows("v", start)),
            )

        return tiles.attend(
            read,
            query,
            held=state.coded,
            slots=state.slots,
            block=block,
            kv_heads=kv_heads,
            width=width,
            starts=starts,
            limits=limits,
        )

    def exact(self, kept: PyTree, query: Query, positions: Array) -> tuple[Array, Array]:
        return kept["k"], kept["v"]


def kept_of(width: int, sparsity: float) -> int:
    """Return how many of `width` numbers stay."""
    return width - int(sparsity * width)


def compress(x: Float[Array, "... H"], count: int) -> dict[str, Array]:
    """Return the `count` largest magnitudes of each vector and the bitmap of their channels.

    `values` `[..., count]` are in the order of their channels, `bitmap` uint32 `[..., H / 32]`
    (rounded up) is packed as `pallas_kernels.packing` does. Of equal magnitudes the first stay.
    """
    place = jnp.sort(jax.lax.top_k(jnp.abs(x), count)[1], axis=-1)
    bits = jnp.any(place[..., None] == jnp.arange(x.shape[-1]), axis=-2)
    values = jnp.take_along_axis(x, place, axis=-1)
    return {"values": values, "bitmap": pack(bits.astype(jnp.uint32), 1)}


def expand(
    values: Float[Array, "... E"], bitmap: UInt32[Array, "... W"], width: int
) -> Float[Array, "... H"]:
    """Return the vectors of `width` channels that `compress` was given, zeros where pruned."""
    bits = unpack(bitmap, 1, width)
    rank = jnp.cumsum(bits, axis=-1) - bits
    found = jnp.take_along_axis(values, jnp.minimum(rank, values.shape[-1] - 1), axis=-1)
    return jnp.where(bits == 1, found, 0)
