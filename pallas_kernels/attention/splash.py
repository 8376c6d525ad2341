# SPDX-License-Identifier: Apache-2.0
"""JAX's splash attention for TPUs: every mask by index, windows, segments, grouped heads, softcap.

Blocks of keys that a block of queries cannot see are never fetched; the mask is computed inside
the kernel. It serves self-attention (T = S, a multiple of 128), where no row but those of the first
block under "earlier_blocks" can be empty.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.attention import library
from pallas_kernels.attention.mask import AttentionMask
from pallas_kernels.common import MASK_VALUE, Target

_NAME = "splash"


@dataclass(frozen=True)
class Config:
    """Sizes of the tiles, multiples of 128 that divide the length."""

    block_q: int
    block_kv: int


def default_config(length: int) -> Config:
    """Return the largest tiles up to 512: longer ones waste work at the edge of a causal mask."""
    size = next(size for size in (512, 256, 128) if length % size == 0)
    return Config(size, size)


def attention_splash(
    q: Array,
    k: Array,
    v: Array,
    segments,
    problem,
    *,
    target: Target,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """Return (out, log-sum-exp); raises NotImplementedError for what the kernel cannot do."""
    if target.platform != "tpu" and not interpret:
        raise NotImplementedError(f"{_NAME}: needs a TPU, not a {target.platform}")
    library.check_problem(_NAME, problem)
    mesh = jax.sharding.get_abstract_mesh()
    if any(mesh.shape[axis] > 1 for axis in mesh.auto_axes):
        raise NotImplementedError(f"{_NAME}: call it inside jax.shard_map over a mesh")
    length = q.shape[1]
    if length != k.shape[2] or length % 128:
        raise NotImplementedError(f"{_NAME}: T={length}, S={k.shape[2]} must be equal, 128 i")
    if segments is not None and segments[0] is not segments[1]:
        raise NotImplementedError(f"{_NAME}: needs the same segments for queries and keys")
    mask = problem.mask
    if segments is not None and mask.kind == "earlier_blocks":
        raise NotImplementedError(f"{_NAME}: no kind='earlier_blocks' with segments")
    run = partial(
        _run,
        mask=mask,
        config=config or default_config(length),
        scale=problem.scale,
        softcap=problem.softcap,
        interpret=interpret,
    )
    ids = None if segments is None else jnp.asarray(segments[0], jnp.int32)
    return library.with_backward(run, q, k, v, None if ids is None else (ids, ids), problem)


def _run(q, k, v, segments, differentiable, *, mask, config, scale, softcap, interpret):
    """Return (out, log-sum-exp); differentiable in the output alone, if at all."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    length, heads = q.shape[1:3]

    def kernel(save_residuals: bool) -> Callable[..., Any]:
        made = splash.make_splash_mha(
            _multi_head(mask, length, heads),
            block_sizes=_block_sizes(config),
            attn_logits_soft_cap=softcap,
            mask_value=MASK_VALUE,
            save_residuals=save_residuals,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        return jax.vmap(made)

    arrays = [(jnp.swapaxes(q, 1, 2).astype(jnp.float32) * scale).astype(q.dtype), k, v]
    if segments is not None:
        arrays.append(splash.SegmentIds(*segments))
    # The kernel that returns the log-sum-exp has no derivative. Where one is wanted both are
    # called, and XLA drops the one whose result nobody uses.
    out, (lse,) = kernel(True)(*jax.tree.map(jax.lax.stop_gradient, arrays))
    if differentiable:
        out = kernel(False)(*arrays)
    out = jnp.swapaxes(out, 1, 2).astype(jnp.float32)
    lse = jnp.swapaxes(lse, 1, 2)
    empty = jnp.asarray(_empty_rows(mask, length))[None, :, None]
    if segments is not None:
        empty = empty | (segments[0] < 0)[..., None]
    return jnp.where(empty[..., None], 0.0, out), jnp.where(empty, MASK_VALUE, lse)


def _block_sizes(config: Config) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    q, kv = config.block_q, config.block_kv
    return splash.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_q_dq=q,
        block_kv_dq=kv,
    )


@functools.lru_cache(maxsize=32)
def _multi_head(mask: AttentionMask, length: int, heads: int) -> Any:
    """Return the kernel's mask object; cached, as the kernel is compiled anew for a new one."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (length, length)
    if mask.kind == "bidirectional" and mask.window is None:
        return masks.MultiHeadMask([masks.FullMask(shape)] * heads)

    class SpanMask(masks._ComputableMask):
        """A range of keys for each query, computed in the kernel from the query's index."""

        def __eq__(self, other: object) -> bool:
            return self is other

        def __hash__(self) -> int:
            return hash((mask, length))

    return masks.MultiHeadMask([SpanMask(shape, _span_function(mask))] * heads)


def _span_function(mask: AttentionMask) -> Callable[[Any, Any], Any]:
    """Return the rule on indices; `AttentionMask.span`, with a key for rows that would see none."""

    def seen(query, key):
        size, window = mask.block_size, mask.window
        if mask.kind == "causal":
            rule = key <= query
        elif mask.kind == "bidirectional":
            rule = key <= query + (window - 1)
        elif mask.kind == "earlier_blocks":
            # A row without keys would divide by zero; `_run` empties it afterwards.
            rule = (key < query // size * size) | ((key == query) & (query < size))
        else:
            rule = key < (query // size + 1) * size
            if mask.kind == "same_block":
                rule &= key >= query // size * size
        if window is not None:
            near = key > query - window
            rule &= near if mask.kind == "causal" else near & (key < query + window)
        return rule

    return seen


def _empty_rows(mask: AttentionMask, length: int) -> np.ndarray:
    starts, limits = mask.span(np.arange(length, dtype=np.int32), np)
    return starts >= limits
