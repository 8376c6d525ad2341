# SPDX-License-Identifier: Apache-2.0
"""Decode attention for TPU: an online softmax over blocks of the cache, one query tile at a time.

A block is a run of slots or, where a list of pages is given, some of the pages.

The grid is (sequence, kv head, row tile, block of slots). The lengths and spans are read by the
scalar core, so that blocks outside a sequence's span are never fetched, and the grid is only as
long as the longest span of the batch, whatever the capacity. Softmax state stays in VMEM.

Cost: each visible block of keys and values is read once per tile of up to 256 query rows. On chips
with two cores the sequences and kv heads are shared between them; nothing is split along the cache.
Give the cache a capacity that is a multiple of 128 (of 8 where head_dim is a multiple of 128): XLA
stores other shapes in an order that it has to copy for a kernel at every call.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import MASK_VALUE, Target, check, round_up
from pallas_kernels.varying import float32_output

LANES = 128
MAX_BLOCK_ROWS = 256
STEP_BYTES = 1 << 20
"""Keys and values fetched per grid step: about 1.3 us of a v5e, 0.4 us of a v5p."""
PAGES = 16
"""Most listed pages of a grid step, each with two buffers for its keys and two for its values."""
SCORE_BYTES = 1 << 21
"""Float32 scores of one step; with the buffers of both steps in flight this stays under 8 MiB."""
NEVER = np.iinfo(np.int32).max
"""Position given to keys that no row may see."""


@dataclass(frozen=True)
class Config:
    """Tile sizes: slots of the cache and folded query rows per grid step."""

    block_kv: int
    block_rows: int

    def __post_init__(self) -> None:
        rule = f"must be a positive multiple of {LANES}; use 1024"
        check("block_kv", self.block_kv, self.block_kv > 0 and self.block_kv % LANES == 0, rule)
        rule = "must be a positive multiple of 16; use 256"
        check(
            "block_rows", self.block_rows, self.block_rows > 0 and self.block_rows % 16 == 0, rule
        )


def default_config(rows: int, slots: int, head_dim: int, itemsize: int) -> Config:
    """Return sizes that keep a step's transfer near `STEP_BYTES` and its scores in budget.

    A block that divides the capacity is preferred: it needs no masking of the values' tail.
    """
    tiles = -(-rows // MAX_BLOCK_ROWS)
    block_rows = round_up(-(-rows // tiles), 16)
    widest = STEP_BYTES // (2 * round_up(head_dim, LANES) * itemsize)
    widest = min(widest, SCORE_BYTES // (4 * block_rows), round_up(slots, LANES))
    widest = max(widest // LANES, 1)
    even = [n for n in range(widest, (widest - 1) // 4, -1) if slots % (n * LANES) == 0]
    return Config(LANES * (even[0] if even else widest), block_rows)


class Fixed(NamedTuple):
    """What is known when the kernel is traced."""

    slots: int
    block_kv: int
    slots_last: bool
    sinks: int
    scale: float
    softcap: float | None
    page: int = 0
    """Slots of a listed page; 0 where blocks of the cache are visited one after the other."""
    lists: tuple[int, int] = (1, 1)
    """Kv heads, and pages of each one's list."""

    @property
    def parts(self) -> int:
        """Return how many pieces of the cache make a block."""
        return self.block_kv // self.page if self.page else 1

    def row(self, b, h):
        """Return where the scalars of a sequence, or of its kv head, are."""
        return b * self.lists[0] + h if self.page else b


def decode_attention_mosaic_tpu(
    q: Array,
    k: Array,
    v: Array,
    length: Array,
    span: Array,
    starts: Array,
    limits: Array,
    *,
    scale: float,
    softcap: float | None,
    sinks: int,
    target: Target,
    config: Config | None = None,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """Return (out, log-sum-exp); the arguments are those of `api.decode_attention_rows`.

    `starts` and `limits` are per folded row, `[B, R]`. float16 is not supported: TPUs have no
    float16 products.
    """
    del target  # Every generation compiles the same program.
    config = sizes(q, k, config)
    # A block larger than the cache is not allowed; one that equals it may have any size.
    block_kv = min(config.block_kv, k.shape[2])
    fixed = Fixed(k.shape[2], block_kv, slots_last(k), sinks, scale, softcap)
    scalars = (length, span[:, 0], span[:, 1])
    return launch(fixed, config, scalars, q, k, v, starts, limits, interpret)


def sizes(q: Array, k: Array, config: Config | None) -> Config:
    """Return the sizes to take; refuse what TPUs cannot do."""
    rows, head_dim = q.shape[2:]
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"mosaic_tpu: has no products of {q.dtype}, only bf16 and f32")
    if head_dim % 8:
        raise NotImplementedError(f"mosaic_tpu: head_dim={head_dim} is not a multiple of 8")
    return config or default_config(rows, k.shape[2], head_dim, k.dtype.itemsize)


