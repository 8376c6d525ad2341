# SPDX-License-Identifier: Apache-2.0
"""Decode attention to chosen pages of a cache: what Quest, LoSA and policies like them read.

A page is `page_size` consecutive slots of a cache `[B, K, S, H]`, and every sequence and kv head
has a list of its own. Pages that are not listed are not read: the kernels of `decode_attention`
fetch from the list where they would go through the cache, so nothing is gathered in between. The
tokens of the listed pages, taken one after the other, are a cache of their own, of which the first
ones are visible.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from pallas_kernels.common import check, check_integers, current_target, dispatch
from pallas_kernels.decode_attention.api import check_arrays
from pallas_kernels.paged_decode_attention.xla import paged_decode_attention_xla
from pallas_kernels.partials import Partial, fold, unfold

_ALL = np.iinfo(np.int32).max


def paged_decode_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    pages: Array,
    count: Array,
    length: Array,
    page_size: int,
    asking: Array | None = None,
    scale: float | None = None,
    backend: str = "auto",
    interpret: Any = None,
    config: Any = None,
) -> Partial:
    """Attend `q` `[B, T, N, H]` to listed pages of a cache `k`, `v` `[B, K, S, H]`.

    Page p is the slots `p * page_size .. (p + 1) * page_size - 1`, which hold the tokens of these
    positions. `pages` int32 `[B, K, U]` lists them in ascending order, none twice; from `count`
    int32 `[B, K]` on, entries may be any page that holds finite numbers: they may be fetched. Of
    the listed pages the tokens at positions below `length` int32 `[B]` are visible, to every query
    that `asking` bool `[B, T]` marks (default: all); the others get zeros and the mask's
    log-sum-exp. Scores are scaled (default 1/sqrt(H)).
    `backend`, `interpret` and `config` are those of `decode_attention`.
    Raises ValueError for bad shapes or dtypes, pages beyond S, or a backend that cannot run.
    """
    check_arrays(q, k, v)
    _check_pages(k, pages, count, length, page_size)
    batch, rows = q.shape[:2]
    asking = jnp.ones((batch, rows), bool) if asking is None else asking
    shape, rule = jnp.shape(asking), f"must be {(batch, rows)}"
    check("asking.shape", shape, shape == (batch, rows), rule)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    # Ascending pages: what is not visible of the listed tokens comes last.
    pages, length = jnp.asarray(pages, jnp.int32), jnp.asarray(length, jnp.int32)
    listed = jnp.arange(pages.shape[2]) < count[..., None]
    tokens = jnp.clip(length[:, None, None] - pages * page_size, 0, page_size)
    held = jnp.sum(jnp.where(listed, tokens, 0), axis=-1).astype(jnp.int32)
    limits = jnp.tile(jnp.where(asking, _ALL, 0), (1, q.shape[2] // k.shape[1]))
    arrays = (fold(q, k.shape[1]), k, v, held, pages, limits)
    target = current_target()

    fixed = {"page_size": page_size, "scale": scale}
    kernel = {**fixed, "target": target, "config": config, "interpret": interpret}

    def gpu():
        from pallas_kernels.paged_decode_attention import mosaic_gpu

        return mosaic_gpu.paged_decode_attention_mosaic_gpu(*arrays, **kernel)

    def tpu():
        from pallas_kernels.paged_decode_attention import mosaic_tpu

        return mosaic_tpu.paged_decode_attention_mosaic_tpu(*arrays, **kernel)

    def xla():
        return paged_decode_attention_xla(*arrays, **fixed)

    out, lse = dispatch(
        "paged_decode_attention",
        {"mosaic_gpu": gpu, "mosaic_tpu": tpu, "xla": xla},
        backend=backend,
        target=target,
        interpret=interpret,
        config=config,
    )
    return Partial(unfold(out, rows), unfold(lse, rows))


def _check_pages(k: Array, pages: Array, count: Array, length: Array, page_size: int) -> None:
    batch, heads, slots = k.shape[:3]
    even = page_size >= 1 and slots % page_size == 0
    check("page_size", page_size, even, f"must be >= 1 and divide the {slots} slots of the cache")
    shape = np.shape(pages)
    good = len(shape) == 3 and shape[:2] == (batch, heads) and shape[2] >= 1
    check("pages.shape", shape, good, f"must be [B={batch}, K={heads}, U], U >= 1")
    check_integers("pages", pages, shape)
    check_integers("count", count, (batch, heads))
    check_integers("length", length, (batch,))
    if not isinstance(pages, Tracer):
        total, found = slots // page_size, np.asarray(pages)
        inside = found.min() >= 0 and found.max() < total
        rule = f"must lie in [0, {total}), the pages of the cache; pad lists with 0"
        check("pages", (int(found.min()), int(found.max())), inside, rule)
        if not isinstance(count, Tracer):
            listed = np.arange(1, found.shape[2]) < np.asarray(count)[..., None]
            rising = bool(np.all((np.diff(found.astype(np.int64)) > 0) | ~listed))
            check("pages", found, rising, "must ascend, none twice, up to their count; sort them")
