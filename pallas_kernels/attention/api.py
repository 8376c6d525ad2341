# SPDX-License-Identifier: Apache-2.0
"""Attention of many queries: prefill and training.

What a query sees is a range of positions and, in packed rows, its own document. The result carries
its log-sum-exp, so that attention over disjoint sets of keys merges into attention over their
union; both are differentiable. Memory is linear in the number of queries and keys. For some tens
of queries over a cache, `decode_attention` reads less.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels.attention.mask import AttentionMask
from pallas_kernels.attention.xla import attention_xla, default_config, visibility
from pallas_kernels.common import check, check_integers, current_target, dispatch
from pallas_kernels.partials import Partial, merge

_FLOATS = ("float32", "bfloat16", "float16")


class Problem(NamedTuple):
    """What a library kernel needs to know, beyond the arrays, to say whether it can serve."""

    mask: AttentionMask
    in_order: bool  # positions are 0, 1, ... on both sides
    scale: float
    softcap: float | None


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: AttentionMask = AttentionMask(),
    query_positions: Any = None,
    key_positions: Any = None,
    query_segments: Any = None,
    key_segments: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Partial:
    """Attend `q` `[B, T, N, H]` to `k`, `v` `[B, K, S, H]`; N a multiple of K, one dtype.

    Positions, int32 `[B, T]` and `[B, S]`, default to 0, 1, ...; a negative one is padding, which
    sees and shows nothing. Only positions left at their default let the library kernels serve,
    which go by index. Segments (documents) of the same shapes come both or not at all: only equal
    ones see each other, negative ones are padding.
    Scores are scaled (default 1/sqrt(H)), then capped to `softcap * tanh(scores / softcap)`.
    `backend`: "cudnn" (GPU, 16-bit), "splash" (TPU), "xla", or "auto" for the first that can run.
    Raises ValueError for bad shapes, dtypes or values, or a backend that cannot run.
    """
    _check_arrays(q, k, v, softcap)
    batch, length, slots = q.shape[0], q.shape[1], k.shape[2]
    _check_rows(query_positions, query_segments, "query", (batch, length))
    _check_rows(key_positions, key_segments, "key", (batch, slots))
    both = (query_segments is None) == (key_segments is None)
    check("segments", "one side", both, "must be given for queries and keys, or for neither")
    in_order = query_positions is None and key_positions is None
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    problem = Problem(mask, in_order, scale, softcap)
    segments = None if query_segments is None else (query_segments, key_segments)

    def cudnn():
        from pallas_kernels.attention.cudnn import attention_cudnn

        return attention_cudnn(q, k, v, segments, problem, target=target)

    def splash():
        from pallas_kernels.attention.splash import attention_splash

        return attention_splash(q, k, v, segments, problem, target=target)

    def xla():
        visible = visibility(mask, query_positions, key_positions, segments, (length, slots))
        config = default_config(q, k, mask, target)
        return attention_xla(q, k, v, visible, scale=scale, softcap=softcap, config=config)

    target = current_target()
    named = {"cudnn": cudnn, "splash": splash, "xla": xla}
    return Partial(*dispatch("attention", named, backend=backend, target=target))


def noisy_clean_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    block_size: int,
    positions: Any = None,
    segments: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Partial:
    """Attend over the two copies of a text that train block diffusion (BD3-LM, arXiv 2503.09573).

    Arrays hold the noisy copy, then the clean one: 2L tokens. A noisy token sees its own noisy
    block and the clean blocks before it, a clean token the clean blocks up to its own. `positions`
    and `segments`, `[B, L]`, serve both copies; otherwise as `attention`. The four quarters of the
    2L x 2L mask are three calls, merged by log-sum-exp; the empty one costs nothing.
    """
    _check_arrays(q, k, v, softcap)
    both = q.shape[1] == k.shape[2] and q.shape[1] % 2 == 0
    check("q.shape", q.shape, both, f"must have as many tokens as keys, an even number; {k.shape=}")
    half = q.shape[1] // 2

    def part(kind, queries, keys):
        mask = AttentionMask(kind, block_size)
        same = {"query_positions": positions, "key_positions": positions}
        same |= {"query_segments": segments, "key_segments": segments}
        k_part, v_part = k[:, :, keys], v[:, :, keys]
        fixed = {"scale": scale, "softcap": softcap, "backend": backend}
        return attention(q[:, queries], k_part, v_part, mask=mask, **same, **fixed)

    noisy, clean = slice(None, half), slice(half, None)
    first = merge(part("same_block", noisy, noisy), part("earlier_blocks", noisy, clean))
    second = part("block_causal", clean, clean)
    return Partial(*(jnp.concatenate(halves, axis=1) for halves in zip(first, second)))


def _check_arrays(q, k, v, softcap) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check(f"{name}.shape", x.shape, x.ndim == 4, "must have 4 axes: B T N H or B K S H")
        check(f"{name}.shape", x.shape, min(x.shape) > 0, "must not have an empty axis")
    check("v.shape", v.shape, v.shape == k.shape, f"must equal k.shape={k.shape}")
    batch, _, heads, width = q.shape
    fits = k.shape[0] == batch and k.shape[3] == width
    check("k.shape", k.shape, fits, f"must be [B={batch}, K, S, H={width}] to go with q")
    even = heads % k.shape[1] == 0
    check("q.shape", q.shape, even, f"must have a multiple of K={k.shape[1]} query heads")
    names = {str(x.dtype) for x in (q, k, v)}
    rule = f"must be one dtype of {', '.join(_FLOATS)}; cast q to that of the keys"
    check("dtypes", names, len(names) == 1 and names <= set(_FLOATS), rule)
    check("softcap", softcap, softcap is None or softcap > 0, "must be > 0, or None for none")


def _check_rows(positions, segments, side: str, shape: tuple[int, int]) -> None:
    for name, value in (("positions", positions), ("segments", segments)):
        if value is not None:
            check_integers(f"{side}_{name}", value, shape)
