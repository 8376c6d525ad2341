# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding in the half-split form of Hugging Face checkpoints.

Kinds: default (arXiv 2104.09864), linear interpolation (2306.15595), llama3, yarn (2309.00071).
Frequencies are computed once in float64 on the host; angles are float32, exact at any position.
"""

import math

import jax.numpy as jnp
import numpy as np

from pallas_kernels.rotary import Rotary, cos_sin
from sqzjax.attention.rope_config import RopeConfig
from sqzjax.typing import Array, Float, Int


def frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Return inverse frequencies `[head_dim / 2]` (radians per position) and the cos/sin factor."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    inverse = rope.theta**-exponents
    factor = 1.0 if rope.attention_factor is None else rope.attention_factor
    if rope.kind == "linear":
        inverse = inverse / rope.factor
    elif rope.kind == "llama3":
        inverse = _llama3(rope, inverse)
    elif rope.kind == "yarn":
        inverse = _yarn(rope, inverse, head_dim)
        factor = _yarn_attention_factor(rope)
    return inverse.astype(np.float32), factor


def _llama3(rope: RopeConfig, inverse: np.ndarray) -> np.ndarray:
    """Slow wavelengths are stretched, fast ones kept, those between blended."""
    turns = rope.original_max_positions * inverse / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return (1 - blend) * inverse / rope.factor + blend * inverse


def _yarn(rope: RopeConfig, inverse: np.ndarray, head_dim: int) -> np.ndarray:
    """NTK-by-parts: dimensions that turn often are kept, the others interpolated (Eq. 17-23)."""

    def dimension_of(turns: float) -> float:
        span = math.log(rope.original_max_positions / (turns * 2 * math.pi))
        return head_dim * span / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    return inverse / rope.factor * ramp + inverse * (1 - ramp)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def scale(multiplier: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * multiplier * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


def angles(
    rope: RopeConfig, head_dim: int, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]]:
    """Return float32 cos and sin of `positions`, one column per rotated pair."""
    return cos_sin(rotary(rope, head_dim), positions)


def rotary(rope: RopeConfig, head_dim: int) -> Rotary:
    """Return the rotation as the kernels know it."""
    return Rotary(*frequencies(rope, head_dim))


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T H2"], sin: Float[Array, "B T H2"]
) -> Float[Array, "B T N H"]:
    """Rotate the pairs (i, i + H/2) of every head; computed in float32, returned in x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
