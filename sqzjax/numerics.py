# SPDX-License-Identifier: Apache-2.0
"""Small numerical helpers shared by the whole library; everything reduces in float32.

What is cheap to compute again is not kept for the backward pass: norms and gates would take a good
part of the memory of a small decoder's training step.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.common import MASK_VALUE
from sqzjax.typing import Array, Float

__all__ = ["MASK_VALUE", "dot", "half", "rms_norm", "saturated", "swiglu", "vocabulary_dot"]
_LARGEST_HALF = float(jnp.finfo(jnp.float16).max)


@partial(jax.checkpoint, static_argnums=2)
def rms_norm(
    x: Float[Array, "... D"], scale: Float[Array, "D"], eps: float
) -> Float[Array, "... D"]:
    """Normalise by the root mean square in float32, cast back, then multiply by `scale`.

    The cast before the multiplication is what the published checkpoints were trained with.
    """
    wide = x.astype(jnp.float32)
    # The gradient of `square` would write out the constant 2 in the shape of `x`.
    variance = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(variance + eps)).astype(x.dtype) * scale.astype(x.dtype)


@jax.checkpoint
def swiglu(gate: Float[Array, "... F"], up: Float[Array, "... F"]) -> Float[Array, "... F"]:
    """Return silu(gate) * up (arXiv 2002.05202)."""
    return jax.nn.silu(gate) * up


def saturated(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return `x` in float32, what lies beyond the finite range of float16 at its end."""
    # Not in bfloat16, where the end would be rounded to a number beyond it.
    return jnp.clip(x.astype(jnp.float32), -_LARGEST_HALF, _LARGEST_HALF)


def half(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return `x` in float16, saturated: a plain cast makes infinities, and these NaN later."""
    return saturated(x).astype(jnp.float16)


def dot(x: Float[Array, "... I"], kernel: Float[Array, "I O"]) -> Float[Array, "... O"]:
    """Multiply by a `[in, out]` kernel in the dtype of `x`, accumulating in float32.

    Rows are flattened first: the gradient of a product with several leading axes makes XLA on CPU
    lay out the kernel's gradient transposed, which costs a quarter of a training step.
    """
    rows = x.reshape(-1, x.shape[-1])
    product = jnp.matmul(rows, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
    return product.astype(x.dtype).reshape(*x.shape[:-1], -1)


def vocabulary_dot(x: Float[Array, "R D"], embedding: Float[Array, "V D"]) -> Float[Array, "R V"]:
    """Float32 logits of rows `x` against embedding rows (tied head).

    XLA on CPU runs `x @ embedding.T` with one row seven times slower than the product taken from
    the left, because it walks the embedding by columns.
    """
    embedding = embedding.astype(x.dtype)
    if x.shape[0] == 1:
        return jnp.einsum("vd,rd->vr", embedding, x, preferred_element_type=jnp.float32).T
    return jnp.einsum("rd,vd->rv", x, embedding, preferred_element_type=jnp.float32)
