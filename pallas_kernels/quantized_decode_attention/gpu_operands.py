# SPDX-License-Identifier: Apache-2.0
"""The arrays that the Hopper kernel over packed tokens reads, made of those of the caller.

None of them is a copy of a cache: its codes and what lies beside them are reshaped only.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels.common import round_up
from pallas_kernels.qtensor import QTensor
from pallas_kernels.quantized_decode_attention import gpu_elements as elements
from pallas_kernels.quantized_decode_attention import gpu_lookup as lookup
from pallas_kernels.quantized_decode_attention import gpu_tiles as tiles
from pallas_kernels.quantized_decode_attention.form import Form, group_masks
from pallas_kernels.quantized_decode_attention.gpu_plan import Plan
from pallas_kernels.rotary import Rotary, cos_sin, turn

_TOKENS, _WIDTH = tiles.TOKENS, tiles.WIDTH
_HALF = _WIDTH // 2
_LINE = 64
"""Words of a row of codes as TMA sees them: tokens follow each other without a gap."""
ONCE = ("k.table", "k.factors", "v.table", "spins")
"""Arrays that a block loads once."""
_ALIGNED = 128
_CACHED = ("codes", "scale", "offset", "residual", "place")
_MOST = 3e4
"""Queries beyond it would leave float16 when they are rotated; their scores mean nothing anyway."""


def queries(plan: Plan, q: Array, k: QTensor) -> dict[str, Array]:
    """Return the queries in the order of the keys, and what they add to scores."""
    if plan.whole_keys:
        q = jnp.clip(q, -_MOST, _MOST)[..., lookup.key_order(k.bits)]
        return {"q": q.astype(jnp.float16)[:, :, None]}
    form, order = plan.k, tiles.key_order(k.bits)
    exact = q.astype(jnp.float32)
    if plan.scaled_queries:
        turned = jnp.swapaxes(exact[..., order], 2, 3)
        return {"q": turned, "order": jnp.asarray(order, jnp.int32)}
    columns, masks = [], group_masks(form)
    if form.sharing == "static":
        q = (exact * k.scale.astype(jnp.float32)).astype(q.dtype)
        offset = 0.0 if k.offset is None else k.offset.astype(jnp.float32)
        columns = [jnp.sum(exact * offset, axis=-1)]
    else:
        columns = [jnp.sum(exact * mask, axis=-1) for mask in masks]
    parts = jnp.stack([q * mask.astype(q.dtype) for mask in masks], axis=2)
    excess = tiles.BASE[form.bits] + form.bias
    added = excess * jnp.sum(parts.astype(jnp.float32), axis=-1)
    sums = jnp.concatenate([added, jnp.stack(columns, axis=2)], axis=2)
    return {"q": parts[..., order], "q_sums": sums}


def rotated_queries(
    plan: Plan, q: Array, length: Array, positions: Array, rotary: Rotary
) -> dict[str, Array]:
    """Return what turns queries to meet each tile of keys stored before rotation.

    `q` float32 `[B, K, 2, H, R]`, turned to slot 0 as the newest tokens and as the oldest ones of a
    ring see it; `turns` `[tiles, 2, H/2]`, cos and sin of each tile's first slot; `spins`, the
    angles within a tile. All are exact at any position.
    """
    order = lookup.key_order(plan.k.bits)
    # As `_Slots` has it: the newest slot, and what is added to it to give its position.
    newest = lax.rem(length - 1, plan.slots)
    past = positions - (length - 1 - newest)[:, None]
    exact = jnp.clip(q.astype(jnp.float32), -_MOST, _MOST)
    seen = [cos_sin(rotary, past + back) for back in (0, plan.slots)]
    turned = jnp.stack([turn(exact, cos[:, None], sin[:, None]) for cos, sin in seen], axis=2)
    # Kept from becoming constants of the program, megabytes for a long cache.
    first = lax.optimization_barrier(jnp.arange(0, plan.slots, _TOKENS))
    turns = jnp.stack(cos_sin(Rotary(rotary.inverse), first), axis=1)[..., order[:_HALF]]
    return {
        "q": jnp.swapaxes(turned[..., order], 3, 4),
        "turns": turns,
        "spins": elements.spins(rotary, plan.k.bits),
    }


def fixed(plan: Plan, k: QTensor, v: QTensor) -> dict[str, Array]:
    """Return what belongs to all tokens of keys and of values."""
    found: dict[str, Array] = {}
    if plan.whole_keys:
        found["k.table"] = elements.table_words(k)
        if plan.k.sharing == "static":
            found["k.factors"] = elements.key_factors(k)
    if plan.whole_values:
        found["v.table"] = elements.table_words(v)
    if plan.value_parts > 1:
        # The number of the scale that serves each row of `tiles.values`.
        group = tiles.value_order(v.bits) // (_WIDTH // plan.v.groups)
        found["value_group"] = jnp.asarray(group, jnp.int32)
    return found


def cache(name: str, tensor: QTensor, form: Form) -> dict[str, Array]:
    """Return a tensor's arrays as lines of words, scales and exact entries, all without a copy."""
    batch, heads = tensor.codes.shape[:2]
    found = {"codes": tensor.codes.reshape(batch, heads, -1, _LINE)}
    widths = {}
    if form.sharing != "static":
        width = _WIDTH if form.sharing == "channel" else _TOKENS * form.groups
        widths = {"scale": width, "offset": width}
    widths |= {"residual": _TOKENS * form.slots, "place": _TOKENS * form.slots}
    for key, width in widths.items():
        array = getattr(tensor, key)
        if array is not None:
            found[key] = array.reshape(batch, heads, -1, width)
    return {f"{name}.{key}": array for key, array in found.items()}


def in_ring(name: str) -> bool:
    """Return whether an array is loaded piece by piece, with each block of slots."""
    return name == "turns" or name.split(".")[-1] in _CACHED


def lines_of_block(plan: Plan, name: str, array: Array) -> int:
    """Return how many lines of an array belong to a block of slots."""
    lines = array.shape[0] if name == "turns" else array.shape[2]
    return lines * plan.config.block_kv // plan.slots


def ring_shape(plan: Plan, name: str, array: Array) -> tuple[int, ...]:
    """Return the shape of what holds the lines of each step in flight.

    TMA writes to multiples of 128 bytes only: short lines are followed by unused ones.
    """
    rest = array.shape[1:] if name == "turns" else array.shape[3:]
    lines, size = lines_of_block(plan, name, array), math.prod(rest) * array.dtype.itemsize
    return (plan.config.stages, round_up(lines, math.lcm(size, _ALIGNED) // size), *rest)


def of_head(name: str, ref: Any, batch: Any, head: Any) -> Any:
    """Return the part of an array of `ONCE` that a head of a sequence needs."""
    return ref.at[batch, head] if name == "k.factors" else ref


def channels(plan: Plan) -> np.ndarray:
    """Return the channel of each row of the kernel's output."""
    order = lookup.value_order if plan.whole_values else tiles.value_order
    return order(plan.v.bits)
