# SPDX-License-Identifier: Apache-2.0
"""What a block of the Hopper kernel does with one tile of packed tokens, step by step.

`given` holds the references of the kernel by name, `plan` what is static (see `mosaic_gpu`).
"""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import MASK_VALUE
from pallas_kernels.packing import words_of
from pallas_kernels.quantized_decode_attention import gpu_elements as elements
from pallas_kernels.quantized_decode_attention import gpu_tiles as tiles
from pallas_kernels.quantized_decode_attention.form import Form
from pallas_kernels.quantized_decode_attention.gpu_operands import ONCE

_TOKENS, _WIDTH = tiles.TOKENS, tiles.WIDTH
_HALF = _WIDTH // 2
_RAISED = 2.0**12
"""Factor of float16 weights, which are at most 1: small ones keep their digits."""
_LAYOUT = plgpu.Layout.WGMMA
_PER_TOKEN, _PER_ROW = _LAYOUT.reduce(1), _LAYOUT.reduce(0)
_ACCUMULATOR = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]


@dataclass(frozen=True)
class Fixed:
    """What a block keeps in registers from start to end."""

    limits: list[Any]  # first position and number of positions that each row sees
    sums: list[Any]  # per row: what digits of zero add, then the factors of offsets
    q: Any  # transposed queries, only where keys have scales per channel or are before rotation
    order: Any  # channel of each of their rows
    group: Any  # number of the scale that serves each row of values

    @classmethod
    def of(cls, plan: Any, given, batch, head, rows) -> "Fixed":
        """Load what does not change from tile to tile of one block of the grid."""

        def load(ref, layout):
            return plgpu.load(ref, layout=layout, optimized=False)

        limits = [plgpu.layout_cast(given["bounds_smem"][i], _PER_ROW) for i in range(2)]
        sums, q, order, group = [], None, None, None
        if plan.scaled_queries:
            q = load(given["q"].at[batch, head, :, rows], _LAYOUT)
            order = load(given["order"], _PER_TOKEN)
        elif plan.rotated:
            halves = [pl.ds(half * _HALF, _HALF) for half in range(2)]
            sources = [
                [given["q"].at[batch, head, i, half, rows] for half in halves] for i in (0, 1)
            ]
            q = [[load(source, _LAYOUT) for source in pair] for pair in sources]
        elif "q_sums" in given:
            count = given["q_sums"].shape[2]
            sums = [load(given["q_sums"].at[batch, head, i, rows], _PER_ROW) for i in range(count)]
        if "value_group" in given:
            group = load(given["value_group"], _PER_TOKEN)
        return cls(limits, sums, q, order, group)


def scale_queries(plan: Any, given, fixed: Fixed, slot) -> None:
    """Write the queries times the scales, and the offsets, of each group of a block's keys."""
    form, q = plan.k, fixed.q
    excess = _excess(form, 0 if form.bits < 8 else tiles.BASE[8])

    def put(part, x):
        x = plgpu.layout_cast(x.astype(jnp.bfloat16), plgpu.Layout.WGMMA_TRANSPOSED)
        rows_of(plan, given["q_smem"], part).transpose((1, 0))[...] = x

    for group in range(plan.groups):
        scale = tiles.take(given["k.scale_smem"].at[slot, group], fixed.order, plan.interpret)
        put(group, q * lax.broadcast_in_dim(scale, q.shape, [0]))
        if plan.with_offsets:
            offset = -excess * scale
            if form.offset:
                ref = given["k.offset_smem"].at[slot, group]
                offset = offset + tiles.take(ref, fixed.order, plan.interpret)
            put(plan.groups + group, q * lax.broadcast_in_dim(offset, q.shape, [0]))
    plgpu.commit_smem()


