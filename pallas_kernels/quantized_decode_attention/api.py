# SPDX-License-Identifier: Apache-2.0
"""Decode attention over packed keys and values, decoded one tile at a time.

The semantics are those of `decode_attention`; keys and values are `QTensor`s whose rows are the
slots. Keys may be stored before rotation: then the queries come unrotated too, and both are turned
relative to each other, which stays accurate at any position.
"""

import math
from importlib import import_module
from typing import Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels.common import check, check_integers, current_target, dispatch, tuned
from pallas_kernels.decode_attention.api import slot_span
from pallas_kernels.partials import Partial, fold, unfold
from pallas_kernels.qtensor import QTensor, validate
from pallas_kernels.quantized_decode_attention.xla import quantized_decode_attention_xla
from pallas_kernels.rotary import Rotary


def quantized_decode_attention(
    q: Array,
    k: QTensor,
    v: QTensor,
    *,
    length: Array,
    limits: Array,
    starts: Array | None = None,
    query_positions: Array | None = None,
    rotary: Rotary | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
    interpret: Any = None,
    config: Any = None,
) -> Partial:
    """Attend `q` `[B, T, N, H]` to packed `k`, `v` `[B, K, S, H]`; N a multiple of K.

    `length` int32 `[B]`: tokens written so far; position p lies in slot p modulo S. Row t sees the
    positions in `[starts, limits)`, int32 `[B, T]` (starts: 0). With `rotary`, q and the keys are
    those before rotation and `query_positions` `[B, T]` says where the queries are. Scores are
    scaled (default 1/sqrt(H)), then capped. `backend`, `interpret` and `config` are as in
    `decode_attention`. Raises ValueError for shapes that do not fit.
    """
    _check(q, k, v, rotary, query_positions)
    _check_rows(q, length, {"limits": limits, "starts": starts, "query_positions": query_positions})
    check("softcap", softcap, softcap is None or softcap > 0, "must be > 0, or None for none")
    rows, heads = q.shape[1], k.codes.shape[1]
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    limits = jnp.maximum(limits, 0).astype(jnp.int32)
    starts = jnp.zeros_like(limits) if starts is None else jnp.maximum(starts, 0).astype(jnp.int32)
    length = jnp.asarray(length, jnp.int32)
    span = slot_span(length, starts, limits, 0, k.codes.shape[2])
    group = q.shape[2] // heads
    starts, limits = jnp.tile(starts, (1, group)), jnp.tile(limits, (1, group))
    if query_positions is not None:
        query_positions = jnp.tile(query_positions, (1, group))
    arrays = (fold(q, heads), k, v, length, span, starts, limits)
    fixed = {"query_positions": query_positions, "rotary": rotary}
    fixed |= {"scale": scale, "softcap": softcap}
    target = current_target()
    key = tuning_key(q, k, v, rotary is not None)
    sizes = None if config else tuned("quantized_decode_attention", key, target)

    def mosaic(name: str):
        module = import_module(f"pallas_kernels.quantized_decode_attention.{name}")
        run = getattr(module, f"quantized_decode_attention_{name}")
        tiles = module.Config(**sizes) if sizes else config
        return run(*arrays, **fixed, target=target, config=tiles, interpret=interpret)

    out, lse = dispatch(
        "quantized_decode_attention",
        {
            "mosaic_gpu": lambda: mosaic("mosaic_gpu"),
            "mosaic_tpu": lambda: mosaic("mosaic_tpu"),
            "xla": lambda: quantized_decode_attention_xla(*arrays, **fixed, target=target),
        },
        backend=backend,
        target=target,
        interpret=interpret,
        config=config,
    )
    return Partial(unfold(out, rows), unfold(lse, rows))


def tuning_key(q: Array, k: QTensor, v: QTensor, rotated: bool = False) -> str:
    """Return the key of the tuning table: kv heads and slots up to a power of two, and the forms.

    A form is told by its bits, by the slots and channels that share a scale, by a table and by its
    exact entries.
    """
    heads, slots = k.codes.shape[0] * k.codes.shape[1], k.codes.shape[2]
    up = [1 << (n - 1).bit_length() for n in (heads, slots)]
    rows = q.shape[1] * q.shape[2] // k.codes.shape[1]

    def form(tensor: QTensor) -> str:
        down, across = tensor.scale.shape[-2:]
        text = f"{tensor.bits}b{slots // down if down > 1 else 0}x{tensor.width // across}"
        text += "t" * (tensor.table is not None)
        return text if tensor.residual is None else f"{text}e{tensor.residual.shape[-1]}"

    turned = "-rotated" * rotated
    return f"heads{up[0]}-slots{up[1]}-rows{rows}-width{q.shape[3]}-k{form(k)}-v{form(v)}{turned}"


def _check(q: Array, k: QTensor, v: QTensor, rotary: Any, query_positions: Any) -> None:
    check("q.shape", q.shape, q.ndim == 4, "must be [B, T, N, H]")
    for name, tensor in (("k", k), ("v", v)):
        validate(tensor)
        shape = tensor.codes.shape
        check(f"{name}.codes.shape", shape, len(shape) == 4, "must be [B, K, S, words]")
        fits = shape[0] == q.shape[0] and tensor.width == q.shape[3]
        rule = f"must be a [B={q.shape[0]}, K, S, H={q.shape[3]}] tensor to go with q"
        check(f"{name}", (*shape[:3], tensor.width), fits, rule)
    slots, heads = k.codes.shape[2], k.codes.shape[1]
    same = v.codes.shape[1:3] == (heads, slots)
    check("v.codes.shape", v.codes.shape, same, f"must have K={heads} heads and S={slots} slots")
    rule = f"must have a multiple of K={heads} query heads"
    check("q.shape", q.shape, q.shape[2] % heads == 0, rule)
    both = (rotary is None) == (query_positions is None)
    check("rotary", rotary is not None, both, "and query_positions must be given together")
    if rotary is not None:
        pairs, half = len(rotary.inverse), q.shape[3] // 2
        check("rotary.inverse", pairs, pairs == half, f"must be H/2={half} frequencies")


def _check_rows(q: Array, length: Any, rows: dict[str, Any]) -> None:
    batch, shape = q.shape[0], q.shape[:2]
    check_integers("length", length, (batch,))
    for name, value in rows.items():
        if value is not None:
            check_integers(name, value, shape)
