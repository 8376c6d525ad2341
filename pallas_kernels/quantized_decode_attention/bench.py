# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of decode attention over packed caches, next to a bfloat16 cache of the same tokens.

Every sequence fills its cache, one token attends to all of it. Codes are random: nothing depends
on them. Bytes are those of the packed cache, so that the bfloat16 candidate, which moves more, may
show more than the device's bandwidth divided by what packing saves.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench import BenchCase
from pallas_kernels.common import current_target
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.packing import words_of
from pallas_kernels.qtensor import QTensor
from pallas_kernels.quantized_decode_attention.api import quantized_decode_attention
from pallas_kernels.quantized_decode_attention.shapes import SHAPES, Shape
from pallas_kernels.rotary import Rotary

OP = "quantized_decode_attention"


class Stored(NamedTuple):
    """How keys or values are packed: who shares a scale (0: all), and what else is stored."""

    bits: int
    tokens: int = 1
    channels: int = 0
    table: bool = False
    exact: int = 0


class Form(NamedTuple):
    """A cache: its keys, its values, and whether keys are stored before rotation."""

    keys: Stored
    values: Stored
    rotated: bool = False


def _kvquant(bits: int) -> Form:
    return Form(Stored(bits, 0, 1, True, 1), Stored(bits, 1, 0, True, 1), True)


FORMS = {
    "int8": Form(Stored(8), Stored(8)),
    "int4": Form(Stored(4), Stored(4)),
    "int4_g32": Form(Stored(4, channels=32), Stored(4, channels=32)),
    "int3": Form(Stored(3), Stored(3)),
    "kivi4": Form(Stored(4, 32, 1), Stored(4, channels=32)),
    "kivi2": Form(Stored(2, 32, 1), Stored(2, channels=32)),
    "kivi2_g128": Form(Stored(2, 128, 1), Stored(2)),
    "normal_float4": Form(Stored(4, channels=32, table=True), Stored(4, channels=32, table=True)),
    "kvquant4": _kvquant(4),
    "kvquant3": _kvquant(3),
    "kvquant2": _kvquant(2),
}
_THETA = 5e5


def cases() -> list[BenchCase]:
    """Return every form at every shape."""
    return [
        _case(f"{name}_{form}", shape, FORMS[form])
        for name, shape in SHAPES.items()
        for form in FORMS
    ]


def _case(name: str, shape: Shape, form: Form) -> BenchCase:
    make = functools.partial(_make_inputs, shape, form)
    _, k, v, *_ = jax.eval_shape(make, 0)
    queries = shape.batch * shape.heads * shape.head_dim * (2 + 4)
    packed = functools.partial(_packed, form.rotated)
    candidates = {
        "ours": packed,
        "xla": functools.partial(packed, backend="xla"),
        "bf16": _plain,
    }
    return BenchCase(OP, name, make, candidates, k.nbytes + v.nbytes + queries)


def _packed(rotated: bool, q, k, v, k_plain, v_plain, **options: Any) -> jax.Array:
    del k_plain, v_plain
    length = jnp.full(q.shape[:1], k.codes.shape[2], jnp.int32)
    limits = length[:, None]
    if rotated:
        half = q.shape[-1] // 2
        options["rotary"] = Rotary(tuple(_THETA ** (-np.arange(half) / half)))
        options["query_positions"] = limits - 1
    return quantized_decode_attention(q, k, v, length=length, limits=limits, **options).out


def _plain(q, k, v, k_plain, v_plain) -> jax.Array:
    del k, v
    length = jnp.full(q.shape[:1], k_plain.shape[2], jnp.int32)
    return decode_attention(q, k_plain, v_plain, length=length).out


@functools.partial(jax.jit, static_argnums=(0, 1))
def _make_inputs(shape: Shape, form: Form, seed: Any) -> tuple:
    cache = (shape.batch, shape.kv_heads, shape.slots, shape.head_dim)
    rngs = jax.random.split(jax.random.key(seed), 5)
    q = jax.random.normal(rngs[0], (shape.batch, 1, shape.heads, shape.head_dim), jnp.bfloat16)
    plain = [jax.random.normal(rng, cache, jnp.bfloat16) for rng in rngs[1:3]]
    packed = [_random(rng, cache, stored) for rng, stored in zip(rngs[3:], form[:2])]
    return (q, *packed, *plain)


def _random(rng: jax.Array, cache: tuple[int, ...], stored: Stored) -> QTensor:
    batch, heads, slots, width = cache
    bits, tokens, channels, table, exact = stored
    rows = jax.random.split(rng, 3)
    codes = jax.random.bits(rows[0], (*cache[:3], words_of(width, bits)), jnp.uint32)
    # TPU kernels take no float16; XLA would copy the scales at every call.
    dtype = jnp.bfloat16 if current_target().platform == "tpu" else jnp.float16
    factors = (batch, heads, slots // max(tokens, 1), width // (channels or width))
    if not tokens:
        factors, dtype = (1, heads, 1, width), jnp.float32
    size = 1.0 if table else math.sqrt(12) / 2**bits
    scale = jnp.full(factors, size, dtype)
    offset = jnp.full(factors, 0.0 if table else -math.sqrt(3), dtype)
    levels = jnp.linspace(-1.7, 1.7, 2**bits).reshape(1, 1, 1, -1) if table else None
    place = residual = None
    if exact:
        place = jax.random.randint(rows[1], (*cache[:3], exact), 0, width).astype(jnp.uint8)
        residual = jax.random.normal(rows[2], place.shape, jnp.float16)
    return QTensor(codes, scale, offset, levels, residual, place, bits, width)
