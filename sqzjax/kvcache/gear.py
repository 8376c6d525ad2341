# SPDX-License-Identifier: Apache-2.0
"""GEAR: few bits, a low-rank correction of their error, and exact extremes (arXiv 2403.05527).

Blocks of `group_size` tokens are coded as codes + A B^T + a few exact numbers: what quantization
leaves over is coherent, so that a rank of four catches much of it, and the extremes of a vector no
longer stretch its scale. Pick it at 2 bits for long generation, where small errors add up. Nothing
is fitted; coding a block takes a few products and is done as the block fills. A, B and the extremes
are applied to queries and weights: the correction is never rebuilt.

Average bits of a key at 2 bits, blocks of 64 tokens, rank 4, one extreme on either side, H = 128:
2 + 0.5 (scales) + 0.5 (A) + 1 (B) + 0.75 (extremes) = 4.75; of a value 4.38.

Different from the published code: all blocks have the same rank, those of a prompt too; extremes
and whole-vector value groups are per kv head; every pass of the power iteration is orthonormal; the
number of extremes follows from the length of the vector they are taken from; an exact number makes
up for codes and correction together.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.partials import fold
from pallas_kernels.products import score_keys, weigh_values
from pallas_kernels.streamed import Tile
from sqzjax.attention.partial import Partial
from sqzjax.checks import check_count
from sqzjax.kvcache import tiles
from sqzjax.kvcache.base import AttentionSpec, NewTokens, Query
from sqzjax.kvcache.coded import CodedCache, CodedState
from sqzjax.numerics import half
from sqzjax.quant import QTensor, Uniform, dequantize
from sqzjax.typing import Array, Float, Int, PyTree

_TINY = 1e-6
"""A column that loses all but this share of its length depends on those before it."""


class Coded(NamedTuple):
    """Keys or values of n blocks of g tokens, S = n g."""

    base: QTensor  # B K S H
    a: Array  # B K S r, float16
    b: Array  # B K nH r, float16: H rows per block
    exact: Array | None  # extremes of keys, float16: B K nH E; those of values lie in `base`
    place: Array | None  # their tokens within the block


@dataclass(frozen=True, kw_only=True)
class GEAR(CodedCache):
    """Code blocks of `group_size` tokens with a correction of rank `rank`.

    `backbone` "kivi" codes values in groups of `group_size` channels (2 bits), "kcvt" whole vectors
    (4 bits); keys are coded per channel of a block by both. `sparsity` is the share of numbers kept
    exactly, half of them at either end of a vector, at least one; 0 is GEAR-L.
    """

    kind: Literal["gear"] = "gear"
    bits: int = 2
    backbone: Literal["kivi", "kcvt"] = "kivi"
    group_size: int = 64
    rank: int = 4
    sparsity: float = 0.02
    loops: int = 3
    residual_length: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "loops"):
            check_count(name, getattr(self, name), 1)
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity} must lie in [0, 1), the share kept exactly")
        self.quantizers(self.group_size)

    def quantizers(self, width: int) -> tuple[Uniform, Uniform]:
        """Return the quantizers of keys and values of `width` channels."""
        whole = self.backbone == "kcvt" or width <= self.group_size
        return (
            Uniform(bits=self.bits, axis="channel", group_size=self.group_size),
            Uniform(bits=self.bits, axis="token", group_size=0 if whole else self.group_size),
        )

    def group(self, spec: AttentionSpec) -> int:
        width = spec.head_dim
        for quantizer in self.quantizers(width):
            quantizer.check(width)
        most = min(self.group_size, width)
        if self.rank > most:
            raise ValueError(
                f"rank={self.rank} must be at most {most}, the lesser of group_size="
                f"{self.group_size} and the {width} channels of a head"
            )
        for size in (self.group_size, width):
            if 2 * extremes_of(size, self.sparsity) > size:
                raise ValueError(
                    f"sparsity={self.sparsity} keeps more than the {size} numbers of a vector; "
                    "use less, or 0 for none"
                )
        return self.group_size

    def keep(self, new: NewTokens) -> PyTree:
        return {"k": jnp.moveaxis(new.k, 2, 1), "v": jnp.moveaxis(new.v, 2, 1)}

    def encode(self, kept: PyTree, fitted: PyTree) -> PyTree:
        quantizers = dict(zip("kv", self.quantizers(kept["k"].shape[-1])))
        x = {name: kept[name].astype(jnp.float32) for name in quantizers}
        where = {name: self._extremes(x[name], name) for name in x}
        clipped = {name: self._replaced(x[name], where[name], name) for name in x}
        base = {name: by.encode(clipped[name]) for name, by in quantizers.items()}
        left = [_blocked(clipped[name] - dequantize(base[name]), self.group_size) for name in "kv"]
        factored = factors(jnp.stack(left), self.rank, self.loops)
        a, b = (half(y) for y in factored)
        shape = x["k"].shape[:2]
        rows = [y.reshape(2, *shape, -1, self.rank) for y in (a, b)]
        coded = {
            name: Coded(base[name], rows[0][at], rows[1][at], None, None)
            for at, name in enumerate("kv")
        }
        if not self.sparsity:
            return coded
        return {name: self._with_exact(coded[name], x[name], where[name], name) for name in x}

    def _vectors(self, x: Array, name: str) -> Array:
        """Return what extremes are taken from: keys per channel of a block, values per token."""
        return _blocked(x, self.group_size).swapaxes(-1, -2) if name == "k" else x

    def _extremes(self, x: Array, name: str) -> Array:
        vectors = self._vectors(x, name)
        return extremes(vectors, extremes_of(vectors.shape[-1], self.sparsity))

    def _replaced(self, x: Array, where: Array, name: str) -> Array:
        """Return `x` with the mean of a vector in place of its extremes."""
        if not self.sparsity:
            return x
        vectors = self._vectors(x, name)
        hit = jnp.any(where[..., None] == jnp.arange(vectors.shape[-1]), axis=-2)
        vectors = jnp.where(hit, jnp.mean(vectors, axis=-1, keepdims=True), vectors)
        return (vectors.swapaxes(-1, -2) if name == "k" else vectors).reshape(x.shape)

    def _with_exact(self, coded: Coded, x: Array, where: Array, name: str) -> Coded:
        """Return `coded` with what its extremes still miss."""
        missing = self._vectors(x - restore(coded, self.group_size), name)
        small = missing.shape[-1] <= 256
        missing = half(jnp.take_along_axis(missing, where, axis=-1))
        where = where.astype(jnp.uint8 if small else jnp.uint16)
        if name == "v":
            return coded._replace(base=replace(coded.base, residual=missing, place=where))
        rows = (*x.shape[:2], -1, where.shape[-1])
        return coded._replace(exact=missing.reshape(rows), place=where.reshape(rows))

    def decode(self, codes: PyTree, kept: PyTree) -> PyTree:
        return {name: restore(part, self.group_size) for name, part in codes.items()}

    def attend_body(self, state: CodedState, query: Query, starts: Array, limits: Array) -> Partial:
        kv_heads, block = state.body["k"].a.shape[1], tiles.tile_size(state)
        q = fold(query.q, kv_heads).astype(jnp.float32)

        def read(start: Any) -> Tile:
            def part(name: str) -> Coded:
                return _tile(state.body[name], start, block, state.slots)

            return Tile(
                lambda: score_tile(q, part("k"), self.group_size),
                lambda weights: weigh_tile(weights, part("v"), self.group_size),
            )

        return tiles.attend(
            read,
            query,
            held=state.coded,
            slots=state.slots,
            block=block,
            kv_heads=kv_heads,
            width=q.shape[-1],
            starts=starts,
            limits=limits,
        )

    def exact(self, kept: PyTree, query: Query, positions: Array) -> tuple[Array, Array]:
        return kept["k"], kept["v"]


def extremes_of(size: int, sparsity: float) -> int:
    """Return how many of the `size` numbers of a vector are kept exactly at either end."""
    return max(1, round(sparsity * size / 2)) if sparsity else 0


def extremes(x: Float[Array, "... n"], count: int) -> Int[Array, "... e"]:
    """Return the places of the `count` least and the `count` greatest numbers of each vector."""
    order = jnp.argsort(x, axis=-1, stable=True)
    return jnp.concatenate([order[..., :count], order[..., x.shape[-1] - count :]], axis=-1)


def factors(
    x: Float[Array, "... g H"], rank: int, loops: int
) -> tuple[Float[Array, "... g r"], Float[Array, "... H r"]]:
    """Return A, with orthonormal columns, and B whose A B^T is nearly the best of its rank.

    `loops` passes of the power iteration for many small matrices at once. A B^T is the projection
    of `x` on the columns of A: its error is never larger than `x`.
    """
    start = jax.random.normal(jax.random.key(0), (x.shape[-1], rank))
    start = jnp.broadcast_to(start, (*x.shape[:-2], *start.shape))

    def again(_, b):
        return _across(x, orthonormal(_along(x, orthonormal(b))))

    b = jax.lax.fori_loop(1, loops, again, start)
    a = orthonormal(_along(x, orthonormal(b)))
    return a, _across(x, a)


def _along(x: Array, b: Array) -> Array:
    return jnp.einsum("...gh,...hr->...gr", x, b)


def _across(x: Array, a: Array) -> Array:
    return jnp.einsum("...gh,...gr->...hr", x, a)


def orthonormal(x: Float[Array, "... n r"]) -> Float[Array, "... n r"]:
    """Return an orthonormal basis of the columns, zeros for those that depend on others.

    Gram-Schmidt, each column twice: for a few columns of many matrices, where a QR decomposition
    would be called matrix by matrix.
    """

    def add(column, basis):
        rest = x[..., column]
        size = jnp.linalg.norm(rest, axis=-1, keepdims=True)
        for _ in range(2):  # the columns from here on are zero
            along = jnp.einsum("...nr,...n->...r", basis, rest)
            rest = rest - jnp.einsum("...nr,...r->...n", basis, along)
        left = jnp.linalg.norm(rest, axis=-1, keepdims=True)
        free = left > _TINY * size
        rest = jnp.where(free, rest / jnp.where(free, left, 1.0), 0.0)
        return basis.at[..., column].set(rest)

    return jax.lax.fori_loop(0, x.shape[-1], add, jnp.zeros_like(x))


def restore(coded: Coded, group: int) -> Float[Array, "B K S H"]:
    """Return the elements of a few blocks."""
    a, b = _factors_of(coded, group)
    low = jnp.einsum("bkngr,bknhr->bkngh", a, b)
    return _elements(coded, group) + low.reshape(*coded.a.shape[:3], -1)


def score_tile(q: Float[Array, "B K R H"], coded: Coded, group: int) -> Float[Array, "B K R S"]:
    """Return the products of queries with the keys of a tile, the correction as (q B) A^T."""
    a, b = _factors_of(coded, group)
    low = jnp.einsum("bkqh,bknhr->bkqnr", q, b)
    low = jnp.einsum("bkqnr,bkngr->bkqng", low, a)
    return score_keys(q, _elements(coded, group)) + low.reshape(*q.shape[:3], -1)


def weigh_tile(
    weights: Float[Array, "B K R S"], coded: Coded, group: int
) -> Float[Array, "B K R H"]:
    """Return the sums of a tile's values by weights, the correction as (p A) B^T."""
    a, b = _factors_of(coded, group)
    blocks = weights.reshape(*weights.shape[:3], -1, group)
    low = jnp.einsum("bkqng,bkngr->bkqnr", blocks, a)
    low = jnp.einsum("bkqnr,bknhr->bkqh", low, b)
    return weigh_values(weights, _elements(coded, group)) + low


