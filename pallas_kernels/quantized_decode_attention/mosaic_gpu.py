# SPDX-License-Identifier: Apache-2.0
"""Decode attention over packed keys and values on Hopper GPUs (Pallas Mosaic GPU).

The scheme is that of `decode_attention`: transposed products, tokens on the 64-row side of wgmma,
split-KV, partial outputs merged by XLA. Codes come by TMA as they are stored and are unpacked in
registers. Uniform codes stay integers (`gpu_tiles`), about one instruction per element. A scale per
token multiplies the scores or the weights, in as many products as a token has scales. A scale per
channel of a group of tokens multiplies the queries, anew for each group; a static one, the queries
or the output, outside the kernel. Tables, exact entries and keys before rotation make numbers
(`gpu_elements`), at 3 to 5 instructions per element. Head width 128 only.
"""

import functools
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import MASK_VALUE, Target, check, round_up
from pallas_kernels.decode_attention.gpu_splits import Slots, merge_splits
from pallas_kernels.decode_attention.mosaic_gpu import swizzled
from pallas_kernels.qtensor import QTensor
from pallas_kernels.quantized_decode_attention import gpu_operands as operands
from pallas_kernels.quantized_decode_attention import gpu_steps as steps
from pallas_kernels.quantized_decode_attention import gpu_tiles as tiles
from pallas_kernels.quantized_decode_attention.form import form_of
from pallas_kernels.quantized_decode_attention.gpu_plan import (
    SHARED_BYTES,
    Config,
    Plan,
    check_supported,
    default_config,
    row_tile,
    shared_bytes,
)
from pallas_kernels.rotary import Rotary
from pallas_kernels.varying import float32_output

_TOKENS, _WIDTH = tiles.TOKENS, tiles.WIDTH