def turn_queries(plan: Any, given, fixed: Fixed, slot) -> None:
    """Write the queries turned back by the angles of each tile's first slot."""
    for part in range(plan.tiles):
        turns = given["turns_smem"].at[slot, part]
        cos, sin = (plgpu.load(turns.at[i], layout=_PER_TOKEN, optimized=False) for i in range(2))
        for i, (x, y) in enumerate(fixed.q):
            across = [lax.broadcast_in_dim(angle, x.shape, [0]) for angle in (cos, sin)]
            for half, turned in enumerate(
                (x * across[0] + y * across[1], y * across[0] - x * across[1])
            ):
                turned = plgpu.layout_cast(
                    turned.astype(plan.key_dtype), plgpu.Layout.WGMMA_TRANSPOSED
                )
                rows = pl.ds((part * plan.key_parts + i) * plan.rows, plan.rows)
                place = given["q_smem"].at[rows, pl.ds(half * _HALF, _HALF)]
                place.transpose((1, 0))[...] = turned
    plgpu.commit_smem()


def _excess(form: Form, base: int) -> float:
    """Return how much a decoded digit exceeds its level."""
    return float(base + form.bias)


def positions(plan: Any, held, tile):
    """Return the position that each slot of a tile holds, negative where none to see."""
    slot = plgpu.broadcasted_iota(jnp.int32, (_TOKENS, plan.rows), 0, layout=_LAYOUT)
    slot += tile * _TOKENS
    position = slot + jnp.where(slot > held.newest, held.shift - plan.slots, held.shift)
    return jnp.where((slot >= held.first) & (slot < held.end), position, -1)


def visible(position, start, seen):
    """Return whether each row sees each position: one unsigned comparison checks both ends."""
    past = (position - along_rows(start, position)).astype(jnp.uint32)
    return past < along_rows(seen, position).astype(jnp.uint32)


def scores(plan: Any, given, fixed: Fixed, slot, part: int, newest):
    """Return the scores `[64, rows]` of a tile times log2(e), so that exp2 serves.

    Tokens beyond number `newest` of the tile are those of a ring that will be overwritten next.
    """
    if plan.whole_keys:
        score = _scores_of_elements(plan, given, slot, part, newest)
    else:
        digits = tiles.keys(given["k.codes_smem"].at[slot], part, plan.k.bits, plan.interpret)
        run = _scores_by_groups if plan.scaled_queries else _scores_by_tokens
        score = run(plan, given, fixed, slot, part, digits)
    if plan.softcap is None:
        return score * (plan.scale * math.log2(math.e))
    # tanh by exp2: the GPU's own approximation of tanh is good to 11 bits only.
    power = jnp.exp2(score * (2 * math.log2(math.e) * plan.scale / plan.softcap))
    cap = plan.softcap * math.log2(math.e)
    return cap - (2 * cap) / (1.0 + power)


def rows_of(plan: Any, ref, part: int, count: int = 1):
    """Return `count` of the matrices of `plan.rows` rows that lie one below the other."""
    return ref.at[pl.ds(part * plan.rows, count * plan.rows)]


def _columns_of(plan: Any, x, part: int):
    """Return the products with one of those matrices."""
    if x.shape[1] == plan.rows:
        return x
    return lax.slice(x, (0, part * plan.rows), (x.shape[0], (part + 1) * plan.rows))


def _scores_by_tokens(plan: Any, given, fixed: Fixed, slot, part: int, digits):
    """Return products with keys whose scales, if any, serve channels of one token."""
    form, total = plan.k, None
    products = _product(plan, (digits, given["q_smem"]))
    for group in range(form.groups):
        score = _columns_of(plan, products, group)
        score = score - along_rows(fixed.sums[group], score)
        factor = fixed.sums[form.groups + group]
        if form.sharing == "token":
            score = score * _along_tokens(_factor(plan, given, "k.scale", slot, part, group), score)
            if form.offset:
                offset = _factor(plan, given, "k.offset", slot, part, group)
                score = score + _along_tokens(offset, score) * along_rows(factor, score)
        else:
            score = score + along_rows(factor, score)
        total = score if total is None else total + score
    return total