def _elements(coded: Coded, group: int) -> Array:
    """Return codes and exact numbers `[B, K, S, H]` of a tile, without the correction."""
    x = dequantize(coded.base)
    if coded.exact is None or coded.place is None:
        return x
    extra = jnp.zeros((), jnp.float32)
    for slot in range(coded.exact.shape[-1]):
        here = coded.place[..., slot, None].astype(jnp.int32) == jnp.arange(group)
        extra = extra + jnp.where(here, coded.exact[..., slot, None].astype(jnp.float32), 0.0)
    extra = extra.reshape(*x.shape[:2], -1, x.shape[-1], group).swapaxes(-1, -2)
    return x + extra.reshape(x.shape)


def _factors_of(coded: Coded, group: int) -> tuple[Array, Array]:
    """Return A `[B, K, n, g, r]` and B `[B, K, n, H, r]` in float32."""
    width = coded.base.width
    a, b = coded.a.astype(jnp.float32), coded.b.astype(jnp.float32)
    return _blocked(a, group), _blocked(b, width)


def _blocked(x: Array, size: int) -> Array:
    """Return `[B, K, S, ...]` as `[B, K, S / size, size, ...]`."""
    return x.reshape(*x.shape[:2], -1, size, *x.shape[3:])


def _tile(coded: Coded, start: Any, count: int, slots: int) -> Coded:
    """Return `count` slots from `start` on, both whole blocks."""

    def rows(leaf: Array) -> Array:
        each = leaf.shape[2]
        return jax.lax.dynamic_slice_in_dim(
            leaf, start * each // slots, count * each // slots, axis=2
        )

    base = tiles.cut(coded.base, start, count, slots)
    return Coded(base, *jax.tree.map(rows, tuple(coded[1:])))
