# SPDX-License-Identifier: Apache-2.0
"""What each key and value counts in the codebooks of a KVQuant calibration (arXiv 2401.18079).

An element counts with the curvature of the loss, its squared gradient, times its squared scale
(Eq. 7); what lies beyond its range, with a slot or clipped, counts in no codebook.
"""

from functools import partial

import jax
import jax.numpy as jnp

from sqzjax.quant.codebook import row_range
from sqzjax.quant.uniform import TINY
from sqzjax.typing import Array, Bool, Float


@partial(jax.jit, static_argnums=(0, 1))
def scaled_keys(
    weighting: str,
    slots: int,
    ranges: Float[Array, "2 K H"],
    x: Float[Array, "T K H"],
    gradient: Float[Array, "T K H"],
    mask: Bool[Array, "T"],
) -> tuple[Array, Array, Array]:
    """Return scaled keys, their weights, and sums `[2, 3]` over what is clipped.

    A weight is 0 for what is not to count in the codebook. The sums are of weight, weight times
    number and weight times its square, of what lies below and above the range without a slot.
    """
    scale, offset = ranges
    u, weight = _weighted(weighting, x, gradient, scale, offset, mask)
    inside = jnp.abs(u) <= 1 + 1e-6
    place = jax.lax.top_k(jnp.abs(u), slots)[1]
    clipped = jnp.where(inside, 0, weight)
    clipped = jnp.put_along_axis(clipped, place, 0, axis=-1, inplace=False)
    sides = jnp.stack([jnp.where(u < 0, clipped, 0), jnp.where(u > 0, clipped, 0)])
    sums = [jnp.sum(sides * u**power, axis=(1, 2, 3)) for power in range(3)]
    return u, jnp.where(inside, weight, 0), jnp.stack(sums, axis=-1)


@partial(jax.jit, static_argnums=(0, 1))
def scaled_values(
    weighting: str,
    slots: int,
    x: Float[Array, "T K H"],
    gradient: Float[Array, "T K H"],
    mask: Bool[Array, "T"],
) -> tuple[Array, Array]:
    """Return scaled values and their weights, 0 for what is not to count.

    The range is found as the cache will find it, before it is rounded to 16 bits.
    """
    low, high, _ = row_range(x, slots)
    scale, offset = jnp.maximum((high - low) / 2, TINY), (high + low) / 2
    u, weight = _weighted(weighting, x, gradient, scale, offset, mask)
    return u, jnp.where(jnp.abs(u) <= 1 + 1e-6, weight, 0)


def _weighted(weighting: str, x, gradient, scale, offset, mask) -> tuple[Array, Array]:
    """Return numbers `[T, K, H]` as scaled, and the weight of their squared errors."""
    u = (x - offset) / scale
    weight = jnp.ones_like(u) if weighting == "none" else jnp.square(gradient)
    if weighting != "released":
        weight = weight * jnp.square(scale)
    return u, jnp.where(mask[:, None, None], weight, 0)
