# SPDX-License-Identifier: Apache-2.0
"""The public function of this folder: a product with integer weights, on the best backend."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels.common import Backend, check, current_target, dispatch
from pallas_kernels.int_gemv.packing import LAYOUTS, PackedWeights
from pallas_kernels.int_gemv.xla import int_gemv_xla

_FLOATS = ("bfloat16", "float16", "float32")


def int_gemv(
    x: Array,
    weights: PackedWeights,
    *,
    backend: Backend = "auto",
    dtype: Any = jnp.float32,
    interpret: Any = None,
    config: Any = None,
) -> Array:
    """Return `x @ kernel` for x `[..., K_in]` and a packed kernel `[K_in, N]`.

    Meant for few rows (decoding): the kernels take up to 64 in all leading axes, XLA any number.
    Codes are exact in the type of x, products are added in float32 and scaled group by group; the
    result is cast to `dtype` last. Packed for one platform, weights work on all, slower. `backend`
    "auto" takes the kernel of the device at hand, else XLA; `interpret` runs a named kernel on CPU;
    `config` are the tile sizes of the named backend, None = tuned or derived.
    """
    _check_arguments(x, weights)
    rule = f"must be one of {', '.join(_FLOATS)}"
    check("dtype", jnp.dtype(dtype).name, jnp.dtype(dtype).name in _FLOATS, rule)
    inputs, outputs = weights.shape
    rows = x.reshape(-1, inputs)
    target = current_target()
    if 0 in (rows.shape[0], outputs):
        return jnp.zeros((*x.shape[:-1], outputs), dtype)
    sizes = {"group_size": weights.group_size, "bits": weights.bits, "target": target}

    def mosaic_gpu() -> Array:
        if weights.layout != "words":
            raise NotImplementedError("mosaic_gpu: reads weights packed for a GPU (layout 'words')")
        # Not at the top: these load the compilers' bindings, which XLA's path does without.
        from pallas_kernels.int_gemv.mosaic_gpu import int_gemv_mosaic_gpu

        return int_gemv_mosaic_gpu(
            rows, weights.codes, weights.scales, **sizes, config=config, interpret=interpret
        )

    def mosaic_tpu() -> Array:
        if weights.layout != "rows":
            raise NotImplementedError("mosaic_tpu: reads weights packed for a TPU (layout 'rows')")
        from pallas_kernels.int_gemv.mosaic_tpu import int_gemv_mosaic_tpu

        return int_gemv_mosaic_tpu(
            rows, weights.codes, weights.scales, **sizes, config=config, interpret=interpret
        )

    implementations = {
        "mosaic_gpu": mosaic_gpu,
        "mosaic_tpu": mosaic_tpu,
        "xla": lambda: int_gemv_xla(rows, weights, target=target),
    }
    named = {"backend": backend, "interpret": interpret, "config": config}
    y = dispatch("int_gemv", implementations, target=target, **named)
    return y.reshape(*x.shape[:-1], outputs).astype(dtype)


def _check_arguments(x: Any, weights: Any) -> None:
    rule = "must be PackedWeights; make them with pack(codes, scales, bits=...)"
    check("weights", type(weights).__name__, isinstance(weights, PackedWeights), rule)
    check("weights.layout", weights.layout, weights.layout in LAYOUTS, f"must be one of {LAYOUTS}")
    check("weights.bits", weights.bits, weights.bits in (4, 8), "must be 4 or 8")
    shapes = (tuple(weights.codes.shape), tuple(weights.scales.shape))
    kind = "uint32" if weights.layout == "words" else f"int{weights.bits}"
    rule = f"must be {kind} in layout {weights.layout!r}; make them with pack"
    check("weights.codes.dtype", str(weights.codes.dtype), weights.codes.dtype == kind, rule)
    two = all(len(shape) == 2 for shape in shapes)
    rule = "must have two axes each; take one layer of stacked weights (jax.tree.map or scan)"
    check("weights' shapes", shapes, two, rule)
    inputs, outputs = weights.shape
    group_size = weights.group_size
    divides = group_size > 0 and inputs % group_size == 0
    good = divides and shapes[1] == (inputs // group_size, outputs)
    rule = f"do not fit together with group_size={group_size}; make them with pack"
    check("weights' shapes", shapes, good, rule)
    rule = f"must be one of {', '.join(_FLOATS)}; cast it"
    check("x.dtype", str(x.dtype), str(x.dtype) in _FLOATS, rule)
    good = x.ndim > 0 and x.shape[-1] == inputs
    rule = f"must end in K_in={inputs}, the inputs of the weights"
    check("x.shape", tuple(x.shape), good, rule)
