# SPDX-License-Identifier: Apache-2.0
"""Decode attention: a few query rows per sequence over the cache that all of them share.

One row decodes autoregressively, gamma + 1 rows (or a tree of them) verify a draft, a whole block
denoises a diffusion model. The cost is reading the keys and values once. Which keys a row sees is
a range of positions, `[start, limit)`, plus the first `sinks`: that covers causal, block-causal
and bidirectional masks, sliding windows, attention sinks, ragged lengths and padding rows alike.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from pallas_kernels.common import Target, check, check_integers, current_target, dispatch, tuned
from pallas_kernels.decode_attention.xla import decode_attention_xla
from pallas_kernels.partials import Partial, fold, from_scores, merge, unfold
from pallas_kernels.products import score_keys

MAX_QUERIES = 64
_FLOATS = ("float32", "bfloat16", "float16")


def decode_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    length: Array,
    limits: Array | None = None,
    starts: Array | None = None,
    window: int | None = None,
    tail_mask: Array | None = None,
    sinks: int = 0,
    scale: float | None = None,
    softcap: float | None = None,
    ring: bool = False,
    backend: str = "auto",
    interpret: Any = None,
    config: Any = None,
) -> Partial:
    """Attend `q` `[B, T, N, H]` to a cache `k`, `v` `[B, K, S, H]`; N a multiple of K.

    `length` int32 `[B]`: tokens written so far, the queries being the last T of them; the token of
    position p lies in slot p modulo S. With `ring`, lengths may exceed S. Row t sees the positions
    in `[starts, limits)`, int32 `[B, T]`; the default is causal. `window` W sets
    `starts = limits - W`. The first `sinks` positions are seen regardless of `starts`.
    `tail_mask` bool `[T, T]` or `[B, T, T]` replaces `limits`: row t sees all positions before the
    last T, and of those the ones that its row marks (a draft tree).
    Scores are scaled (default 1/sqrt(H)), then capped to `softcap * tanh(scores / softcap)`.
    `backend` names one of `common.BACKENDS`; `interpret` runs a named kernel on CPU; `config` are
    the tile sizes of the named backend, None = tuned or derived.
    Raises ValueError for bad shapes, dtypes, lengths beyond S, or a backend that cannot run.
    """
    check_arrays(q, k, v)
    _check_length(q, k, length, ring)
    _check_rows(q, limits, starts, window, tail_mask, sinks, softcap)
    batch, rows = q.shape[:2]
    length = jnp.asarray(length, jnp.int32)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    positions = length[:, None] - rows + jnp.arange(rows, dtype=jnp.int32)
    if limits is None:
        limits = positions + 1
    limits = jnp.maximum(jnp.broadcast_to(limits, (batch, rows)), 0).astype(jnp.int32)
    if starts is None:
        starts = jnp.zeros_like(limits) if window is None else limits - window
    starts = jnp.maximum(jnp.broadcast_to(starts, (batch, rows)), 0).astype(jnp.int32)
    context = limits
    if tail_mask is not None:
        context = jnp.broadcast_to(jnp.maximum(length - rows, 0)[:, None], (batch, rows))
    out, lse = decode_attention_rows(
        fold(q, k.shape[1]),
        k,
        v,
        length,
        starts,
        context,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        backend=backend,
        target=current_target(),
        interpret=interpret,
        config=config,
    )
    part = Partial(unfold(out, rows), unfold(lse, rows))
    if tail_mask is None:
        return part
    tail_mask = jnp.broadcast_to(tail_mask, (batch, rows, rows))
    seen = tail_mask & (positions >= 0)[:, None, :]
    late = positions[:, None, :] >= starts[..., None]
    seen &= late | (positions < sinks)[:, None, :]
    return merge(part, _attend_tail(q, k, v, positions, seen, scale, softcap))


def decode_attention_rows(
    q: Array,
    k: Array,
    v: Array,
    length: Array,
    starts: Array,
    limits: Array,
    *,
    scale: float,
    softcap: float | None,
    sinks: int,
    backend: str,
    target: Target,
    interpret: Any = None,
    config: Any = None,
) -> tuple[Array, Array]:
    """Dispatch folded rows `q` `[B, K, R, H]` with `starts`, `limits` `[B, T]`, R = G * T."""
    group = q.shape[2] // limits.shape[1]
    span = slot_span(length, starts, limits, sinks, k.shape[2])
    starts, limits = jnp.tile(starts, (1, group)), jnp.tile(limits, (1, group))
    arrays = (q, k, v, length, span, starts, limits)
    fixed = {"scale": scale, "softcap": softcap, "sinks": sinks}
    sizes = None if config else tuned("decode_attention", tuning_key(q, k), target)

    def gpu():
        from pallas_kernels.decode_attention import mosaic_gpu

        tiles = mosaic_gpu.Config(**sizes) if sizes else config
        return mosaic_gpu.decode_attention_mosaic_gpu(
            *arrays, **fixed, target=target, config=tiles, interpret=interpret
        )

    def tpu():
        from pallas_kernels.decode_attention import mosaic_tpu

        tiles = mosaic_tpu.Config(**sizes) if sizes else config
        return mosaic_tpu.decode_attention_mosaic_tpu(
            *arrays, **fixed, target=target, config=tiles, interpret=interpret
        )

    def xla():
        return decode_attention_xla(*arrays, **fixed)

    return dispatch(
        "decode_attention",
        {"mosaic_gpu": gpu, "mosaic_tpu": tpu, "xla": xla},
        backend=backend,
        target=target,
        interpret=interpret,
        config=config,
    )


def tuning_key(q: Array, k: Array) -> str:
    """Return the key of the tuning table: folded rows, heads and slots up to a power of two."""
    heads, slots = (1 << (n - 1).bit_length() for n in (q.shape[0] * q.shape[1], k.shape[2]))
    return f"heads{heads}-slots{slots}-rows{q.shape[2]}-width{q.shape[3]}-{q.dtype}"


def slot_span(length: Array, starts: Array, limits: Array, sinks: int, slots: int) -> Array:
    """Return the slots `[B, 2]` (first, end) outside which no row of a sequence sees a key."""
    end = jnp.minimum(jnp.max(limits, axis=1), length)
    first = jnp.min(jnp.where(limits > 0, starts, length[:, None]), axis=1)
    first = jnp.zeros_like(end) if sinks else jnp.minimum(first, end)
    wrapped = length > slots
    first, end = jnp.where(wrapped, 0, first), jnp.where(wrapped & (end > 0), slots, end)
    return jnp.stack([first, jnp.minimum(end, slots)], axis=1).astype(jnp.int32)


def _attend_tail(q, k, v, positions, seen, scale, softcap) -> Partial:
    """Attend to the last T tokens under an arbitrary mask `[B, T, T]`; a few KB, left to XLA."""
    slots = jnp.maximum(positions, 0) % k.shape[2]
    take = jax.vmap(lambda cache, index: cache[:, index])
    scores = score_keys(fold(q, k.shape[1]), take(k, slots)) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    seen = jnp.tile(seen, (1, q.shape[2] // k.shape[1], 1))[:, None]
    parts = from_scores(scores, seen, take(v, slots))
    return Partial(*(unfold(x, q.shape[1]) for x in parts))


def check_arrays(q: Array, k: Array, v: Array) -> None:
    """Raise ValueError unless queries go with the cache and both are of a type that is served."""
    check("q.shape", q.shape, len(q.shape) == 4, "must be [B, T, N, H]")
    check("k.shape", k.shape, len(k.shape) == 4, "must be [B, K, S, H]")
    check("v.shape", v.shape, v.shape == k.shape, f"must equal k.shape={k.shape}")
    check("k.shape", k.shape, min(k.shape) > 0, "must not have an empty axis")
    batch, _, heads, width = q.shape
    fits = k.shape[0] == batch and k.shape[3] == width
    check("k.shape", k.shape, fits, f"must be [B={batch}, K, S, H={width}] to go with q")
    even = heads % k.shape[1] == 0
    check("q.shape", q.shape, even, f"must have a multiple of K={k.shape[1]} query heads")
    names = {str(x.dtype) for x in (q, k, v)}
    rule = f"must be one dtype of {', '.join(_FLOATS)}; cast q to the cache's"
    check("dtypes", names, len(names) == 1 and names <= set(_FLOATS), rule)


def _check_length(q: Array, k: Array, length: Array, ring: bool) -> None:
    batch, rows = q.shape[:2]
    check("q.shape", q.shape, 1 <= rows <= MAX_QUERIES, f"must have 1 to {MAX_QUERIES} rows T")
    check_integers("length", length, (batch,))
    if not ring and not isinstance(length, Tracer):
        longest = int(np.max(length, initial=0))
        rule = f"must be <= S={k.shape[2]}; allocate a larger cache or pass ring=True"
        check("length", longest, longest <= k.shape[2], rule)


def _check_rows(q, limits, starts, window, tail_mask, sinks, softcap) -> None:
    batch, rows = q.shape[:2]
    for name, value in (("limits", limits), ("starts", starts)):
        if value is not None:
            check_integers(name, value, (batch, rows))
    if window is not None:
        check("window", window, starts is None, "cannot go with starts; give one of them")
        check("window", window, window >= 1, "must be >= 1")
    if tail_mask is not None:
        shape, good = jnp.shape(tail_mask), ((rows, rows), (batch, rows, rows))
        check("tail_mask.shape", shape, shape in good, f"must be one of {good}")
        check("tail_mask", "given", limits is None, "cannot go with limits; give one of them")
    check("sinks", sinks, sinks >= 0, "must be >= 0")
    check("softcap", softcap, softcap is None or softcap > 0, "must be > 0, or None for none")
