# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of decode attention: one model over contexts and batches, all models at one size.

Every sequence fills its cache, and the last tokens attend to all of it. Baselines are XLA, cuDNN
and PyTorch; the latter two leave out the causal mask among the last tokens, a window or a softcap
keeps them out. cuDNN wants caches `[B, S, K, H]`: it gets the same memory under that shape, other
numbers but as many.
"""

import dataclasses
import functools
import importlib
import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench import BenchCase, torch_candidate
from pallas_kernels.bench.case import Candidate
from pallas_kernels.common import Target
from pallas_kernels.decode_attention.api import decode_attention, tuning_key
from pallas_kernels.decode_attention.shapes import SHAPES, Shape

OP = "decode_attention"
CONTEXTS = (2048, 8192, 32768, 131072, 524288)
BATCHES = (1, 4, 16, 64)
MOST_TOKENS = 1 << 21  # of a batch: 8.6 GB of keys and values in an 8B model's layer


def cases() -> list[BenchCase]:
    """Return all cases; those too small for a device's caches to forget are marked by the bench."""
    grid = [
        _case(f"llama3_8b_b{batch}_s{slots}", SHAPES["llama3_8b"], batch, slots)
        for slots, batch in itertools.product(CONTEXTS, BATCHES)
        if batch * slots <= MOST_TOKENS
    ]
    others = {name: shape for name, shape in SHAPES.items() if name != "llama3_8b"}
    return grid + [_case(f"{name}_b8_s8192", shape, 8, 8192) for name, shape in others.items()]


def tune_cases(target: Target) -> list[BenchCase]:
    """Return cases named by keys of the tuning table, with sizes as candidates; Hopper only."""
    if target.capability != (9, 0):
        return []
    wanted = itertools.product(SHAPES.values(), ((1, 8192), (1, 131072), (16, 8192)))
    tunable = [_tune_case(shape, batch, slots, target) for shape, (batch, slots) in wanted]
    return list({case.shape_name: case for case in tunable}.values())


def _case(name: str, shape: Shape, batch: int, slots: int) -> BenchCase:
    plain = shape.window is None and shape.softcap is None
    candidates: dict[str, Candidate | None] = {
        "ours": functools.partial(_attend, shape),
        "xla": functools.partial(_attend, shape, backend="xla"),
    }
    if jax.default_backend() == "gpu" and plain:
        candidates["cudnn"] = _cudnn
    candidates["torch"] = torch_candidate(_torch) if plain else None
    return BenchCase(
        OP,
        name,
        functools.partial(_make_inputs, shape, batch, slots),
        candidates,
        _bytes_moved(shape, batch, slots),
    )


def _bytes_moved(shape: Shape, batch: int, slots: int) -> int:
    """Return the bytes of the keys and values that are seen, of the queries and of the output."""
    seen = min(slots, slots if shape.window is None else shape.window + shape.rows - 1)
    cache = 2 * 2 * shape.kv_heads * seen * shape.head_dim
    return batch * (cache + (2 + 4) * shape.rows * shape.heads * shape.head_dim)


def _make_inputs(shape: Shape, batch: int, slots: int, seed: int) -> tuple[jax.Array, ...]:
    cache = (batch, shape.kv_heads, slots, shape.head_dim)
    shapes = ((batch, shape.rows, shape.heads, shape.head_dim), cache, cache)
    keys = jax.random.split(jax.random.key(seed), 3)
    return tuple(_normal(key, size) for key, size in zip(keys, shapes, strict=True))


@functools.partial(jax.jit, static_argnums=1)
def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16)


def _attend(shape: Shape, q, k, v, **options: Any) -> jax.Array:
    length = jnp.full(q.shape[:1], k.shape[2], jnp.int32)
    fixed = {"window": shape.window, "softcap": shape.softcap}
    return decode_attention(q, k, v, length=length, **fixed, **options).out


def _cudnn(q, k, v) -> jax.Array:
    batch, heads, slots, width = k.shape
    k, v = (x.reshape(batch, slots, heads, width) for x in (k, v))
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def _torch(q, k, v):
    attend = importlib.import_module("torch").nn.functional.scaled_dot_product_attention
    return attend(q.transpose(1, 2), k, v, enable_gqa=True)


def _tune_case(shape: Shape, batch: int, slots: int, target: Target) -> BenchCase:
    from pallas_kernels.decode_attention import mosaic_gpu

    rows = shape.heads // shape.kv_heads * shape.rows
    tile = mosaic_gpu.row_tile(rows, shape.head_dim, shape.softcap)
    derived = mosaic_gpu.default_config(
        batch, shape.kv_heads, slots, shape.head_dim, -(-rows // tile), tile, target
    )
    # One size at a time: each candidate takes seconds to compile. Larger tiles of many rows spill.
    changes = [{"splits": max(1, derived.splits // 2)}, {"splits": 2 * derived.splits}]
    changes += [{"stages": stages} for stages in (2, 3, 4, 6, 8)]
    changes += [{"block_kv": block} for block in ((64, 128) if tile <= 16 else (64,))]
    sizes = [derived, *(dataclasses.replace(derived, **change) for change in changes)]
    candidates: dict[str, Candidate | None] = {
        json.dumps(dataclasses.asdict(size)): functools.partial(
            _attend, shape, backend="mosaic_gpu", config=size
        )
        for size in sizes
        if size.shared_bytes(shape.head_dim, tile) <= mosaic_gpu.SHARED_BYTES
    }
    cache = (batch, shape.kv_heads, slots, shape.head_dim)
    folded: Any = jax.ShapeDtypeStruct((*cache[:2], rows, shape.head_dim), jnp.bfloat16)
    stored: Any = jax.ShapeDtypeStruct(cache, jnp.bfloat16)
    return BenchCase(
        OP,
        tuning_key(folded, stored),
        functools.partial(_make_inputs, shape, batch, slots),
        candidates,
        _bytes_moved(shape, batch, slots),
    )
