# SPDX-License-Identifier: Apache-2.0
"""Decode attention on Hopper GPUs (Pallas Mosaic GPU: wgmma and TMA).

Scores are computed transposed, `S^T[tokens, rows] = K q^T` and `O^T[H, rows] += V^T P^T`, so that
the cache's tokens fill the 64-row side of wgmma and a few query rows its narrow side. Blocks of
the grid share the slots of a sequence evenly (split-KV); XLA merges their partial outputs.
A block alternates key and value tiles in one ring of shared memory: two or more blocks fit on a
multiprocessor and hide each other's latency, so that reading the cache once is the cost.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import MASK_VALUE, Target, check, round_up
from pallas_kernels.decode_attention.gpu_splits import LAYOUT, Slots, merge_splits

WIDTHS = (64, 80, 96, 128, 256)
_DTYPES = (jnp.dtype("bfloat16"), jnp.dtype("float16"))
_CORES = 132  # of an H100 or H200, for targets that do not say
SHARED_BYTES = 227 * 1024
_ROW_TILES = (8, 16, 32, 64)
_PER_ROW = LAYOUT.reduce(0)
_ACCUMULATOR = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]


@dataclass(frozen=True)
class Config:
    """Sizes of the kernel.

    `block_kv` slots per tile, a multiple of 64; `stages` tiles of the ring, key and value tiles
    counted alike; `splits` blocks of the grid that share the slots of one sequence and kv head.
    """

    block_kv: int = 64
    stages: int = 4
    splits: int = 1

    def __post_init__(self) -> None:
        rule = "must be a positive multiple of 64"
        check("block_kv", self.block_kv, self.block_kv > 0 and self.block_kv % 64 == 0, rule)
        check("stages", self.stages, self.stages >= 2, "must be >= 2: a key and a value tile")
        check("splits", self.splits, self.splits >= 1, "must be >= 1")

    def shared_bytes(self, width: int, tile: int) -> int:
        """Return the shared memory of one block, for head width and rows of a tile."""
        padded = round_up(width, 64)
        ring = max(2 * self.stages * self.block_kv * padded, 4 * padded * tile)
        return ring + 2 * tile * (width + self.block_kv) + 16 * tile + 2048


@dataclass(frozen=True)
class Plan:
    """Everything static that the kernel's steps need."""

    config: Config
    slots: int
    width: int
    rows: int  # of one tile of query rows
    dtype: Any
    scale: float
    softcap: float | None
    sinks: int
    interpret: Any
    page: int = 0  # slots of a page of the list; 0 without one

    @property
    def parts(self) -> int:
        """Pieces of the cache that make a tile: whole pages, or one run of slots."""
        return max(1, self.config.block_kv // self.page) if self.page else 1

    @property
    def padded_width(self) -> int:
        """H rounded up to what fills the 64-row side of wgmma; the padding is never written out."""
        return round_up(self.width, 64)


def default_config(
    batch: int, kv_heads: int, slots: int, width: int, row_tiles: int, tile: int, target: Target
) -> Config:
    """Return sizes derived from shapes.

    Aims at two resident blocks per multiprocessor and two waves of them, as long as a split has
    enough slots to pay for its start and for writing its partial output.
    """
    block_kv = 128 if width <= 64 and tile <= 32 else 64
    resident, stages = 2, 3 if width > 128 else 4
    if width > 128 and tile > 16:  # no room for two: one with a deep ring
        resident, stages = 1, 6
    wanted = -(-2 * resident * (target.cores or _CORES) // (batch * kv_heads * row_tiles))
    return Config(block_kv, stages, max(1, min(wanted, slots // max(256, 8 * tile))))


def row_tile(rows: int, width: int, softcap: float | None) -> int:
    """Return how many query rows one block takes; with more, the registers would spill."""
    most = 64 if width <= 128 and softcap is None else 32
    return next(tile for tile in _ROW_TILES if tile >= min(rows, most))


def decode_attention_mosaic_gpu(
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

    Raises NotImplementedError for devices other than Hopper, float32, widths outside `WIDTHS`, and
    caches shorter than one tile or not of a multiple of 8 slots.
    """
    batch, kv_heads, rows, width = q.shape
    slots = k.shape[2]
    tile = row_tile(rows, width, softcap)
    if config is None:
        row_tiles = -(-rows // tile)
        config = default_config(batch, kv_heads, slots, width, row_tiles, tile, target)
    check_supported(k, target, config, interpret)
    shared, rule = config.shared_bytes(width, tile), "does not fit a block's shared memory"
    check("config", config, shared <= SHARED_BYTES, f"{rule} ({shared} bytes); lower its stages")
    if interpret is True:
        interpret = plgpu.InterpretGPUParams()
    plan = Plan(
        config, slots, width, tile, k.dtype, float(scale), softcap, sinks, interpret or None
    )
    return launch(plan, length, span, q, k, v, jnp.maximum(starts, 0), limits)


def launch(
    plan: Plan,
    length: Array,
    where: Array,
    q: Array,
    k: Array,
    v: Array,
    starts: Array,
    limits: Array,
) -> tuple[Array, Array]:
    """Run a plan on folded rows; see `_kernel` for `length` and `where`."""
    batch, kv_heads, rows = q.shape[:3]
    padding = round_up(rows, plan.rows) - rows
    q = jnp.pad(q, ((0, 0), (0, 0), (0, padding), (0, 0)))
    seen = jnp.maximum(limits - starts, 0)
    sunk = jnp.clip(limits, 0, plan.sinks)
    bounds = jnp.stack([starts, seen, sunk], axis=1).astype(jnp.int32)
    bounds = jnp.pad(bounds, ((0, 0), (0, 0), (0, padding)))
    parts = _build(plan, batch, kv_heads, rows + padding)(length, where, bounds, q, k, v)
    out, lse = merge_splits(*parts)
    return out[:, :, :rows], lse[:, :, :rows]


def check_supported(k: Array, target: Target, config: Config, interpret: Any) -> None:
    slots, width = k.shape[2:]
    if not interpret and (target.platform != "gpu" or target.capability != (9, 0)):
        raise NotImplementedError("mosaic_gpu: needs a Hopper GPU (compute capability 9.0)")
    if k.dtype not in _DTYPES:
        raise NotImplementedError(f"mosaic_gpu: serves bfloat16 and float16, not {k.dtype}")
    if width not in WIDTHS:
        raise NotImplementedError(f"mosaic_gpu: head width {width} is not one of {WIDTHS}")
    if slots % 8 or slots < config.block_kv:
        need = f"a multiple of 8 and at least {config.block_kv}"
        raise NotImplementedError(f"mosaic_gpu: needs {need} slots, not {slots}")


def _build(plan: Plan, batch: int, kv_heads: int, rows: int):
    """Return the kernel (length, where, bounds, q, k, v) -> partial (O^T, log-sum-exp)."""
    config, tile, padded = plan.config, plan.rows, plan.padded_width
    parts = (batch, kv_heads, config.splits)
    transforms = swizzled(plan.width)
    ring = plgpu.SMEM((config.stages, config.block_kv, padded), plan.dtype, transforms=transforms)
    return plgpu.kernel(
        functools.partial(_kernel, plan),
        grid=(*parts, rows // tile),
        grid_names=("batch", "head", "split", "tile"),
        out_type=(
            jax.ShapeDtypeStruct((*parts, plan.width, rows), jnp.float32),
            jax.ShapeDtypeStruct((*parts, rows), jnp.float32),
        ),
        scratch_types=[
            plgpu.SMEM((3, tile), jnp.int32),
            plgpu.SMEM((tile, plan.width), plan.dtype, transforms=transforms),
            # The output is staged where the ring was.
            plgpu.RefUnion(ring, plgpu.SMEM((padded, tile), jnp.float32)),
            plgpu.SMEM((tile, config.block_kv), plan.dtype, transforms=transforms),
            plgpu.SMEM((tile,), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_barriers=config.stages, num_arrivals=plan.parts),
        ],
        interpret=plan.interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def swizzled(columns: int):
    """Return the widest swizzle that divides rows of `columns` 16-bit values."""
    swizzle = next(size for size in (128, 64, 32) if columns % (size // 2) == 0)
    tiling = plgpu.TilingTransform((8, swizzle // 2))  # pyright: ignore[reportAbstractUsage]
    return (tiling, plgpu.SwizzleTransform(swizzle))  # pyright: ignore[reportAbstractUsage]


def _kernel(
    plan,
    length,
    where,
    bounds,
    q,
    k,
    v,
    out,
    lse,
    bounds_smem,
    q_smem,
    ring_or_out,
    p_smem,
    lse_smem,
    row_barrier,
    ring_barrier,
):
    """One block of the grid: a tile of query rows over one split of a sequence's slots.

    `where` is the span of the slots `[B, 2]` and `length` `[B]`; or, with pages, `where` is the
    list of them `[B, K, U]` and `length` `[B, K]`, and the slots are those of the listed pages.
    """
    ring, out_smem = ring_or_out
    config, width = plan.config, plan.width
    batch, head, split, tile = map(lax.axis_index, ("batch", "head", "split", "tile"))
    rows = pl.ds(tile * plan.rows, plan.rows)
    # Columns beyond the width are filled with zeros (a static slice may not leave the array).
    columns = pl.ds(jnp.minimum(split, 0) * plan.padded_width, plan.padded_width)
    if plan.page:
        held = Slots.of(plan, length[batch, head], jnp.int32(0), length[batch, head])
    else:
        held = Slots.of(plan, length[batch], where[batch, 0], where[batch, 1])
    begin, todo = held.share(split)

    def fetch(step, ahead):
        """Load tile `2 * step + ahead` of the alternating sequence K0 V0 K1 V1 ..."""
        index = step + ahead // 2
        slot = lax.rem(2 * step + ahead, config.stages)
        source = v if ahead % 2 else k

        @pl.when(index < todo)
        def _():
            size = config.block_kv // plan.parts
            for part in range(plan.parts):
                first = (begin + index) * config.block_kv + part * size
                if plan.page:
                    first = _listed(plan, where.at[batch, head], first)
                plgpu.copy_gmem_to_smem(
                    source.at[batch, head, pl.ds(first, size), columns],
                    ring.at[slot, pl.ds(part * size, size)],
                    ring_barrier.at[slot],
                )

    plgpu.copy_gmem_to_smem(bounds.at[batch, :, rows], bounds_smem, row_barrier)
    plgpu.copy_gmem_to_smem(q.at[batch, head, rows], q_smem, row_barrier)
    for ahead in range(config.stages - 1):
        fetch(0, ahead)
    plgpu.barrier_wait(row_barrier)
    limits = [plgpu.layout_cast(bounds_smem[i], _PER_ROW) for i in range(3)]

    def step(index, carry):
        acc, top, total = carry
        slot = lax.rem(2 * index, config.stages)
        plgpu.barrier_wait(ring_barrier.at[slot])
        scores = _scores(plan, ring.at[slot, :, pl.ds(0, width)], q_smem)
        seen = _visible(plan, held.positions(begin + index), *limits)
        scores = jnp.where(seen, scores, MASK_VALUE)
        new_top = jnp.maximum(top, scores.max(axis=0))
        shrink = jnp.exp2(top - new_top)
        weights = jnp.exp2(scores - _along_rows(new_top, scores))
        total = total * _along_rows(shrink, total) + weights
        p_smem.transpose((1, 0))[...] = plgpu.layout_cast(
            weights.astype(plan.dtype), plgpu.Layout.WGMMA_TRANSPOSED
        )
        # Publishes the weights. Also, all warps have now finished with this step's key tile and
        # with the previous step's value tile: both may be overwritten.
        plgpu.commit_smem()
        fetch(index, config.stages - 1)
        fetch(index, config.stages)
        slot = lax.rem(2 * index + 1, config.stages)
        plgpu.barrier_wait(ring_barrier.at[slot])
        acc = acc * _along_rows(shrink, acc) + _weigh(plan, ring.at[slot], p_smem)
        return acc, new_top, total

    acc, top, total = lax.fori_loop(0, todo, step, _empty(plan))
    here = (batch, head, split)
    outs = out.at[(*here, slice(None), rows)], lse.at[(*here, rows)]
    _write(plan, acc, top, total.sum(axis=0), (out_smem, lse_smem), outs)


def _listed(plan: Plan, pages, slot):
    """Return where in the cache a slot of the listed pages lies."""
    # The last tile may end beyond the list: any page will do there.
    at = jnp.minimum(lax.div(slot, plan.page), plan.slots // plan.page - 1)
    return pages[at] * plan.page + lax.rem(slot, plan.page)


def _write(plan, acc, top, total, staged, outs) -> None:
    """Normalise what one split has summed up and store it by way of shared memory."""
    out_smem, lse_smem = staged
    # A row that saw nothing still has its top at the mask's value, and a meaningless total.
    some = top > MASK_VALUE / 2
    total = jnp.where(some, total, 1.0)
    inverse = jnp.where(some, 1.0 / total, 0.0)
    lse_smem[...] = jnp.where(some, (top + jnp.log2(total)) * math.log(2), MASK_VALUE)
    plgpu.commit_smem()  # no warp reads the ring any more
    out_smem[...] = acc * _along_rows(inverse, acc)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, plan.width)], outs[0])
    plgpu.copy_smem_to_gmem(lse_smem, outs[1])
    plgpu.wait_smem_to_gmem(0)


def _visible(plan: Plan, position, start, seen, sunk):
    """Return whether each row sees each position, by range checks of one unsigned comparison."""

    def below(value, bound):
        return value.astype(jnp.uint32) < _along_rows(bound, value).astype(jnp.uint32)

    visible = below(position - _along_rows(start, position), seen)
    return visible | below(position, sunk) if plan.sinks else visible


def _scores(plan: Plan, keys, q):
    """Return the scores `[block_kv, rows]` of a tile times log2(e), so that exp2 serves."""

    def product(acc):
        plgpu.wgmma(acc, keys, q.transpose((1, 0)))
        return acc[...]

    shape = (plan.config.block_kv, plan.rows)
    scores = pl.run_scoped(product, _ACCUMULATOR(shape, jnp.float32))
    if plan.softcap is None:
        return scores * (plan.scale * math.log2(math.e))
    # tanh by exp2: the GPU's own approximation of tanh is good to 11 bits only.
    power = jnp.exp2(scores * (2 * math.log2(math.e) * plan.scale / plan.softcap))
    cap = plan.softcap * math.log2(math.e)
    return cap - (2 * cap) / (1.0 + power)


def _weigh(plan: Plan, values, weights):
    """Return the product `[H, rows]` of a tile of values and its weights."""

    def product(acc):
        plgpu.wgmma(acc, values.transpose((1, 0)), weights.transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(product, _ACCUMULATOR((plan.padded_width, plan.rows), jnp.float32))


def _empty(plan: Plan):
    """Return the state of the online softmax before the first tile: output, top, total."""

    def full(shape, value, layout):
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    return (
        full((plan.padded_width, plan.rows), 0.0, LAYOUT),
        full((plan.rows,), MASK_VALUE, _PER_ROW),
        full((plan.config.block_kv, plan.rows), 0.0, LAYOUT),
    )


def _along_rows(x, like):
    """Broadcast one value per query row over the other axis."""
    return lax.broadcast_in_dim(x, like.shape, [1])
