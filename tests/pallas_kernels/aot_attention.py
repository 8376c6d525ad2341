# SPDX-License-Identifier: Apache-2.0
"""Compile prefill and training attention of all real shapes for GPUs and TPUs."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.attention import attention
from pallas_kernels.attention.shapes import SHAPES, Shape
from tests.aot import Case
from tests.aot.targets import has_module

_CUDNN = ("causal", "bidirectional")
_QUICK = "llama1b_training_2k_splash"
"""The one case that the default tests compile; splash attention takes the compiler minutes."""


def aot_cases() -> list[Case]:
    """Return each shape forward and backward on the library kernels and on XLA.

    cuDNN chooses its plans itself, so its cases need its wheel even to be lowered.
    """
    cases = []
    with_cudnn = has_module("nvidia.cudnn")
    for name, shape in SHAPES.items():
        if shape.dtype == "float32":
            continue
        cases += _pair(f"{name}_splash", shape, "splash", "v5e")
        if with_cudnn and shape.mask.kind in _CUDNN:
            cases += _pair(f"{name}_cudnn", shape, "cudnn", "h200")
    for name in ("llama8b_training_8k", "blocks_prefill_4k"):
        cases += _pair(f"{name}_xla", SHAPES[name], "xla", "cuda", "tpu")
    return cases


def _pair(name: str, shape: Shape, backend: str, *targets: str) -> list[Case]:
    q = jax.ShapeDtypeStruct((shape.B, shape.T, shape.N, shape.H), shape.dtype)
    k = jax.ShapeDtypeStruct((shape.B, shape.K, shape.S, shape.H), shape.dtype)
    forward = partial(_forward, shape=shape, backend=backend)
    backward = partial(_backward, shape=shape, backend=backend)
    # Linear memory: some float32 copies of the queries, never the scores.
    bytes_of_rows = 4 * shape.B * shape.T * shape.N * max(shape.H, 128)
    most = 12 * bytes_of_rows + (1 << 28 if backend == "xla" else 0)
    fixed = {"targets": targets, "max_temporaries": most, "slow": name != _QUICK}
    return [
        Case(name, forward, (q, k, k), **fixed),
        Case(f"{name}_backward", backward, (q, k, k), **{**fixed, "slow": True}),
    ]


def _forward(q, k, v, *, shape: Shape, backend: str):
    return attention(q, k, v, mask=shape.mask, backend=backend)


def _backward(q, k, v, *, shape: Shape, backend: str):
    def loss(q, k, v):
        return jnp.sum(_forward(q, k, v, shape=shape, backend=backend).out)

    return jax.grad(loss, (0, 1, 2))(q, k, v)