def _scores_by_groups(plan: Any, given, fixed: Fixed, slot, part: int, digits):
    """Return products with keys whose scales serve one channel of a group of tokens."""
    del fixed
    form, queries = plan.k, given["q_smem"]
    if form.bits < 8:
        digits = digits - jnp.asarray(tiles.BASE[form.bits], jnp.bfloat16)
    first = part * _TOKENS // form.tokens
    pairs = [(digits, rows_of(plan, queries, first, plan.key_parts))]
    if plan.with_offsets:
        ones = plgpu.layout_cast(jnp.full((_TOKENS, _WIDTH), 1.0, jnp.bfloat16), _LAYOUT)
        pairs.append((ones, rows_of(plan, queries, plan.groups + first, plan.key_parts)))
    products = _product(plan, *pairs)
    total = _columns_of(plan, products, 0)
    for index in range(1, plan.key_parts):
        token = plgpu.broadcasted_iota(jnp.int32, total.shape, 0, layout=_LAYOUT)
        score = _columns_of(plan, products, index)
        total = jnp.where(token >= index * form.tokens, score, total)
    return total


def _scores_of_elements(plan: Any, given, slot, part: int, newest):
    """Return products with keys decoded to the numbers they stand for."""
    names = ("table", "factors", "scale", "offset", "residual", "place")
    refs = _tile_of("k", plan.k.bits, given, slot, part, names)
    if not plan.rotated:
        found = elements.keys(plan.k, refs, plan.interpret)
        return _product(plan, (found, given["q_smem"]))
    found = elements.keys(plan.k, refs | {"spins": given["spins_smem"]}, plan.interpret)
    queries = rows_of(plan, given["q_smem"], part * plan.key_parts, plan.key_parts)
    products = _product(plan, (found, queries))
    token = plgpu.broadcasted_iota(jnp.int32, (_TOKENS, plan.rows), 0, layout=_LAYOUT)
    newer, older = (_columns_of(plan, products, i) for i in range(2))
    return jnp.where(token > newest, older, newer)


def _tile_of(name: str, bits: int, given, slot, part: int, names) -> dict[str, Any]:
    """Return the references to one tile of keys or values, and to what all tiles share."""
    lines = words_of(_WIDTH, bits) * _TOKENS // given[f"{name}.codes_smem"].shape[2]
    codes = given[f"{name}.codes_smem"].at[slot, pl.ds(part * lines, lines)]
    found = {"codes": codes}
    for key in names:
        ref = given.get(f"{name}.{key}_smem")
        if ref is not None:
            found[key] = ref if f"{name}.{key}" in ONCE else ref.at[slot, part]
    return found


def store_weights(plan: Any, given, slot, part: int, weights, extra: list[Any]) -> list[Any]:
    """Write the weights of a tile, times the values' scales; return what they add besides."""
    form, found = plan.v, []
    if plan.whole_values:
        place = rows_of(plan, given["p_smem"].at[part], 0).transpose((1, 0))
        rounded = (weights * _RAISED).astype(plan.value_dtype)
        place[...] = plgpu.layout_cast(rounded, plgpu.Layout.WGMMA_TRANSPOSED)
        return found
    for group in range(form.groups):
        scaled = weights
        if form.sharing == "token":
            scale = _factor(plan, given, "v.scale", slot, part, group)
            scaled = weights * _along_tokens(scale, weights)
        rounded = scaled.astype(jnp.bfloat16)
        place = rows_of(plan, given["p_smem"].at[part], group).transpose((1, 0))
        place[...] = plgpu.layout_cast(rounded, plgpu.Layout.WGMMA_TRANSPOSED)
        excess = _excess(form, tiles.BASE[form.bits])
        added = extra[group] - excess * rounded.astype(jnp.float32)
        if form.sharing == "token" and form.offset:
            offset = _factor(plan, given, "v.offset", slot, part, group)
            added = added + weights * _along_tokens(offset, weights)
        found.append(added)
    return found


