# SPDX-License-Identifier: Apache-2.0
"""Pages of a dense cache: bounds of their keys, choice of pages, attention to the chosen ones.

A page is `page_size` consecutive slots of a dense cache with the element-wise maximum and minimum
of its keys, from which Quest (arXiv 2406.10774) bounds every score of a query inside the page.
Functions of arrays, shared by the page-wise sparse policies. Reading all bounds costs what reading
1/page_size of the cache does; of the keys and values only chosen pages are read.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import MASK_VALUE
from pallas_kernels.partials import Partial, fold
from pallas_kernels.products import score_keys
from sqzjax.attention import dense, paged
from sqzjax.attention.mask import Mask
from sqzjax.kvcache.base import Query
from sqzjax.kvcache.dense import Dense, DenseState
from sqzjax.kvcache.slots import cut
from sqzjax.typing import Array, Bool, Float, Int


class Selection(NamedTuple):
    """Pages of every row and kv head, chosen by any of the row's queries."""

    pages: Array  # B K U: page numbers, ascending; zeros from `count` on
    count: Array  # B K


def rebound(
    bounds: Float[Array, "B K P 2 H"],
    tokens: DenseState,
    first: Int[Array, "B"],
    new: int,
    *,
    page_size: int,
) -> Float[Array, "B K P 2 H"]:
    """Recompute the bounds of the pages that hold positions `first` .. `first + new - 1`.

    Overwritten keys no longer count. Rows whose `first` is the number of slots keep their bounds.
    """
    batch, heads, total, _, width = bounds.shape
    number = min(total, (new + page_size - 2) // page_size + 1)
    page = jnp.minimum(first // page_size, total - number)
    index = page[:, None] + jnp.arange(number, dtype=jnp.int32)
    keys = tokens.k
    if number < total:
        keys = cut(keys, page * page_size, number * page_size)
    keys = keys.reshape(batch, heads, number, page_size, width)
    held = index[..., None] * page_size + jnp.arange(page_size) < tokens.length[:, None, None]
    held = held[:, None, :, :, None]
    high = jnp.max(jnp.where(held, keys, -jnp.inf), axis=3)
    low = jnp.min(jnp.where(held, keys, jnp.inf), axis=3)
    # A page without a token keeps its bounds, which are finite.
    written = (first < tokens.k.shape[2])[:, None] & (index * page_size < tokens.length[:, None])
    index = jnp.where(written, index, total)
    rows = jnp.arange(batch)[:, None]
    return bounds.at[rows, :, index].set(jnp.stack([high, low], 3).swapaxes(1, 2), mode="drop")


def upper_bounds(
    bounds: Float[Array, "B K P 2 H"], q: Float[Array, "B A N H"]
) -> Float[Array, "B K A P"]:
    """Bound the (unscaled) scores of every page; the largest of a kv head's query heads.

    sum_c max(q_c high_c, q_c low_c) = max(q, 0) . high + min(q, 0) . low, one product over 2 H.
    """
    batch, heads, total = bounds.shape[:3]
    rows = fold(q.astype(bounds.dtype), heads)
    signed = jnp.concatenate([jnp.maximum(rows, 0), jnp.minimum(rows, 0)], axis=-1)
    scores = score_keys(signed, bounds.reshape(batch, heads, total, -1))
    return jnp.max(scores.reshape(batch, heads, -1, q.shape[1], total), axis=2)


def select(
    bounds: Float[Array, "B K P 2 H"],
    q: Float[Array, "B A N H"],
    asking: Bool[Array, "B A"],
    prefix: Int[Array, "B"],
    *,
    page_size: int,
    budget: int,
) -> Selection:
    """Choose among the pages of the first `prefix` tokens for the `asking` queries.

    Each query takes the first page, the newest, and those of the highest bounds until it has
    `budget` // `page_size` pages; the choices of a row's queries are united per kv head.
    """
    batch, heads, total = bounds.shape[:3]
    index = jnp.arange(total, dtype=jnp.int32)
    newest = ((prefix + page_size - 1) // page_size - 1)[:, None, None, None]
    forced = (index == 0) | (index == newest)
    scores = jnp.where(forced, jnp.inf, upper_bounds(bounds, q))
    usable = (index <= newest) & asking[:, None, :, None]
    number = min(budget // page_size, total)
    best, ids = jax.lax.top_k(jnp.where(usable, scores, -jnp.inf), number)
    ids = jnp.where(best > -jnp.inf, ids, total).reshape(batch, heads, -1)
    row, head = jnp.arange(batch)[:, None, None], jnp.arange(heads)[:, None]
    chosen = jnp.zeros((batch, heads, total), bool).at[row, head, ids].set(True, mode="drop")
    place = jnp.cumsum(chosen, axis=-1, dtype=jnp.int32)
    most = most_pages(q.shape[1], number, total)
    slot = jnp.where(chosen, place - 1, most)
    listed = jnp.zeros((batch, heads, most), jnp.int32)
    listed = listed.at[row, head, slot].set(jnp.broadcast_to(index, slot.shape), mode="drop")
    return Selection(listed, place[..., -1])


def most_pages(queries: int, number: int, total: int) -> int:
    """Return the most pages in a union of `number` a query: two of them are the same for all."""
    return min(total, number + (queries - 1) * max(number - 2, 0))


def attend_chosen(
    tokens: DenseState,
    query: Query,
    chosen: Selection,
    prefix: Int[Array, "B"],
    *,
    asking: Bool[Array, "B A"],
    page_size: int,
) -> Partial:
    """Attend the `asking` queries to all chosen pages of their row; the others see nothing."""
    return paged.attend(
        query.q,
        tokens.k,
        tokens.v,
        pages=chosen.pages,
        count=chosen.count,
        length=prefix,
        asking=asking,
        page_size=page_size,
        scale=query.scale,
    )


def attend_block(
    tokens: DenseState, query: Query, start: Int[Array, "B"], *, width: int
) -> Partial:
    """Attend to the tokens held at positions `start` .. `start + width - 1`."""
    width = min(width, tokens.k.shape[2])
    first = jnp.minimum(start, tokens.k.shape[2] - width)
    positions = first[:, None] + jnp.arange(width, dtype=jnp.int32)
    held = (positions >= start[:, None]) & (positions < tokens.length[:, None])
    return dense.attend(
        query.q,
        cut(tokens.k, first, width),
        cut(tokens.v, first, width),
        query_positions=query.positions,
        key_positions=jnp.where(held, positions, -1),
        mask=query.mask,
        scale=query.scale,
    )


def attend_prefix(
    tokens: DenseState, query: Query, prefix: Int[Array, "B"], *, asking: Bool[Array, "B T"]
) -> Partial:
    """Attend the `asking` queries to all of the first `prefix` tokens; the others see nothing."""
    last = jnp.where(asking, prefix[:, None] - 1, -1).astype(jnp.int32)
    return Dense().attend(tokens, query._replace(positions=last, mask=Mask())).partial


def only(part: Partial, asking: Bool[Array, "B T"]) -> Partial:
    """Return `part` for the `asking` queries, nothing for the others."""
    out = jnp.where(asking[..., None, None], part.out, 0.0)
    return Partial(out, jnp.where(asking[..., None], part.lse, MASK_VALUE))


def nothing(shape: tuple[int, ...]) -> Partial:
    """Return attention over no key, for queries of a shape."""
    return Partial(jnp.zeros(shape, jnp.float32), jnp.full(shape[:-1], MASK_VALUE, jnp.float32))
