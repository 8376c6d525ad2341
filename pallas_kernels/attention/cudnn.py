# SPDX-License-Identifier: Apache-2.0
"""cuDNN's flash attention for NVIDIA GPUs: causal, bidirectional or a causal window, 16 bits.

It goes by index, knows no segments as ids and no softcap. jax's own entry point rounds the
log-sum-exp to the dtype of the output, too coarse for merging, and drops its cotangent without a
word; hence the function below it, whose log-sum-exp is float32, and a backward pass that leaves
the rare case of a used log-sum-exp to XLA.
"""

from functools import partial
from typing import cast

import jax.numpy as jnp
from jax import Array

from pallas_kernels.attention import library
from pallas_kernels.common import Target

_NAME = "cudnn"


def attention_cudnn(
    q: Array, k: Array, v: Array, segments, problem, *, target: Target
) -> tuple[Array, Array]:
    """Return (out, log-sum-exp); raises NotImplementedError for what cuDNN cannot do."""
    mask = problem.mask
    if target.platform != "gpu":
        raise NotImplementedError(f"{_NAME}: needs a GPU, not a {target.platform}")
    library.check_problem(_NAME, problem)
    if q.dtype == jnp.float32:
        raise NotImplementedError(f"{_NAME}: computes in 16 bits, not float32")
    if mask.kind not in ("causal", "bidirectional"):
        raise NotImplementedError(f"{_NAME}: no kind={mask.kind!r}")
    if mask.window is not None and mask.kind != "causal":
        raise NotImplementedError(f"{_NAME}: a window needs kind='causal', not {mask.kind!r}")
    if segments is not None:
        raise NotImplementedError(f"{_NAME}: segments are not ids but ranges there")
    if problem.softcap is not None:
        raise NotImplementedError(f"{_NAME}: no softcap")
    width = q.shape[-1]
    largest = 256 if (target.capability or (0, 0)) >= (9, 0) else 128
    if width % 8 or width > largest:
        raise NotImplementedError(f"{_NAME}: H={width} is not a multiple of 8 up to {largest}")
    if mask.kind == "causal" and q.shape[1] > k.shape[2]:
        # Not among the shapes that cuDNN documents.
        raise NotImplementedError(f"{_NAME}: causal with T={q.shape[1]} > S={k.shape[2]}")
    run = partial(_run, causal=mask.kind == "causal", window=mask.window, scale=problem.scale)
    return library.with_backward(run, q, k, v, None, problem)


def _run(q, k, v, segments, differentiable, *, causal: bool, window: int | None, scale: float):
    """Return (out, float32 log-sum-exp); differentiable in the output alone."""
    del segments, differentiable
    try:
        from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention
    except ImportError as error:
        raise NotImplementedError(f"{_NAME}: unknown to this jax ({error})") from error
    try:
        pair = dot_product_attention(
            q,
            jnp.swapaxes(k, 1, 2),
            jnp.swapaxes(v, 1, 2),
            scale=scale,
            mask_type=MaskType.CAUSAL if causal else MaskType.NO_MASK,
            sliding_window_length=window,
            return_residual=True,
        )
    except RuntimeError as error:
        raise NotImplementedError(f"{_NAME}: {error}") from error
    out, lse = cast(tuple[Array, Array], pair)
    return out.astype(jnp.float32), jnp.swapaxes(lse, 1, 2)
