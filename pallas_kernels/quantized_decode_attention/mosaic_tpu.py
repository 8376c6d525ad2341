# SPDX-License-Identifier: Apache-2.0
"""Decode attention over packed keys and values on TPU: an online softmax over blocks of codes.

The grid is (sequence, kv head, row tile, block of slots), as in `decode_attention`; a block is
worked off in chunks, so that steps move enough bytes while few floats are alive. Uniform codes are
multiplied as they are: a scale per token multiplies the scores or the weights, in as many products
as a token has scales; a scale per channel of a group of tokens multiplies the few queries, which
are stacked for the groups of a register of tokens. Tables, exact entries and rotation go through
the values of a chunk (`tpu_tiles.values`), and those are bound by arithmetic, not by memory.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import MASK_VALUE, Target, check, round_up
from pallas_kernels.qtensor import QTensor
from pallas_kernels.quantized_decode_attention import tpu_operands as operands
from pallas_kernels.quantized_decode_attention import tpu_tiles as tiles
from pallas_kernels.quantized_decode_attention.form import (
    Form,
    digit_base,
    floats,
    form_of,
)
from pallas_kernels.quantized_decode_attention.tpu_scores import Held, masked_scores
from pallas_kernels.rotary import Rotary
from pallas_kernels.varying import float32_output

LANES = tiles.LANES
MAX_BLOCK_ROWS = 64
STEP_BYTES = 1 << 20
"""Codes and scales fetched per grid step; the start of a step costs as long as 300 KB of a v5e."""


@dataclass(frozen=True)
class Config:
    """Tile sizes: slots and folded query rows per grid step, slots that are decoded at a time."""

    block_kv: int
    block_rows: int
    chunk: int = 512

    def __post_init__(self) -> None:
        good = self.chunk > 0 and self.chunk % LANES == 0
        check("chunk", self.chunk, good, f"must be a positive multiple of {LANES}; use 512")
        good = self.block_kv > 0 and self.block_kv % self.chunk == 0
        check("block_kv", self.block_kv, good, f"must be a positive multiple of {self.chunk}")
        good = self.block_rows > 0 and self.block_rows % 8 == 0
        check("block_rows", self.block_rows, good, "must be a positive multiple of 8")


def default_config(rows: int, slots: int, k: Form, v: Form) -> Config:
    """Return sizes that keep a step's transfer near `STEP_BYTES` and divide the slots if may be."""
    block_rows = min(round_up(rows, 8), MAX_BLOCK_ROWS)
    fit = [n for n in (512, 384, 256, 128) if slots % n == 0 and _holds_groups(n, k, v)]
    chunk = fit[0] if fit else round_up(max(k.tokens, v.tokens), LANES)
    # Scales of groups of tokens come in tiles of 16 rows.
    unit = math.lcm(chunk, *(16 * form.tokens for form in (k, v) if form.sharing == "channel"))
    if slots <= unit:
        return Config(round_up(slots, chunk), block_rows, chunk)
    per_token = sum(form.width * form.bits // 8 + 4 * form.groups for form in (k, v))
    most = max(STEP_BYTES // per_token // unit, 1)
    even = [n for n in range(most, 0, -1) if slots % (n * unit) == 0]
    return Config(unit * (even[0] if even and 2 * even[0] >= most else most), block_rows, chunk)


def _holds_groups(chunk: int, *forms: Form) -> bool:
    """Whether a chunk has whole groups, whose scales lie in whole registers or within one."""
    counts = [chunk / form.tokens for form in forms]
    return all(count.is_integer() and (count % 8 == 0 or 8 % count == 0) for count in counts)


class _Fixed(NamedTuple):
    """What is known when the kernel is traced."""

    names: tuple[str, ...]
    slots: int
    config: Config
    k: Form
    v: Form
    key_values: bool  # keys are decoded to values, not to digits
    value_values: bool
    rotary: bool
    scale: float
    softcap: float | None
    interpreted: bool


def quantized_decode_attention_mosaic_tpu(
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

    Raises NotImplementedError for widths that are no multiple of 64, slots that are none of 128,
    float16 queries, codes of 8-bit floats, and groups that do not fit registers.
    """
    del target  # Every generation compiles the same program.
    rows, slots = q.shape[2], k.codes.shape[2]
    forms = form_of(k, "mosaic_tpu"), form_of(v, "mosaic_tpu")
    _check_supported(q, slots, *forms)
    config = config or default_config(rows, slots, *forms)
    _check_config(config, slots, *forms)
    block_rows = min(config.block_rows, round_up(rows, 8))
    fixed = _Fixed(
        (),
        slots,
        config,
        *forms,
        key_values=not forms[0].uniform or rotary is not None,
        value_values=not forms[1].uniform or forms[1].sharing == "channel",
        rotary=rotary is not None,
        scale=scale,
        softcap=softcap,
        interpreted=bool(interpret),
    )
    missing = -rows % block_rows
    q = jnp.pad(q, ((0, 0), (0, 0), (0, missing), (0, 0)))
    bounds = jnp.stack([starts, limits], axis=-1).astype(jnp.int32)
    bounds = jnp.pad(bounds, ((0, 0), (0, missing), (0, 0)))
    given = {"bounds": operands.Operand(bounds, "rows", heads=False)}
    if rotary is not None and query_positions is not None:
        positions = jnp.pad(query_positions, ((0, 0), (0, missing)))
        given |= operands.turned_queries(
            q, positions, length, rotary, slots, block_rows, config.chunk
        )
    else:
        given |= operands.queries(q, k, fixed.k, block_rows, digits=not fixed.key_values)
    given |= operands.cache("k", k, fixed.k, values=fixed.key_values)
    given |= operands.cache("v", v, fixed.v, values=fixed.value_values)
    if not fixed.value_values:
        given["v_columns"] = operands.value_columns(fixed.v)
    fixed = fixed._replace(names=tuple(given))
    out, lse = _run(fixed, given, q, length, span, block_rows, interpret)
    if not fixed.value_values:
        out = operands.finished_values(out, lse[..., :1], v, fixed.v)
    return out[:, :, :rows], lse[:, :, :rows, 0]


def _check_supported(q: Array, slots: int, k: Form, v: Form) -> None:
    def need(good: bool, what: str) -> None:
        if not good:
            raise NotImplementedError(f"mosaic_tpu: {what}")

    need(q.dtype in (jnp.bfloat16, jnp.float32), f"has no products of {q.dtype}")
    need(q.shape[-1] % 64 == 0, f"head_dim={q.shape[-1]} is not a multiple of 64")
    need(slots % LANES == 0, f"{slots} slots are not a multiple of {LANES}")
    for form in (k, v):
        need(tiles.supported(form), f"{form.bits} bits of {form.width} channels fill no registers")
        most = f"scales of {form.tokens} tokens fit no tile of {LANES}"
        need(LANES % form.tokens == 0 or form.tokens % LANES == 0, most)
        whole = form.width // form.groups % 8 == 0
        need(whole, f"{form.groups} scales for {form.width} channels fill no registers")


def _check_config(config: Config, slots: int, k: Form, v: Form) -> None:
    rule = f"must hold 1, 2, 4 or a multiple of 8 groups of {k.tokens} and {v.tokens} tokens"
    check("config.chunk", config.chunk, _holds_groups(config.chunk, k, v), rule)
    for form in (k, v):
        if form.sharing == "channel" and config.block_kv < slots:
            need = 16 * form.tokens
            rule = f"must be a multiple of {need} or hold all {slots} slots"
            check("config.block_kv", config.block_kv, config.block_kv % need == 0, rule)


def _run(fixed, given, q, length, span, block_rows, interpret):
    """Call the kernel on arrays that know their blocks."""
    batch, heads, rows, width = q.shape
    block_kv = fixed.config.block_kv
    begin, end = span[:, 0], span[:, 1]
    columns = width if fixed.value_values else given["v_columns"].array.shape[-1]
    groups = 1 if fixed.value_values else fixed.v.groups
    arrays = (length, begin, end, *(item.array for item in given.values()))
    first, last = _first_and_last(begin, end, block_kv)
    blocks = -(-fixed.slots // block_kv)

    def position(b, h, r, step, length, begin, end):
        first, last = _first_and_last(begin[b], end[b], block_kv)
        # An index that does not change is not fetched again. An empty span may begin at the end.
        return b, h, r, jnp.minimum(jnp.minimum(first + step, last), blocks - 1)

    def tile(b, h, r, *_):
        return b, h, r, 0

    return pl.pallas_call(
        functools.partial(_kernel, fixed),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, heads, rows // block_rows, jnp.max(last - first) + 1),
            in_specs=[item.spec(block_rows, fixed.config, position) for item in given.values()],
            out_specs=(
                pl.BlockSpec((None, None, block_rows, columns), tile),
                pl.BlockSpec((None, None, block_rows, LANES), tile),
            ),
            scratch_shapes=[
                pltpu.VMEM((block_rows, LANES), jnp.float32),
                pltpu.VMEM((1 + 2 * groups, block_rows, LANES), jnp.float32),
                pltpu.VMEM((groups * block_rows, columns), jnp.float32),
            ],
        ),
        out_shape=(
            float32_output((batch, heads, rows, columns), *arrays),
            float32_output((batch, heads, rows, LANES), *arrays),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        interpret=interpret or False,
        name="quantized_decode_attention",
    )(*arrays)


def _first_and_last(begin, end, block_kv: int):
    """Return the first and last block of slots of a span; equal if it is empty."""
    first = lax.div(begin, block_kv)
    return first, jnp.maximum(lax.div(end + (block_kv - 1), block_kv) - 1, first)


def _kernel(fixed: _Fixed, length, begin, end, *refs) -> None:
    """One block of slots: `refs` are the arrays of `fixed.names`, two outputs and the state."""
    count = len(fixed.names)
    given = dict(zip(fixed.names, refs[:count]))
    out, lse, top, sums, weighted = refs[count:]
    b, step = pl.program_id(0), pl.program_id(3)
    config = fixed.config
    block = lax.div(begin[b], config.block_kv) + step
    slot = block * config.block_kv

    @pl.when(step == 0)
    def _():
        top[...] = jnp.full_like(top, MASK_VALUE)
        sums[...] = jnp.zeros_like(sums)
        weighted[...] = jnp.zeros_like(weighted)

    @pl.when(jnp.logical_and(slot < end[b], begin[b] < end[b]))
    def _():
        def body(index, _):
            held = Held.of(fixed, slot + index * config.chunk, length[b], begin[b], end[b])
            part = _chunk(fixed, given, index)
            scores = masked_scores(fixed, part, _of(part, "k"), held)
            _accumulate(fixed, part, scores, held, top, sums, weighted)
            return _

        first = lax.div(jnp.maximum(begin[b] - slot, 0), config.chunk)
        stop = lax.div(jnp.minimum(end[b] - slot, config.block_kv) + config.chunk - 1, config.chunk)
        lax.fori_loop(first, stop, body, 0)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        _write(fixed, given, out, lse, top, sums, weighted)


def _chunk(fixed: _Fixed, given: dict[str, Any], index) -> dict[str, Any]:
    """Return the arrays of one chunk of a block."""
    size = fixed.config.chunk
    lanes = pl.ds(pl.multiple_of(index * size, size), size)
    part = {}
    for name, ref in given.items():
        form = {"k": fixed.k, "v": fixed.v}.get(name.split(".")[0])
        if form is None:
            part[name] = ref[index] if name == "q" and fixed.rotary else ref[...]
        elif name.endswith(("scale", "offset")) and form.sharing == "channel":
            part[name] = tiles.rows_of_chunk(ref, index, size // form.tokens)
        elif name.endswith("table") or (form.sharing == "static" and "codes" not in name):
            part[name] = ref[...] if not name.endswith(("residual", "place")) else ref[:, lanes]
        else:
            part[name] = ref[:, lanes]
    return part


def _of(part: dict[str, Any], tensor: str) -> dict[str, Any]:
    """Return the arrays of one tensor by their own names."""
    return {name[2:]: x for name, x in part.items() if name.startswith(f"{tensor}.")}


def _accumulate(fixed: _Fixed, part, scores, held: Held, top, sums, weighted) -> None:
    """Add one chunk to the running maximum, the sums (per lane) and the weighted values."""
    form, value = fixed.v, _of(part, "v")
    rows, dtype = scores.shape[0], part["q"].dtype
    old = top[...]
    new = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
    # While a row has seen no key its maximum is the mask; exp(mask - 0) is 0, not 1.
    base = jnp.where(new == MASK_VALUE, 0.0, new)
    weights = jnp.exp(scores - base[:, 0:1])
    shrink = jnp.exp(old - base)
    top[...] = new
    sums[0] = sums[0] * shrink + _by_lane(weights)
    if fixed.value_values:
        # What lies beyond the span may be NaN, and 0 * NaN is NaN.
        values = jnp.where(held.inside, tiles.values(form, value), 0.0).astype(dtype)
        product = tiles.dot(weights.astype(dtype), values, contract=(1, 1))
        weighted[...] = weighted[...] * shrink[:, 0:1] + product
        return
    shared = []
    for group in range(form.groups):
        scaled = weights
        if form.sharing == "token":
            scale = floats(value["scale"][group : group + 1])
            scaled = weights * jnp.where(held.inside, scale, 0.0)
            if form.offset:
                offset = floats(value["offset"][group : group + 1])
                added = _by_lane(weights * jnp.where(held.inside, offset, 0.0))
                at = 1 + form.groups + group
                sums[at] = sums[at] * shrink + added
        scaled = _rounded(fixed, scaled, dtype)
        shared.append(scaled.astype(dtype))
        sums[1 + group] = sums[1 + group] * shrink + _by_lane(scaled)
    stacked = jnp.concatenate(shared, axis=0)
    digits = tiles.digits(value["codes"], form, dtype)
    product = tiles.dot(stacked, digits, contract=(1, 1))
    shrink = jnp.concatenate([shrink[:, 0:1]] * form.groups, axis=0)
    assert product.shape[0] == rows * form.groups
    weighted[...] = weighted[...] * shrink + product


def _rounded(fixed: _Fixed, x: Array, dtype: Any) -> Array:
    """Return float32 `x` as another type will hold it.

    The digits' base is subtracted by what the products were made of. XLA, which interprets the
    kernel, leaves out a cast and back; the compiler of kernels does not.
    """
    if dtype == jnp.float32 or not fixed.interpreted:
        return x.astype(dtype).astype(jnp.float32)
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _by_lane(x: Array) -> Array:
    """Return sums over every 128th token."""
    return sum((x[:, i : i + LANES] for i in range(LANES, x.shape[1], LANES)), x[:, :LANES])


def _write(fixed: _Fixed, given, out, lse, top, sums, weighted) -> None:
    """Normalise and write a finished tile; a row that saw no key gets 0 and the mask value."""
    total = jnp.sum(sums[0], axis=1, keepdims=True)
    seen = top[:, 0:1] > MASK_VALUE
    safe = jnp.where(seen, total, 1.0)
    result = weighted[...]
    if not fixed.value_values:
        form, rows = fixed.v, out.shape[0]
        columns = given["v_columns"][...]
        first, group_of, base = columns[0:1], columns[1:2], digit_base(given["q"].dtype)
        parts = result
        result = jnp.zeros(out.shape, jnp.float32)
        for group in range(form.groups):
            scaled = jnp.sum(sums[1 + group], axis=1, keepdims=True)
            added = -form.bias * scaled
            if form.sharing == "token" and form.offset:
                added += jnp.sum(sums[1 + form.groups + group], axis=1, keepdims=True)
            own = parts[group * rows : (group + 1) * rows] - base * scaled + first * added
            result = jnp.where(group_of == group, own, result)
    out[...] = jnp.where(seen, result / safe, 0.0)
    log = jnp.where(seen, top[:, 0:1] + jnp.log(safe), MASK_VALUE)
    lse[...] = jnp.broadcast_to(log, lse.shape)
