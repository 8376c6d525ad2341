# SPDX-License-Identifier: Apache-2.0
"""Scores of one chunk of packed keys inside the TPU kernel, a function for each form of scales."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.common import MASK_VALUE
from pallas_kernels.quantized_decode_attention import tpu_tiles as tiles
from pallas_kernels.quantized_decode_attention.form import (
    Form,
    digit_order,
    floats,
    zero_level,
)

LANES = tiles.LANES


class Held(NamedTuple):
    """What the slots of a chunk hold."""

    position: Array  # [1, chunk], below zero where there is nothing to see
    wrapped: Array  # [1, chunk]: behind the newest slot of a ring, S positions back
    inside: Array  # [1, chunk]: within the span

    @classmethod
    def of(cls, fixed: Any, first_slot, length, begin, end) -> "Held":
        newest = length - 1
        turn = lax.rem(newest + fixed.slots, fixed.slots)  # Slot of the newest token.
        slot = lax.broadcasted_iota(jnp.int32, (1, fixed.config.chunk), 1) + first_slot
        wrapped = slot > turn
        position = slot + (newest - turn)
        position = jnp.where(wrapped, position - fixed.slots, position)
        inside = (slot >= begin) & (slot < end)
        return cls(jnp.where(inside, position, -1), wrapped, inside)


def masked_scores(fixed: Any, part: dict[str, Any], key: dict[str, Any], held: Held) -> Array:
    """Return the masked float32 scores `[rows, chunk]`."""
    q, form = part["q"], fixed.k
    rows = part["bounds"].shape[0]
    if fixed.key_values:
        keys = tiles.values(form, key)
        if fixed.rotary:
            keys = _turned(keys, part["cos"], part["sin"])
        scores = tiles.dot(q, keys.astype(q.dtype), contract=(1, 0))
        if fixed.rotary:
            scores = jnp.where(held.wrapped, scores[rows:], scores[:rows])
    elif form.sharing == "channel":
        scores = _scores_by_groups(fixed, part, key)
    else:
        scores = _scores_by_tokens(form, part, key, rows)
    scores = scores * fixed.scale
    if fixed.softcap is not None:
        scores = fixed.softcap * jnp.tanh(scores / fixed.softcap)
    starts, limits = part["bounds"][:, 0:1], part["bounds"][:, 1:2]
    position = held.position
    seen = (position >= 0) & (position < limits) & (position >= starts)
    return jnp.where(seen, scores, MASK_VALUE)


def _turned(keys: Array, cos: Array, sin: Array) -> Array:
    half = keys.shape[0] // 2
    first, second = keys[:half], keys[half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=0)


def _scores_by_tokens(form: Form, part, key, rows: int) -> Array:
    """Return scores of digits whose scales, if any, serve channels of one token."""
    q, sums = part["q"], part["q_sums"]
    products = tiles.dot(q, tiles.digits(key["codes"], form, q.dtype), contract=(1, 0))
    total = None
    for group in range(form.groups):
        # Less what the digits' base and the codes' bias have added.
        score = products[group * rows : (group + 1) * rows] - sums[:, group : group + 1]
        if form.sharing == "token":
            score = score * floats(key["scale"][group : group + 1])
            if form.offset:
                column = sums[:, form.groups + group : form.groups + group + 1]
                score = score + column * floats(key["offset"][group : group + 1])
        elif form.offset:
            score = score + sums[:, 1:2]
        total = score if total is None else total + score
    assert total is not None
    return total


def _scores_by_groups(fixed: Any, part, key) -> Array:
    """Return scores of digits whose scales serve one channel of a group of tokens.

    The queries times the scales of each group are multiplied with the tokens of a whole tile, of
    which the group's own are taken.
    """
    form, q = fixed.k, part["q"]
    rows, width = q.shape
    scales = floats(key["scale"])
    groups = scales.shape[0]
    exact = q.astype(jnp.float32)[None]
    scaled = (exact * scales[:, None]).astype(q.dtype)
    spread = tiles.dot(scaled.reshape(groups * rows, width), part["q_order"], contract=(1, 0))
    # What the digits' base adds is summed over the very factors of the products, weights and all.
    zero = zero_level(form, q.dtype) * width / digit_order(width, form.bits)[1].sum()
    added = jnp.sum(spread, axis=1, keepdims=True) * float(zero)
    if form.offset:
        offsets = jnp.sum(exact * floats(key["offset"])[:, None], axis=2, keepdims=True)
        added = added - offsets.reshape(groups * rows, 1)
    spread = spread.astype(q.dtype)
    digits = tiles.digits(key["codes"], form, q.dtype)
    tile = max(LANES, form.tokens)
    each = tile // form.tokens
    lane = lax.div(lax.broadcasted_iota(jnp.int32, (rows, tile), 1), form.tokens)
    parts = []
    for i in range(fixed.config.chunk // tile):
        own = slice(i * each * rows, (i + 1) * each * rows)
        products = tiles.dot(spread[own], digits[:, i * tile : (i + 1) * tile], contract=(1, 0))
        products = products - added[own]
        score = products[:rows]
        for group in range(1, each):
            score = jnp.where(lane == group, products[group * rows : (group + 1) * rows], score)
        parts.append(score)
    return jnp.concatenate(parts, axis=1)
