# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of products with integer weights: layers of real models, few rows.

Baselines are XLA's form of the same product and a dense product in the type that the device
multiplies fast (bfloat16, float32 on CPU), which reads 16 or 32 bits per weight. Bandwidth is
counted from the packed weights for all of them.
"""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp

from pallas_kernels.bench import BenchCase
from pallas_kernels.bench.case import Candidate
from pallas_kernels.common import Target
from pallas_kernels.int_gemv.api import int_gemv
from pallas_kernels.int_gemv.packing import PackedWeights, pack
from pallas_kernels.int_gemv.shapes import SHAPES, LinearShape

OP = "int_gemv"
GROUP_SIZE = 128
ROWS = (1, 8, 64)
LAYERS = ("llama3-8b/q", "llama3-8b/kv", "llama3-8b/gate_up", "llama3-8b/down", "llama3-70b/down")
CPU_LAYERS = ("llama3.2-1b/q", "llama3.2-1b/gate_up", "llama3.2-1b/down")


def cases() -> list[BenchCase]:
    """Return layers of a model that suits the device, by rows, with 4 bits; then with 8 bits."""
    layers = CPU_LAYERS if jax.default_backend() == "cpu" else LAYERS
    grid = [*itertools.product(layers, ROWS, (4,)), (layers[0], 1, 8), (layers[-1], 1, 8)]
    return [_case(layer, rows, bits) for layer, rows, bits in grid]


def tune_cases(target: Target) -> list[BenchCase]:
    """Return cases named by keys of the tuning table, with sizes as candidates; Hopper only."""
    if target.capability != (9, 0):
        return []
    points = [*itertools.product(LAYERS, (8, 64), (4,)), *((name, 8, 8) for name in LAYERS)]
    tunable = [_tune_case(layer, rows, bits, target) for layer, rows, bits in points]
    return list({case.shape_name: case for case in tunable}.values())


def _case(layer: str, rows: int, bits: int) -> BenchCase:
    shape = SHAPES[layer]
    candidates: dict[str, Candidate | None] = {
        "ours": functools.partial(_multiply, backend="auto"),
        "xla": functools.partial(_multiply, backend="xla"),
        "dense": _multiply_dense,
    }
    make_inputs = functools.partial(_make_inputs, shape, rows, bits)
    name = f"{layer.replace('/', '_')}_m{rows}_b{bits}"
    return BenchCase(OP, name, make_inputs, candidates, _bytes_moved(shape, rows, bits))


def _bytes_moved(shape: LinearShape, rows: int, bits: int) -> int:
    """Return the bytes of codes, scales, x and the float32 result."""
    weights = shape.inputs * shape.outputs
    x = (4 if jax.default_backend() == "cpu" else 2) * rows * shape.inputs
    return weights * bits // 8 + 4 * weights // GROUP_SIZE + x + 4 * rows * shape.outputs


def _make_inputs(shape: LinearShape, rows: int, bits: int, seed: int):
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return _random(jax.random.key(seed), shape, rows, bits, dtype)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _random(key, shape: LinearShape, rows: int, bits: int, dtype):
    """Return x, packed weights and unrelated dense weights of the same size."""
    keys = jax.random.split(key, 4)
    size, highest = tuple(shape), 2 ** (bits - 1)
    codes = jax.random.randint(keys[0], size, -highest, highest, jnp.int8)
    groups = (shape.inputs // GROUP_SIZE, shape.outputs)
    weights = pack(codes, jax.random.uniform(keys[1], groups), bits=bits)
    x = jax.random.normal(keys[2], (rows, shape.inputs), dtype)
    return x, weights, jax.random.normal(keys[3], size, dtype)


def _multiply(x: jax.Array, weights: PackedWeights, dense: jax.Array, **options) -> jax.Array:
    del dense
    return int_gemv(x, weights, **options)


def _multiply_dense(x: jax.Array, weights: PackedWeights, dense: jax.Array) -> jax.Array:
    del weights
    return jnp.matmul(x, dense, preferred_element_type=jnp.float32)


def _tune_case(layer: str, rows: int, bits: int, target: Target) -> BenchCase:
    from pallas_kernels.int_gemv import mosaic_gpu

    shape = SHAPES[layer]
    options = {"group_size": GROUP_SIZE, "bits": bits}
    derived = mosaic_gpu.default_config(rows, *shape, **options, target=target)
    blocks = [(64, 1024 // bits), (128, 512 // bits)]
    sizes = [derived] + [
        mosaic_gpu.Config(block_n, block_k, stages, splits)
        for (block_n, block_k), stages in itertools.product(blocks, (3, 5))
        for splits in sorted({1, max(1, derived.splits // 2), derived.splits, 2 * derived.splits})
        if shape.inputs % block_k == 0 and shape.outputs % block_n == 0
    ]
    candidates: dict[str, Candidate | None] = {
        json.dumps(dataclasses.asdict(size)): functools.partial(
            _multiply, backend="mosaic_gpu", config=size
        )
        for size in sizes
        if mosaic_gpu.shared_bytes(size, rows, **options) <= mosaic_gpu.SHARED_BYTES
    }
    key = mosaic_gpu.tuning_key(rows, *shape, **options)
    make_inputs = functools.partial(_make_inputs, shape, rows, bits)
    return BenchCase(OP, key, make_inputs, candidates, _bytes_moved(shape, rows, bits))