def _factor(plan: Any, given, name: str, slot, part: int, group: int):
    """Return a scale or offset of each token of a tile."""
    ref, groups = given[f"{name}_smem"].at[slot, part], given[f"{name}_smem"].shape[2] // _TOKENS
    if groups == 1:
        return plgpu.load(ref, layout=_PER_TOKEN).astype(jnp.float32)
    token = plgpu.broadcasted_iota(jnp.int32, (_TOKENS,), 0, layout=_PER_TOKEN)
    return tiles.take(ref, token * groups + group, plan.interpret)


def weigh(plan: Any, given, fixed: Fixed, slot, part: int):
    """Return the product `[H, rows]` of a tile of values and its weights."""
    form, total = plan.v, None
    if plan.whole_values:
        names = ("table", "scale", "offset", "residual", "place")
        refs = _tile_of("v", form.bits, given, slot, part, names)
        return _product(
            plan, (elements.values(form, refs, plan.interpret), given["p_smem"].at[part])
        )
    digits = tiles.values(given["v.codes_smem"].at[slot], part, form.bits, plan.interpret)
    products = _product(plan, (digits, given["p_smem"].at[part]))
    for group in range(form.groups):
        product = _columns_of(plan, products, group)
        total = product if total is None else _of_group(fixed, group, product, total)
    return total


def _of_group(fixed: Fixed, group: int, x, other):
    """Return `x` in the rows of channels that scale number `group` serves, else `other`."""
    return jnp.where(lax.broadcast_in_dim(fixed.group, x.shape, [0]) == group, x, other)


def _product(plan: Any, *pairs) -> Any:
    """Return the sum of products of a `[M, K]` in registers and b `[N, K]` in shared memory."""
    if plan.interpret is not None:
        return sum(jnp.dot(a.astype(jnp.float32), b[...].T.astype(jnp.float32)) for a, b in pairs)

    def multiply(acc):
        for a, b in pairs:
            plgpu.wgmma(acc, a, b.transpose((1, 0)))
        return acc[...]

    (a, b), *_ = pairs
    return pl.run_scoped(multiply, _ACCUMULATOR((a.shape[0], b.shape[0]), jnp.float32))


def finish(plan: Any, given, fixed: Fixed, acc, top, total, extra) -> None:
    """Normalise a block's output and leave it in shared memory."""
    added = None if extra else 0.0
    for group, x in enumerate(extra):
        x = along_rows(x.sum(axis=0), acc)
        added = x if added is None else _of_group(fixed, group, x, added)
    total = total.sum(axis=0)
    # A row that saw nothing still has its top at the mask's value, and a meaningless total.
    some = top > MASK_VALUE / 2
    total = jnp.where(some, total, 1.0)
    inverse = jnp.where(some, 1.0 / total, 0.0)
    acc = acc / _RAISED if plan.whole_values else acc
    given["lse_smem"][...] = jnp.where(some, (top + jnp.log2(total)) * math.log(2), MASK_VALUE)
    given["out_smem"][...] = (acc + added) * along_rows(inverse, acc)
    plgpu.commit_smem()


def empty(plan: Any):
    """Return the state of the online softmax before the first tile."""

    def full(shape, value, layout):
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    tile = (_TOKENS, plan.rows)
    return (
        full((_WIDTH, plan.rows), 0.0, _LAYOUT),
        full((plan.rows,), MASK_VALUE, _PER_ROW),
        full(tile, 0.0, _LAYOUT),
        [full(tile, 0.0, _LAYOUT) for _ in range(0 if plan.whole_values else plan.v.groups)],
    )


def along_rows(x, like):
    """Broadcast one value per query row over the other axis."""
    return lax.broadcast_in_dim(x, like.shape, [1])


def _along_tokens(x, like):
    """Broadcast one value per token over the query rows."""
    return lax.broadcast_in_dim(x, like.shape, [0])
