# SPDX-License-Identifier: Apache-2.0
"""Decode attention over packed keys and values on Hopper GPUs (Pallas Mosaic GPU).

The scheme is that of `decode_attention`: transposed products, tokens on the 64-row side of wgmma,
split-KV, partial outputs merged by XLA. Codes come by TMA as they are stored and are unpacked in
registers (`gpu_tiles`), about one instruction per element; they stay integers. A scale per token
multiplies the scores or the weights, in as many products as a token has scales. A scale per channel
of a group of tokens multiplies the queries, anew for each group; a static one, the queries or the
output, outside the kernel. Head width 128 only; tables, exact entries and keys before rotation are
left to XLA.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import MASK_VALUE, Target, check, round_up
from pallas_kernels.decode_attention import mosaic_gpu as dense
from pallas_kernels.packing import words_of
from pallas_kernels.qtensor import QTensor
from pallas_kernels.quantized_decode_attention import gpu_steps as steps
from pallas_kernels.quantized_decode_attention import gpu_tiles as tiles
from pallas_kernels.quantized_decode_attention.form import Form, form_of, group_masks
from pallas_kernels.rotary import Rotary
from pallas_kernels.varying import float32_output

SHARED_BYTES = 227 * 1024
_ROW_TILES = (8, 16)
_CORES = 132
_LINE = 64
"""Words of a row of codes as TMA sees them: tokens follow each other without a gap."""
_TOKENS, _WIDTH = tiles.TOKENS, tiles.WIDTH


@dataclass(frozen=True)
class Config:
    """Sizes: `block_kv` slots per step, a multiple of 64; steps in flight; blocks per sequence."""

    block_kv: int = 128
    stages: int = 3
    splits: int = 1

    def __post_init__(self) -> None:
        rule = f"must be a positive multiple of {_TOKENS}"
        good = self.block_kv > 0 and self.block_kv % _TOKENS == 0
        check("block_kv", self.block_kv, good, rule)
        check("stages", self.stages, self.stages >= 1, "must be >= 1")
        check("splits", self.splits, self.splits >= 1, "must be >= 1")


@dataclass(frozen=True)
class _Plan:
    """Everything static that the kernel's steps need."""

    config: Config
    slots: int
    rows: int  # of one tile of query rows
    k: Form
    v: Form
    scale: float
    softcap: float | None
    interpret: Any

    @property
    def key_parts(self) -> int:
        """Products of a tile of keys: one per scale of a token, or per group of the tile."""
        return max(_TOKENS // self.k.tokens, 1) if self.k.sharing == "channel" else self.k.groups

    @property
    def groups(self) -> int:
        """Groups of a block that share scales of keys per channel."""
        return self.config.block_kv // self.k.tokens

    @property
    def with_offsets(self) -> bool:
        """Whether scaled queries come with a second part that offsets and biases make."""
        return self.k.offset or self.k.bias != 0 or self.k.bits == 8

    @property
    def query_parts(self) -> int:
        """Matrices of queries in shared memory."""
        if self.k.sharing != "channel":
            return self.k.groups
        return self.groups * (1 + self.with_offsets)

    @property
    def tiles(self) -> int:
        """Tiles of a block."""
        return self.config.block_kv // _TOKENS


def default_config(
    batch: int, kv_heads: int, slots: int, row_tiles: int, k: Form, v: Form, target: Target
) -> Config:
    """Return sizes derived from shapes: two waves of three resident blocks, enough to a split.

    Two tiles to a step share its fixed work, unless several products of each fill the registers.
    """
    single = k.groups == v.groups == 1 and (k.sharing != "channel" or k.tokens >= _TOKENS)
    block_kv = 128 if slots >= 128 and (single or k.tokens > _TOKENS) else 64
    wanted = -(-6 * (target.cores or _CORES) // (batch * kv_heads * row_tiles))
    # Three blocks of 8-bit codes would not fit a multiprocessor otherwise.
    stages = 2 if k.bits + v.bits >= 16 else 3
    return Config(block_kv, stages, max(1, min(wanted, slots // 512)))


def row_tile(rows: int, k: Form, v: Form) -> int:
    """Return how many query rows one block takes; with more, registers would spill."""
    most = 16 if k.sharing != "channel" and max(k.groups, v.groups) == 1 else 8
    return next(tile for tile in _ROW_TILES if tile >= min(rows, most))


def shared_bytes(plan: _Plan) -> int:
    """Return the shared memory of one block."""
    config = plan.config
    ring = sum(
        config.block_kv * 4 * words_of(_WIDTH, form.bits) + 2 * _factors(plan, form)
        for form in (plan.k, plan.v)
    )
    queries = 2 * plan.rows * (_WIDTH * plan.query_parts + _TOKENS * _parts(plan))
    return config.stages * ring + queries + 4 * plan.rows * (_WIDTH + 1) + 2048


def _parts(plan: _Plan) -> int:
    return plan.v.groups * (plan.config.block_kv // _TOKENS)


def _factors(plan: _Plan, form: Form) -> int:
    """Return how many scales, offsets included, go with a block."""
    block, both = plan.config.block_kv, 1 + form.offset
    count = {"token": block * form.groups, "channel": block // form.tokens * _WIDTH, "static": 0}
    return both * count[form.sharing]


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
    del query_positions
    batch, kv_heads, rows, _ = q.shape
    slots = k.codes.shape[2]
    forms = form_of(k, "mosaic_gpu"), form_of(v, "mosaic_gpu")
    tile = row_tile(rows, *forms)
    if config is None:
        config = default_config(batch, kv_heads, slots, -(-rows // tile), *forms, target)
    _check_supported(q, (k, v), forms, rotary, slots, config, target, interpret)
    if interpret is True:
        interpret = plgpu.InterpretGPUParams()
    plan = _Plan(config, slots, tile, *forms, float(scale), softcap, interpret or None)
    shared, rule = shared_bytes(plan), "does not fit a block's shared memory"
    check("config", config, shared <= SHARED_BYTES, f"{rule} ({shared} bytes); lower its stages")
    padding = round_up(rows, tile) - rows
    q = jnp.pad(q, ((0, 0), (0, 0), (0, padding), (0, 0)))
    bounds = jnp.stack([starts, jnp.maximum(limits - starts, 0)], axis=1).astype(jnp.int32)
    bounds = jnp.pad(bounds, ((0, 0), (0, 0), (0, padding)))
    arrays = {"length": length, "span": span, "bounds": bounds}
    arrays |= _queries(plan, q, k) | _value_groups(plan)
    arrays |= _cache("k", k, forms[0]) | _cache("v", v, forms[1])
    parts = _build(plan, arrays, batch, kv_heads, rows + padding)
    out, lse = dense._merge(*parts)  # the same partial outputs, whatever the cache
    out = out[..., np.argsort(tiles.value_order(forms[1].bits))]
    if forms[1].sharing == "static":
        out = out * v.scale.astype(jnp.float32)
        if v.offset is not None:
            seen = lse[..., None] > MASK_VALUE
            out = out + jnp.where(seen, v.offset.astype(jnp.float32), 0.0)
    return out[:, :, :rows], lse[:, :, :rows]


def _check_supported(q, tensors, forms, rotary, slots, config, target, interpret) -> None:
    def need(good: bool, what: str) -> None:
        if not good:
            raise NotImplementedError(f"mosaic_gpu: {what}")

    hopper = target.platform == "gpu" and target.capability == (9, 0)
    need(bool(interpret) or hopper, "needs a Hopper GPU (compute capability 9.0)")
    need(q.dtype == jnp.bfloat16, f"serves bfloat16 queries, not {q.dtype}")
    need(q.shape[-1] == _WIDTH, f"head width {q.shape[-1]} is not {_WIDTH}")
    need(rotary is None, "keys before rotation are left to XLA")
    least = config.block_kv
    need(slots % _TOKENS == 0 and slots >= least, f"{slots} slots are no multiple of 64 >= {least}")
    for tensor, form in zip(tensors, forms):
        need(form.bits in tiles.BASE, f"has no codes of {form.bits} bits")
        need(form.uniform, "tables and exact entries are left to XLA")
        types = [x.dtype for x in (tensor.scale, tensor.offset) if x is not None]
        plain = form.sharing == "static" or jnp.dtype(jnp.float32) not in types
        need(plain, "scales must have 16 bits")
        need(form.groups <= 4, f"{form.groups} scales for a token are left to XLA")
    k, v = forms
    need(v.sharing != "channel", "values with a scale per channel and group are left to XLA")
    whole = _TOKENS % k.tokens == 0 or k.tokens == 2 * _TOKENS
    fits = k.sharing != "channel" or (config.block_kv % k.tokens == 0 and whole)
    need(fits, f"keys in groups of {k.tokens} tokens do not fit blocks of {config.block_kv}")


def _queries(plan: _Plan, q: Array, k: QTensor) -> dict[str, Array]:
    """Return the queries in the order of `tiles.keys`, and what they add to scores."""
    form, order = plan.k, tiles.key_order(plan.k.bits)
    exact = q.astype(jnp.float32)
    if form.sharing == "channel":
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


def _value_groups(plan: _Plan) -> dict[str, Array]:
    """Return the number of the scale that serves each row of `tiles.values`."""
    if plan.v.groups == 1:
        return {}
    group = tiles.value_order(plan.v.bits) // (_WIDTH // plan.v.groups)
    return {"value_group": jnp.asarray(group, jnp.int32)}


def _cache(name: str, tensor: QTensor, form: Form) -> dict[str, Array]:
    """Return a tensor's arrays as lines of words and scales, all without a copy."""
    batch, heads = tensor.codes.shape[:2]
    found = {"codes": tensor.codes.reshape(batch, heads, -1, _LINE)}
    if form.sharing != "static":
        for key, factor in (("scale", tensor.scale), ("offset", tensor.offset)):
            if factor is not None:
                width = _WIDTH if form.sharing == "channel" else _TOKENS * form.groups
                found[key] = factor.reshape(batch, heads, -1, width)
    return {f"{name}.{key}": array for key, array in found.items()}


def _build(plan: _Plan, arrays: dict[str, Array], batch: int, kv_heads: int, rows: int):
    """Run the kernel: partial (O^T, log-sum-exp) of each split."""
    config, tile = plan.config, plan.rows
    parts = (batch, kv_heads, config.splits)
    cached = [name for name in arrays if name[:2] in ("k.", "v.")]
    by_group = plan.k.sharing == "channel"
    wide, narrow = dense._swizzled(_WIDTH), dense._swizzled(_TOKENS)
    scratch: dict[str, Any] = {
        "bounds_smem": plgpu.SMEM((2, tile), jnp.int32),
        "q_smem": plgpu.SMEM((plan.query_parts * tile, _WIDTH), jnp.bfloat16, transforms=wide),
        "p_smem": plgpu.SMEM(
            (plan.tiles, plan.v.groups * tile, _TOKENS), jnp.bfloat16, transforms=narrow
        ),
        "out_smem": plgpu.SMEM((_WIDTH, tile), jnp.float32),
        "lse_smem": plgpu.SMEM((tile,), jnp.float32),
        "row_barrier": plgpu.Barrier(num_arrivals=1 if by_group else 1 + plan.k.groups),
        "key_barrier": plgpu.Barrier(num_barriers=config.stages, num_arrivals=len(cached) - 1),
        "value_barrier": plgpu.Barrier(num_barriers=config.stages),
    }
    for name in cached:
        size = (config.stages, _lines(plan, arrays[name]), arrays[name].shape[3])
        scratch[f"{name}_smem"] = plgpu.SMEM(size, arrays[name].dtype)
    inputs = tuple(arrays.values())

    def quantized_decode_attention(*refs):
        names = (*arrays, "out", "lse", *scratch)
        _kernel(plan, cached, dict(zip(names, refs, strict=True)))

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


def _lines(plan: _Plan, array: Array) -> int:
    """Return how many lines of an array of a cache belong to a block of slots."""
    return array.shape[2] * plan.config.block_kv // plan.slots


def _kernel(plan: _Plan, cached: list[str], given: dict[str, Any]) -> None:
    """One block of the grid: a tile of query rows over one split of a sequence's slots."""
    config = plan.config
    batch, head, split, tile = map(lax.axis_index, ("batch", "head", "split", "tile"))
    rows = pl.ds(tile * plan.rows, plan.rows)
    span, row_barrier = given["span"], given["row_barrier"]
    held = dense._Slots.of(plan, given["length"][batch], span[batch, 0], span[batch, 1])  # pyright: ignore
    begin, todo = held.share(split)

    def fetch(index, names, barrier):
        slot = lax.rem(index, config.stages)

        @pl.when(index < todo)
        def _():
            for name in names:
                ring = given[f"{name}_smem"].at[slot]
                lines = pl.ds((begin + index) * ring.shape[0], ring.shape[0])
                source = given[name].at[batch, head, lines]
                plgpu.copy_gmem_to_smem(source, ring, given[barrier].at[slot])

    # The values' scales come with the keys: they are needed before the values.
    early = [name for name in cached if name != "v.codes"]
    fetch_keys = functools.partial(fetch, names=early, barrier="key_barrier")
    fetch_values = functools.partial(fetch, names=["v.codes"], barrier="value_barrier")
    plgpu.copy_gmem_to_smem(given["bounds"].at[batch, :, rows], given["bounds_smem"], row_barrier)
    if plan.k.sharing != "channel":
        for group in range(plan.k.groups):
            source = given["q"].at[batch, head, group, rows]
            plgpu.copy_gmem_to_smem(
                source, steps.rows_of(plan, given["q_smem"], group), row_barrier
            )
    for ahead in range(config.stages):
        fetch_keys(ahead)
        if ahead < config.stages - 1:
            fetch_values(ahead)
    plgpu.barrier_wait(row_barrier)
    fixed = steps.Fixed.of(plan, given, batch, head, rows)

    def step(index, carry):
        acc, top, total, extra = carry
        slot = lax.rem(index, config.stages)
        plgpu.barrier_wait(given["key_barrier"].at[slot])
        if plan.k.sharing == "channel":
            steps.scale_queries(plan, given, fixed, slot)
        scores = []
        for part in range(plan.tiles):
            position = steps.positions(plan, held, (begin + index) * plan.tiles + part)
            seen = steps.visible(position, *fixed.limits)
            score = steps.scores(plan, given, fixed, slot, part)
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
        fetch_keys(index + config.stages)
        fetch_values(index + config.stages - 1)
        plgpu.barrier_wait(given["value_barrier"].at[slot])
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