def quantized_decode_attention_mosaic_gpu(
    q: Array,
    k: QTensor,
    v: QTensor,
    length: Array,
    span: Array,
    starts: Array,
    limits: Array,
    *,
    query_positions: Array | None,
    rotary: Rotary | None,
    scale: float,
    softcap: float | None,
    target: Target,
    config: Config | None = None,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """Return (out, log-sum-exp); the arguments are those of `xla.quantized_decode_attention_xla`.

    Raises NotImplementedError for what the module's docstring leaves out, devices other than
    Hopper, float32 queries, and caches of fewer slots than a block or no multiple of 64.
    """
    batch, kv_heads, rows, _ = q.shape
    forms = form_of(k, "mosaic_gpu"), form_of(v, "mosaic_gpu")
    tile = row_tile(rows, *forms, rotary is not None)
    plan = Plan(
        config or Config(_TOKENS),
        k.codes.shape[2],
        tile,
        *forms,
        rotary is not None,
        float(scale),
        softcap,
        (plgpu.InterpretGPUParams() if interpret is True else interpret) or None,
    )
    if config is None:
        sizes = default_config(batch, kv_heads, -(-rows // tile), plan, target)
        plan = replace(plan, config=sizes)
    check_supported(q, k, v, plan, target)
    shared, rule = shared_bytes(plan), "does not fit a block's shared memory"
    check("config", config, shared <= SHARED_BYTES, f"{rule} ({shared} bytes); lower its stages")
    padding = round_up(rows, tile) - rows
    q = jnp.pad(q, ((0, 0), (0, 0), (0, padding), (0, 0)))
    bounds = jnp.stack([starts, jnp.maximum(limits - starts, 0)], axis=1).astype(jnp.int32)
    bounds = jnp.pad(bounds, ((0, 0), (0, 0), (0, padding)))
    arrays = {"length": length, "span": span, "bounds": bounds}
    if rotary is None or query_positions is None:
        arrays |= operands.queries(plan, q, k)
    else:
        positions = jnp.pad(query_positions, ((0, 0), (0, padding)))
        arrays |= operands.rotated_queries(plan, q, length, positions, rotary)
    arrays |= operands.fixed(plan, k, v)
    arrays |= operands.cache("k", k, forms[0]) | operands.cache("v", v, forms[1])
    parts = _build(plan, arrays, batch, kv_heads, rows + padding)
    out, lse = merge_splits(*parts)  # the same partial outputs, whatever the cache
    out = out[..., np.argsort(operands.channels(plan))]
    if not plan.whole_values and forms[1].sharing == "static":
        out = out * v.scale.astype(jnp.float32)
        if v.offset is not None:
            seen = lse[..., None] > MASK_VALUE
            out = out + jnp.where(seen, v.offset.astype(jnp.float32), 0.0)
    return out[:, :, :rows], lse[:, :, :rows]


def _build(plan: Plan, arrays: dict[str, Array], batch: int, kv_heads: int, rows: int):
    """Run the kernel: partial (O^T, log-sum-exp) of each split."""
    config, tile = plan.config, plan.rows
    parts = (batch, kv_heads, config.splits)
    ring = [name for name in arrays if operands.in_ring(name)]
    once = [name for name in arrays if name in operands.ONCE]
    # What values need besides their codes comes with them only if it is read along with them.
    late = [name for name in ring if name[:2] == "v." and (plan.whole_values or name == "v.codes")]
    loads = {"keys": [name for name in ring if name not in late], "values": late, "once": once}
    queries = 0 if plan.scaled_queries or plan.rotated else plan.query_parts
    wide, narrow = swizzled(_WIDTH), swizzled(_TOKENS)
    weights = (plan.tiles, plan.value_parts * tile, _TOKENS)
    scratch: dict[str, Any] = {
        "bounds_smem": plgpu.SMEM((2, tile), jnp.int32),
        "q_smem": plgpu.SMEM((plan.query_parts * tile, _WIDTH), plan.key_dtype, transforms=wide),
        "p_smem": plgpu.SMEM(weights, plan.value_dtype, transforms=narrow),
        "out_smem": plgpu.SMEM((_WIDTH, tile), jnp.float32),
        "lse_smem": plgpu.SMEM((tile,), jnp.float32),
        "row_barrier": plgpu.Barrier(num_arrivals=1 + queries + len(once)),
        "keys_barrier": plgpu.Barrier(num_barriers=config.stages, num_arrivals=len(loads["keys"])),
        "values_barrier": plgpu.Barrier(num_barriers=config.stages, num_arrivals=len(late)),
    }
    for name in ring:
        size = operands.ring_shape(plan, name, arrays[name])
        scratch[f"{name}_smem"] = plgpu.SMEM(size, arrays[name].dtype)
    for name in once:
        shape = arrays[name].shape
        shape = shape[2:] if name == "k.factors" else shape
        scratch[f"{name}_smem"] = plgpu.SMEM(shape, arrays[name].dtype)
    inputs = tuple(arrays.values())

    def quantized_decode_attention(*refs):
        names = (*arrays, "out", "lse", *scratch)
        _kernel(plan, loads, dict(zip(names, refs, strict=True)))

    return plgpu.kernel(
        quantized_decode_attention,
        grid=(*parts, rows // tile),
        grid_names=("batch", "head", "split", "tile"),
        out_type=(
            float32_output((*parts, _WIDTH, rows), *inputs),
            float32_output((*parts, rows), *inputs),
        ),
        scratch_types=list(scratch.values()),
        interpret=plan.interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*inputs)


def _kernel(plan: Plan, loads: dict[str, list[str]], given: dict[str, Any]) -> None:
    """One block of the grid: a tile of query rows over one split of a sequence's slots."""
    config = plan.config
    batch, head, split, tile = map(lax.axis_index, ("batch", "head", "split", "tile"))
    rows = pl.ds(tile * plan.rows, plan.rows)
    span = given["span"]
    held = Slots.of(plan, given["length"][batch], span[batch, 0], span[batch, 1])  # pyright: ignore
    begin, todo = held.share(split)
    fetch = functools.partial(_fetch, plan, loads, given, (batch, head, begin, todo))
    _fetch_once(plan, loads["once"], given, batch, head, rows)
    for ahead in range(config.stages):
        fetch("keys", ahead)
        if ahead < config.stages - 1:
            fetch("values", ahead)
    plgpu.barrier_wait(given["row_barrier"])
    fixed = steps.Fixed.of(plan, given, batch, head, rows)

    def step(index, carry):
        acc, top, total, extra = carry
        slot = lax.rem(index, config.stages)
        plgpu.barrier_wait(given["keys_barrier"].at[slot])
        if plan.scaled_queries:
            steps.scale_queries(plan, given, fixed, slot)
        elif plan.rotated:
            steps.turn_queries(plan, given, fixed, slot)
        scores = []
        for part in range(plan.tiles):
            tile_index = (begin + index) * plan.tiles + part
            position = steps.positions(plan, held, tile_index)
            seen = steps.visible(position, *fixed.limits)
            newest = held.newest - tile_index * _TOKENS
            score = steps.scores(plan, given, fixed, slot, part, newest)
            scores.append(jnp.where(seen, score, MASK_VALUE))
        new_top = jnp.maximum(top, functools.reduce(jnp.maximum, scores).max(axis=0))
        shrink = jnp.exp2(top - new_top)
        weights = [jnp.exp2(score - steps.along_rows(new_top, score)) for score in scores]
        total = total * steps.along_rows(shrink, total) + functools.reduce(jnp.add, weights)
        extra = [x * steps.along_rows(shrink, x) for x in extra]
        for part, weight in enumerate(weights):
            extra = steps.store_weights(plan, given, slot, part, weight, extra)
        # Publishes the weights. Also, all warps have now finished with this step's keys and scales
        # and with the previous step's values: both may be overwritten.
        plgpu.commit_smem()
        _refill(fetch, index, config.stages)
        plgpu.barrier_wait(given["values_barrier"].at[slot])
        acc = acc * steps.along_rows(shrink, acc)
        for part in range(plan.tiles):
            acc = acc + steps.weigh(plan, given, fixed, slot, part)
        return acc, new_top, total, extra

    acc, top, total, extra = lax.fori_loop(0, todo, step, steps.empty(plan))
    steps.finish(plan, given, fixed, acc, top, total, extra)
    here = (batch, head, split)
    out, lse = given["out"], given["lse"]
    plgpu.copy_smem_to_gmem(given["out_smem"], out.at[(*here, slice(None), rows)])
    plgpu.copy_smem_to_gmem(given["lse_smem"], lse.at[(*here, rows)])
    plgpu.wait_smem_to_gmem(0)


def _fetch(plan: Plan, loads, given: dict[str, Any], where, names: str, index) -> None:
    """Load what is read with the keys, or with the values, of a step, unless it is past the end."""
    batch, head, begin, todo = where
    slot = lax.rem(index, plan.config.stages)

    @pl.when(index < todo)
    def _():
        for name in loads[names]:
            count = operands.lines_of_block(plan, name, given[name])
            ring = given[f"{name}_smem"].at[slot, pl.ds(0, count)]
            lines = pl.ds((begin + index) * count, count)
            source = given[name] if name == "turns" else given[name].at[batch, head]
            plgpu.copy_gmem_to_smem(source.at[lines], ring, given[f"{names}_barrier"].at[slot])


def _refill(fetch, index, stages: int) -> None:
    """Let one warp ask for what comes next: the others have better things to issue."""

    @plgpu.warp_map
    def _(warp):
        @pl.when(warp == 0)
        def _():
            fetch("keys", index + stages)
            fetch("values", index + stages - 1)


def _fetch_once(plan: Plan, once: list[str], given: dict[str, Any], batch, head, rows) -> None:
    """Load what a block needs from start to end."""
    barrier = given["row_barrier"]
    plgpu.copy_gmem_to_smem(given["bounds"].at[batch, :, rows], given["bounds_smem"], barrier)
    for name in once:
        source = operands.of_head(name, given[name], batch, head)
        plgpu.copy_gmem_to_smem(source, given[f"{name}_smem"], barrier)
    if not (plan.scaled_queries or plan.rotated):
        for part in range(plan.query_parts):
            source = given["q"].at[batch, head, part, rows]
            plgpu.copy_gmem_to_smem(source, steps.rows_of(plan, given["q_smem"], part), barrier)
