# SPDX-License-Identifier: Apache-2.0
"""Packed tokens of any form as the numbers they stand for, float16, operands of wgmma.

For what `gpu_tiles` cannot leave as digits: codes that a table interprets, exact entries, keys
before rotation. `gpu_lookup` is what runs on a GPU; here are the arrays that it reads, in the order
in which threads do, and the same in jnp for interpretation.

Keys are turned from the first slot of their tile to their own: these angles are the same for all
tiles (`spins`), and the queries are turned to meet the tile.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.packing import unpack, words_of
from pallas_kernels.qtensor import QTensor, stretch
from pallas_kernels.quantized_decode_attention import gpu_lookup as lookup
from pallas_kernels.quantized_decode_attention import gpu_tiles as tiles
from pallas_kernels.quantized_decode_attention.form import Form
from pallas_kernels.rotary import Rotary, cos_sin

BITS = (2, 3, 4)
"""Widths of codes that are looked up."""
MOST_SLOTS = 4
"""Exact entries of a token that are worth comparing every channel with."""
_TOKENS, _WIDTH = tiles.TOKENS, tiles.WIDTH
_HALF = _WIDTH // 2


def table_words(tensor: QTensor) -> Array:
    """Return the levels of a tensor's codes as uint32 `[8]`: low bytes, then high bytes.

    `[2**bits]` float16 numbers, four bytes to a word; levels of uniform codes are made up.
    """
    count = 1 << tensor.bits
    levels = jnp.arange(count) - tensor.bias if tensor.table is None else tensor.table.reshape(-1)
    patterns = levels.astype(jnp.float16).view(jnp.uint16).astype(jnp.uint32)
    split = jnp.stack([patterns & 0xFF, patterns >> 8]).reshape(-1, 4)
    words = jnp.sum(split << np.arange(0, 32, 8, dtype=np.uint32), axis=1, dtype=jnp.uint32)
    return jnp.pad(words, (0, 8 - words.size))


def key_factors(tensor: QTensor) -> Array:
    """Return scales and offsets of channels, float16 `[B, K, 256]`, as threads read them."""
    batch, heads = tensor.codes.shape[:2]
    shape = (batch, heads, _WIDTH)
    zero = jnp.zeros((), jnp.float16)
    scale, offset = (
        jnp.broadcast_to(x.astype(jnp.float16).reshape(*x.shape[:2], -1), shape)
        for x in (tensor.scale, zero.reshape(1, 1, 1) if tensor.offset is None else tensor.offset)
    )
    both = jnp.stack([scale, offset], axis=2)[..., lookup.key_order(tensor.bits)]
    both = both.reshape(batch, heads, 2, 2, 8, 4, 2)  # factor, half, place, lane % 4, of the pair
    return both.transpose(0, 1, 4, 5, 3, 2, 6).reshape(batch, heads, -1)


def spins(rotary: Rotary, bits: int) -> Array:
    """Return cos and sin of the slots of a tile, float16 `[64, 128]`, as threads read them."""
    both = jnp.stack(cos_sin(rotary, jnp.arange(_TOKENS)))[..., lookup.key_order(bits)[:_HALF]]
    both = both.astype(jnp.float16).reshape(2, _TOKENS, 4, 2, 4, 2)  # place: which load, of it
    return both.transpose(2, 1, 4, 3, 0, 5).reshape(_TOKENS, _WIDTH)


def keys(form: Form, refs: dict[str, Any], interpret: Any):
    """Return tokens `[64, 128]` of a tile, float16, channels in the order of `key_order`.

    `refs` are the tile's arrays in shared memory: `codes` and `table`; `factors` of channels or
    `scale` and `offset` of tokens; `residual` and `place`; `spins` where keys must be rotated.
    """
    if interpret:
        return _plain_keys(form, refs)

    def run(_, *given):
        return lookup.keys(form, dict(zip(refs, given, strict=True)))

    return _inline(run, refs, (_TOKENS, _WIDTH))


def values(form: Form, refs: dict[str, Any], interpret: Any):
    """Return channels `[128, 64]` of a tile, float16, in the order of `value_order`.

    `refs` as for `keys`, with `scale` and `offset` of tokens.
    """
    if interpret:
        x = _plain_tokens(form, refs)
        return lookup.in_value_order(x, form.bits).T.astype(jnp.float16)

    def run(_, *given):
        return lookup.values(form, dict(zip(refs, given, strict=True)))

    return _inline(run, refs, (_WIDTH, _TOKENS))


def _inline(run, refs: dict[str, Any], shape: tuple[int, int]):
    result = plgpu.ShapeDtypeStruct(shape, jnp.dtype(jnp.float16), layout=plgpu.Layout.WGMMA)
    kinds = tuple(plgpu.RefType() for _ in refs)
    return plgpu.inline_mgpu(arg_types=kinds, return_type=result)(run)(*refs.values())


def _plain_keys(form: Form, refs: dict[str, Any]):
    """Return what `keys` should, for interpretation."""
    x = lookup.in_key_order(_plain_tokens(form, refs), form.bits)
    if "factors" in refs:
        both = refs["factors"][...].astype(jnp.float32).reshape(8, 4, 2, 2, 2)
        scale, offset = both.transpose(3, 2, 0, 1, 4).reshape(2, _WIDTH)
        exact = lookup.in_key_order(_plain_slots(form, refs), form.bits)
        x = x * scale + offset + exact
    if "spins" not in refs:
        return x.astype(jnp.float16)
    both = refs["spins"][...].astype(jnp.float32).reshape(4, _TOKENS, 4, 2, 2, 2)
    cos, sin = both.transpose(4, 1, 0, 3, 2, 5).reshape(2, _TOKENS, _HALF)
    first, second = x[:, :_HALF], x[:, _HALF:]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=1).astype(jnp.float16)


def _plain_tokens(form: Form, refs: dict[str, Any]):
    """Return the float32 elements of tokens, or their levels where `factors` are given."""
    words = refs["codes"][...].reshape(-1, words_of(_WIDTH, form.bits))
    half = 1 << (form.bits - 2)
    table = refs["table"][...][: 2 * half].reshape(2, half, 1)
    table = table >> 8 * lax.broadcasted_iota(jnp.uint32, (1, 1, 4), 2) & 0xFF
    low, high = table.reshape(2, -1)
    levels = (low | high << 8).astype(jnp.uint16).view(jnp.float16).astype(jnp.float32)
    x = levels[unpack(words, form.bits, _WIDTH)]
    if "factors" in refs:
        return x
    scale, offset = (
        stretch(refs[name][...].astype(jnp.float32).reshape(_TOKENS, -1), _TOKENS, _WIDTH)
        if name in refs
        else 0.0
        for name in ("scale", "offset")
    )
    return x * scale + offset + _plain_slots(form, refs)


def _plain_slots(form: Form, refs: dict[str, Any]):
    """Return the residuals of tokens at their places, zero elsewhere."""
    total, channel = jnp.zeros((_TOKENS, _WIDTH), jnp.float32), jnp.arange(_WIDTH)
    for slot in range(form.slots):
        place, residual = (
            refs[name][...].reshape(_TOKENS, -1)[:, slot, None] for name in ("place", "residual")
        )
        total += jnp.where(place == channel, residual.astype(jnp.float32), 0)
    return total