def slots_last(k: Array) -> bool:
    """Whether XLA stores [S, H] with the slots last: the axis that fills 128 lanes."""
    return k.shape[3] % LANES != 0 and k.shape[2] % LANES == 0


def launch(
    fixed: Fixed,
    config: Config,
    scalars: tuple[Array, ...],
    q: Array,
    k: Array,
    v: Array,
    starts: Array,
    limits: Array,
    interpret: Any,
) -> tuple[Array, Array]:
    """Run the kernel on folded rows.

    `scalars`: the tokens held and the first and end of the slots to visit, of each sequence; or,
    with a list of pages, of each sequence and kv head, and the list.
    """
    rows = q.shape[2]
    block_rows = min(config.block_rows, round_up(rows, 16))
    if fixed.slots_last:  # as XLA stores them, so that this is no copy
        k, v = jnp.swapaxes(k, 2, 3), jnp.swapaxes(v, 2, 3)
    missing = -rows % block_rows
    q = jnp.pad(q, ((0, 0), (0, 0), (0, missing), (0, 0)))
    # Padded rows see nothing: their limit is 0.
    bounds = jnp.pad(jnp.stack([starts, limits], axis=-1), ((0, 0), (0, missing), (0, 0)))
    first, last = _first_and_last(scalars[1], scalars[2], fixed.block_kv)
    arrays = (*scalars, q, bounds, *[k] * fixed.parts, *[v] * fixed.parts)
    out, lse = pl.pallas_call(
        functools.partial(_kernel, fixed),
        grid_spec=_grid_spec(fixed, q.shape, block_rows, jnp.max(last - first) + 1),
        out_shape=(
            float32_output(q.shape, *arrays),
            float32_output((*q.shape[:3], LANES), *arrays),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        interpret=interpret or False,
        name="decode_attention",
    )(*arrays)
    return out[:, :, :rows], lse[:, :, :rows, 0]


def _first_and_last(begin, end, block_kv: int):
    """Return the first and last block of slots of a span; equal if it is empty."""
    first = lax.div(begin, block_kv)
    return first, jnp.maximum(lax.div(end + (block_kv - 1), block_kv) - 1, first)


def _grid_spec(fixed: Fixed, shape: tuple[int, ...], block_rows: int, steps: Array):
    """Return grid, blocks and scratch; `steps` is traced, the longest span in blocks."""
    batch, heads, rows, head_dim = shape

    def cache(part, b, h, r, step, length, begin, end, *pages):
        if fixed.page:
            at = jnp.minimum(step * fixed.parts + part, fixed.lists[1] - 1)
            block = pages[0][fixed.row(b, h) * fixed.lists[1] + at]
        else:
            first, last = _first_and_last(begin[b], end[b], fixed.block_kv)
            # An index that does not change is not fetched again. Empty spans may begin at the end.
            block = jnp.minimum(first + step, last)
            block = jnp.minimum(block, (fixed.slots - 1) // fixed.block_kv)
        return (b, h, 0, block) if fixed.slots_last else (b, h, block, 0)

    def tile(b, h, r, *_):
        return b, h, r, 0

    size = fixed.page or fixed.block_kv
    block = (head_dim, size) if fixed.slots_last else (size, head_dim)
    pieces = [
        pl.BlockSpec((None, None, *block), functools.partial(cache, part))
        for part in range(fixed.parts)
    ]
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4 if fixed.page else 3,
        grid=(batch, heads, rows // block_rows, steps),
        in_specs=[
            pl.BlockSpec((None, None, block_rows, head_dim), tile),
            pl.BlockSpec((None, block_rows, 2), lambda b, h, r, *_: (b, r, 0)),
            *pieces,
            *pieces,
        ],
        out_specs=(
            pl.BlockSpec((None, None, block_rows, head_dim), tile),
            pl.BlockSpec((None, None, block_rows, LANES), tile),
        ),
        scratch_shapes=[
            pltpu.VMEM((block_rows, LANES), jnp.float32),
            pltpu.VMEM((block_rows, LANES), jnp.float32),
            pltpu.VMEM((block_rows, head_dim), jnp.float32),
        ],
    )


def _kernel(fixed: Fixed, length, begin, end, *refs):
    """Visit one block of slots: see `_grid_spec` for what the references hold."""
    q, bounds, *cache, out, lse, top, total, weighted = refs[1:] if fixed.page else refs
    row, step = fixed.row(pl.program_id(0), pl.program_id(1)), pl.program_id(3)
    first = lax.div(begin[row], fixed.block_kv)
    slot = (first + step) * fixed.block_kv

    @pl.when(step == 0)
    def _():
        _reset(top, total, weighted)

    @pl.when(jnp.logical_and(slot < end[row], begin[row] < end[row]))
    def _():
        position = _positions(fixed, slot, length[row], begin[row], end[row])
        keys, values = _joined(fixed, cache[: fixed.parts]), _joined(fixed, cache[fixed.parts :])
        scores = _scores(fixed, q[...], keys, position, bounds[...])
        if fixed.slots % fixed.block_kv and not fixed.page:
            values = _without_tail(values, fixed.slots - slot, axis=int(fixed.slots_last))
        _accumulate(fixed, scores, values, top, total, weighted)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        _write(out, lse, top, total, weighted)


def _joined(fixed: Fixed, pieces) -> Array:
    """Return the slots of a block, which are one piece of the cache or several pages."""
    axis = 1 if fixed.slots_last else 0
    return jnp.concatenate([x[...] for x in pieces], axis) if fixed.page else pieces[0][...]


def _reset(top, total, weighted) -> None:
    top[...] = jnp.full_like(top, MASK_VALUE)
    total[...] = jnp.zeros_like(total)
    weighted[...] = jnp.zeros_like(weighted)


def _positions(fixed: Fixed, first_slot, length, begin, end) -> Array:
    """Return the position `[1, block_kv]` held by each slot of a block, `NEVER` if none.

    Slot s holds `newest - (newest - s) mod S`; the division is done once, on scalars.
    """
    newest = length - 1
    turn = lax.rem(newest + fixed.slots, fixed.slots)  # Slot of the newest token.
    slot = lax.broadcasted_iota(jnp.int32, (1, fixed.block_kv), 1) + first_slot
    position = slot + (newest - turn)
    position = jnp.where(slot <= turn, position, position - fixed.slots)
    held = (position >= 0) & (slot >= begin) & (slot < end)
    return jnp.where(held, position, NEVER)


def _scores(fixed: Fixed, q, k, position, bounds) -> Array:
    """Return the masked float32 scores `[rows, block_kv]` of one block."""
    scores = _dot(q, k, contract=0 if fixed.slots_last else 1) * fixed.scale
    if fixed.softcap is not None:
        scores = fixed.softcap * jnp.tanh(scores / fixed.softcap)
    starts, limits = bounds[:, 0:1], bounds[:, 1:2]
    # A sink is never too early: comparing a row of numbers is cheaper than a second mask.
    late = jnp.where(position < fixed.sinks, NEVER, position) if fixed.sinks else position
    seen = (position < limits) & (late >= starts)
    return jnp.where(seen, scores, MASK_VALUE)


def _without_tail(values, room, *, axis: int) -> Array:
    """Zero the slots beyond the cache: what lies there may be NaN, and 0 * NaN is NaN."""
    slot = lax.broadcasted_iota(jnp.int32, values.shape, axis)
    return jnp.where(slot < room, values, jnp.zeros_like(values))


def _accumulate(fixed: Fixed, scores, values, top, total, weighted) -> None:
    """Add one block to the running maximum, sum of exponentials and weighted values."""
    old = top[...]
    new = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
    # While a row has seen no key its maximum is the mask; exp(mask - 0) is 0, not 1.
    base = jnp.where(new == MASK_VALUE, 0.0, new)
    weights = jnp.exp(scores - base[:, 0:1])
    shrink = jnp.exp(old - base)
    top[...] = new
    total[...] = total[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
    product = _dot(weights.astype(values.dtype), values, contract=1 if fixed.slots_last else 0)
    weighted[...] = weighted[...] * shrink[:, 0:1] + product


def _write(out, lse, top, total, weighted) -> None:
    """Normalise and write a finished tile; a row that saw no key gets 0 and the mask value."""
    seen = total[...] > 0
    safe = jnp.where(seen, total[...], 1.0)
    out[...] = weighted[...] / safe[:, 0:1]
    lse[...] = jnp.where(seen, top[...] + jnp.log(safe), MASK_VALUE)


def _dot(a, b, *, contract: int) -> Array:
    """Multiply along axis 1 of `a` and axis `contract` of `b`, summed in float32."""
    return lax.dot_general(
        a,
        b,
        (((1,), (contract,)), ((), ())),
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
