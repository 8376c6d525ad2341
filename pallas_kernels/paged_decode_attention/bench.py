# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of attention to chosen pages: a quarter and a sixteenth of a long context.

The baseline that counts is attention to the whole cache, which the pages are chosen to avoid;
`xla` gathers them first.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench import BenchCase
from pallas_kernels.bench.case import Candidate
from pallas_kernels.decode_attention.api import decode_attention
from pallas_kernels.decode_attention.shapes import SHAPES, Shape
from pallas_kernels.paged_decode_attention.api import paged_decode_attention

OP = "paged_decode_attention"
# Name of the shape, batch, slots, slots of a page, one of how many pages is read.
GRID = (
    ("llama3_8b", 1, 131072, 16, 4),
    ("llama3_8b", 1, 131072, 64, 4),
    ("llama3_8b", 1, 131072, 64, 16),
    ("llama3_8b", 16, 32768, 16, 16),
    ("llama3_8b", 16, 32768, 64, 16),
    ("sdar_4b_block16", 4, 32768, 16, 16),
)


def cases() -> list[BenchCase]:
    """Return all cases."""
    return [_case(SHAPES[name], name, *sizes) for name, *sizes in GRID]


def _case(shape: Shape, name: str, batch: int, slots: int, page: int, every: int) -> BenchCase:
    candidates: dict[str, Candidate | None] = {
        "ours": functools.partial(_attend, page),
        "xla": functools.partial(_attend, page, backend="xla"),
        "whole_cache": _whole,
    }
    rows = shape.rows * shape.heads * shape.head_dim
    cache = 2 * 2 * shape.kv_heads * slots // every * shape.head_dim
    lists = 4 * shape.kv_heads * slots // page // every
    return BenchCase(
        OP,
        f"{name}_b{batch}_s{slots}_p{page}_of{every}",
        functools.partial(_make_inputs, shape, batch, slots, page, every),
        candidates,
        batch * (cache + lists + (2 + 4) * rows),
    )


def _make_inputs(shape: Shape, batch: int, slots: int, page: int, every: int, seed: int) -> Any:
    cache = (batch, shape.kv_heads, slots, shape.head_dim)
    shapes = ((batch, shape.rows, shape.heads, shape.head_dim), cache, cache)
    *keys, last = jax.random.split(jax.random.key(seed), 4)
    arrays = tuple(_normal(key, size) for key, size in zip(keys, shapes, strict=True))
    # One page of every run of `every`: as scattered as chosen pages may be.
    runs = jnp.arange(slots // page // every, dtype=jnp.int32) * every
    offsets = jax.random.randint(last, (*cache[:2], len(runs)), 0, every, jnp.int32)
    return *arrays, runs + offsets


@functools.partial(jax.jit, static_argnums=1)
def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16)


def _attend(page_size: int, q, k, v, pages, **options: Any) -> jax.Array:
    count = jnp.full(pages.shape[:2], pages.shape[2], jnp.int32)
    length = jnp.full(q.shape[:1], k.shape[2], jnp.int32)
    lists = {"pages": pages, "count": count, "length": length, "page_size": page_size}
    return paged_decode_attention(q, k, v, **lists, **options).out


def _whole(q, k, v, pages) -> jax.Array:
    del pages
    length = jnp.full(q.shape[:1], k.shape[2], jnp.int32)
    limits = jnp.broadcast_to(length[:, None], q.shape[:2])
    return decode_attention(q, k, v, length=length, limits=limits).out
