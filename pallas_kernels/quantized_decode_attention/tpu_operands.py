# SPDX-License-Identifier: Apache-2.0
"""The arrays of the TPU kernel, brought by XLA into the form in which it reads them.

Caches are only ever transposed, tokens last, which is how XLA stores them anyway: whatever is
computed here has the size of the queries.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels.common import MASK_VALUE
from pallas_kernels.qtensor import QTensor
from pallas_kernels.quantized_decode_attention.form import (
    Form,
    digit_order,
    gather_digits,
    group_masks,
    spread_digits,
    stored,
    zero_level,
)
from pallas_kernels.rotary import Rotary, cos_sin, turn

LANES = 128


@dataclass(frozen=True)
class Operand:
    """An array and how a block of it is found.

    `kind`: "rows" `[B, (K,) .., R, n]` goes by tiles of rows, "tokens" `[B, K, n, S]` and "groups"
    `[B, K, S / tokens, n]` by blocks of slots, "chunks" `[B, K, S / chunk, R, n]` by both, "head"
    `[B, K, m, n]` is a head's own, "all" is shared.
    """

    array: Array
    kind: Literal["rows", "tokens", "groups", "chunks", "head", "all"]
    heads: bool = True
    tokens: int = 1
    stack: int = 1

    def spec(self, rows: int, config: Any, position: Callable[..., Any]) -> pl.BlockSpec:
        """Return the block of this array; `position` maps grid indices to (b, h, tile, block)."""
        shape, slots = self.array.shape, config.block_kv

        def at(*index):
            b, h, r, block = position(*index)
            match self.kind:
                case "rows":
                    return (b, h, r, 0) if self.heads else (b, r, 0)
                case "tokens":
                    return b, h, 0, block
                case "groups":
                    return b, h, block, 0
                case "chunks":
                    return b, h, block, r, 0
                case "head":
                    return b, h, 0, 0
            return (0,) * len(shape)

        stacked = (rows * self.stack, shape[-1])
        match self.kind:
            case "rows":
                block = (*(None,) * (len(shape) - 2), *stacked)
            case "tokens":
                block = (None, None, shape[2], min(slots, shape[3]))
            case "groups":
                block = (None, None, min(slots // self.tokens, shape[2]), shape[3])
            case "chunks":
                block = (None, None, slots // config.chunk, *stacked)
            case "head":
                block = (None, None, *shape[2:])
            case _:
                block = shape
        return pl.BlockSpec(block, at)


def queries(q: Array, k: QTensor, form: Form, rows: int, *, digits: bool) -> dict[str, Operand]:
    """Return the queries `[B, K, R, H]`, in tiles of `rows`, as factors of the decoded keys."""
    if not digits:
        return {"q": Operand(q, "rows")}
    width, bits = form.width, form.bits
    if form.sharing == "channel":
        order = spread_digits(jnp.eye(width, dtype=q.dtype), width, bits)
        return {"q": Operand(q, "rows"), "q_order": Operand(order, "all")}
    exact, scaled, masks = q.astype(jnp.float32), q, group_masks(form)
    columns = []
    if form.sharing == "static":
        scaled = (exact * k.scale.astype(jnp.float32)).astype(q.dtype)
        if form.offset:
            columns = [jnp.sum(exact * k.offset.astype(jnp.float32), axis=-1)]
    else:
        columns = [jnp.sum(exact * mask, axis=-1) for mask in masks]
    parts = [scaled * mask.astype(q.dtype) for mask in masks]
    added = [
        zero_level(form, q.dtype) * jnp.sum(part.astype(jnp.float32), axis=-1) for part in parts
    ]
    sums = jnp.stack(added + columns, axis=-1)
    spread = jnp.stack([spread_digits(part, width, bits) for part in parts], axis=2)
    return {"q": _stacked(spread, "rows", rows), "q_sums": Operand(sums, "rows")}


def turned_queries(
    q: Array, positions: Array, length: Array, rotary: Rotary, slots: int, rows: int, chunk: int
) -> dict[str, Operand]:
    """Return the queries as seen from each chunk's first slot, and a chunk's own angles.

    Twice: the slots behind the newest one of a ring hold positions that are `slots` lower.
    """
    newest = length[:, None] - 1
    first = jnp.arange(0, slots, chunk, dtype=jnp.int32) + newest - newest % slots
    first = jnp.stack([first, first - slots], axis=2)  # B chunks 2
    relative = positions[:, None, None] - first[..., None]
    cos, sin = (x[:, None] for x in cos_sin(rotary, relative))  # B 1 chunks 2 R H/2
    turned = turn(q.astype(jnp.float32)[:, :, None, None], cos, sin).astype(q.dtype)
    cos, sin = (x.T for x in cos_sin(rotary, jnp.arange(chunk)))
    shared = {"cos": Operand(cos, "all"), "sin": Operand(sin, "all")}
    return {"q": _stacked(turned, "chunks", rows), **shared}


def _stacked(x: Array, kind: Any, rows: int) -> Operand:
    """Return `[..., n, R, P]` with the n versions of each tile of rows one below the other."""
    *lead, many, count, width = x.shape
    x = jnp.moveaxis(x.reshape(*lead, many, count // rows, rows, width), -4, -3)
    return Operand(x.reshape(*lead, many * count, width), kind, stack=many)


def cache(name: str, tensor: QTensor, form: Form, *, values: bool) -> dict[str, Operand]:
    """Return a tensor's arrays, tokens last; static factors only where values are decoded."""
    batch, heads = tensor.codes.shape[:2]

    def of_head(x: Array) -> Operand:
        return Operand(jnp.broadcast_to(x, (batch, heads, *x.shape[2:])), "head")

    def tokens(x: Array) -> Operand:
        return Operand(jnp.swapaxes(x, 2, 3), "tokens")

    found = {"codes": tokens(tensor.codes)}
    for key, factor in (("scale", tensor.scale), ("offset", tensor.offset)):
        if factor is None:
            continue
        if form.sharing == "token":
            found[key] = tokens(stored(factor))
        elif form.sharing == "channel":
            found[key] = Operand(stored(factor), "groups", tokens=form.tokens)
        elif values:
            column = jnp.swapaxes(factor.astype(jnp.float32), 2, 3)
            found[key] = of_head(jnp.broadcast_to(column, (*column.shape[:2], form.width, 1)))
    if form.table:
        table = tensor.table.astype(jnp.float32)
        missing = LANES - table.shape[-1]
        found["table"] = of_head(jnp.pad(table, ((0, 0), (0, 0), (0, 0), (0, missing))))
    if form.slots:
        found["residual"] = tokens(stored(tensor.residual))
        found["place"] = tokens(tensor.place)
    return {f"{name}.{key}": operand for key, operand in found.items()}


def value_columns(form: Form) -> Operand:
    """Return rows over the digits: is it the least one of its channel; which scale serves it."""
    channels, weights = digit_order(form.width, form.bits)
    group = channels // (form.width // form.groups)
    rows = np.zeros((8, channels.size), np.float32)
    rows[0], rows[1] = weights == 1, group
    return Operand(jnp.asarray(rows), "all")


def finished_values(out: Array, lse: Array, v: QTensor, form: Form) -> Array:
    """Return weighted digits `[B, K, R, P]` as weighted values `[B, K, R, H]`."""
    out = gather_digits(out, form.width, form.bits)
    if form.sharing != "static":
        return out
    out = out * v.scale.astype(jnp.float32)
    if form.offset:
        out = out + jnp.where(lse > MASK_VALUE, v.offset.astype(jnp.float32), 0.0)
    return out
