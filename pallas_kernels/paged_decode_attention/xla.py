# SPDX-License-Identifier: Apache-2.0
"""Attention to chosen pages through XLA: the reference of the kernels, and the path of CPUs.

Pages are gathered some at a time, as often as the fullest list needs.
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.common import MASK_VALUE, round_up
from pallas_kernels.partials import Partial, from_scores, merge
from pallas_kernels.products import score_keys

CHUNK = 1024
"""Tokens that are gathered at a time: they stay in a core's second-level cache."""


def paged_decode_attention_xla(
    q: Array,
    k: Array,
    v: Array,
    held: Array,
    pages: Array,
    limits: Array,
    *,
    page_size: int,
    scale: float,
) -> Partial:
    """Attend folded rows `q` `[B, K, R, H]` to the first `held` `[B, K]` tokens of the pages.

    Row r sees tokens up to `limits` `[B, R]` of them.
    """
    batch, heads, slots, width = k.shape
    step = min(pages.shape[2], max(1, CHUNK // page_size))
    padding = round_up(pages.shape[2], step) - pages.shape[2]
    listed = jnp.pad(pages, ((0, 0), (0, 0), (0, padding)))
    take = jax.vmap(jax.vmap(lambda paged, ids: paged[ids]))
    limits = jnp.minimum(held[..., None], limits[:, None])[..., None]

    def gather(buffer, ids):
        paged = buffer.reshape(batch, heads, slots // page_size, page_size, width)
        return take(paged, ids).reshape(batch, heads, -1, width)

    def chunk(number):
        ids = jax.lax.dynamic_slice_in_dim(listed, number * step, step, axis=2)
        seen = (number * step * page_size + jnp.arange(step * page_size)) < limits
        scores = score_keys(q, gather(k, ids)) * scale
        return Partial(*from_scores(scores, seen, gather(v, ids)))

    if listed.shape[2] == step:
        return chunk(0)
    nothing = Partial(jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], MASK_VALUE))
    size = step * page_size
    chunks = (jnp.max(held) + size - 1) // size
    return jax.lax.fori_loop(0, chunks, lambda i, part: merge(part, chunk(i)), nothing)
