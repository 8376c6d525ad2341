# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of decode attention over packed caches, next to a bfloat16 cache of the same tokens.

Every sequence fills its cache, one token attends to all of it. Codes are random: nothing depends
on them. Bytes are those of the packed cache, so that the bfloat16 candidate, which moves more, may
show more than the device's bandwidth divided by what packing saves.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench import BenchCase
from pallas_kernels.common import current_target
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.packing import words_of
from pallas_kernels.qtensor import QTensor
from pallas_kernels.quantized_decode_attention.api import quantized_decode_attention
from pallas_kernels.quantized_decode_attention.shapes import SHAPES, Shape

OP = "quantized_decode_attention"

# name: (bits of keys, tokens and channels that share a scale), the same of values; 0 for all
FORMS = {
    "int8": ((8, 1, 0), (8, 1, 0)),
    "int4": ((4, 1, 0), (4, 1, 0)),
    "int4_g32": ((4, 1, 32), (4, 1, 32)),
    "int3": ((3, 1, 0), (3, 1, 0)),
    "kivi4": ((4, 32, 1), (4, 1, 32)),
    "kivi2": ((2, 32, 1), (2, 1, 32)),
    "kivi2_g128": ((2, 128, 1), (2, 1, 0)),
}


def cases() -> list[BenchCase]:
    """Return every form at every shape."""
    return [
        _case(f"{name}_{form}", shape, *FORMS[form])
        for name, shape in SHAPES.items()
        for form in FORMS
    ]


def _case(name: str, shape: Shape, keys: tuple[int, ...], values: tuple[int, ...]) -> BenchCase:
    make = functools.partial(_make_inputs, shape, keys, values)
    _, k, v, *_ = jax.eval_shape(make, 0)
    queries = shape.batch * shape.heads * shape.head_dim * (2 + 4)
    candidates = {
        "ours": _packed,
        "xla": functools.partial(_packed, backend="xla"),
        "bf16": _plain,
    }
    return BenchCase(OP, name, make, candidates, k.nbytes + v.nbytes + queries)


def _packed(q, k, v, k_plain, v_plain, **options: Any) -> jax.Array:
    del k_plain, v_plain
    length = jnp.full(q.shape[:1], k.codes.shape[2], jnp.int32)
    return quantized_decode_attention(q, k, v, length=length, limits=length[:, None], **options).out


def _plain(q, k, v, k_plain, v_plain) -> jax.Array:
    del k, v
    length = jnp.full(q.shape[:1], k_plain.shape[2], jnp.int32)
    return decode_attention(q, k_plain, v_plain, length=length).out


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _make_inputs(shape: Shape, keys: tuple[int, ...], values: tuple[int, ...], seed: Any) -> tuple:
    cache = (shape.batch, shape.kv_heads, shape.slots, shape.head_dim)
    rngs = jax.random.split(jax.random.key(seed), 5)
    q = jax.random.normal(rngs[0], (shape.batch, 1, shape.heads, shape.head_dim), jnp.bfloat16)
    plain = [jax.random.normal(rng, cache, jnp.bfloat16) for rng in rngs[1:3]]
    packed = [_random(rng, cache, *form) for rng, form in zip(rngs[3:], (keys, values))]
    return (q, *packed, *plain)


def _random(rng: jax.Array, cache: tuple[int, ...], bits: int, tokens: int, group: int) -> QTensor:
    *lead, slots, width = cache
    codes = jax.random.bits(rng, (*lead, slots, words_of(width, bits)), jnp.uint32)
    factors = (*lead, slots // tokens, width // (group or width))
    # TPU kernels take no float16; XLA would copy the scales at every call.
    dtype = jnp.bfloat16 if current_target().platform == "tpu" else jnp.float16
    scale = jnp.full(factors, math.sqrt(12) / 2**bits, dtype)
    offset = jnp.full(factors, -math.sqrt(3), dtype)
    return QTensor(codes, scale, offset, None, None, None, bits, width)
