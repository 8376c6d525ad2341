# SPDX-License-Identifier: Apache-2.0
"""Angles of the rotary embedding, exact at any position.

The product of a position and a frequency in float32 is off by 0.06 radians at a million. Here it is
taken modulo a full turn in integers: a frequency is a 64-bit fraction of a turn, and the product of
32-bit words wraps around just where a turn does. Positions may be negative: keys stored before
rotation are turned relative to the query.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array


class Rotary(NamedTuple):
    """A rotation: radians per position of each pair `(i, i + H/2)`, and the factor of cos, sin."""

    inverse: Any  # H/2 floats, on the host
    factor: float = 1.0


def cos_sin(rotary: Rotary, positions: Array) -> tuple[Array, Array]:
    """Return float32 cos and sin `[..., H/2]` of int32 positions `[...]`, times the factor."""
    high, low = _fractions(np.asarray(rotary.inverse, np.float64))
    positions = positions.astype(jnp.int32)[..., None]
    size = jnp.abs(positions).astype(jnp.uint32)
    turn = size * high + _high_product(size, low)
    # As a signed number the turn lies in [-1/2, 1/2): its angle keeps all bits of a float32.
    angle = turn.astype(jnp.int32).astype(jnp.float32) * np.float32(2 * math.pi / 2**32)
    angle = jnp.where(positions < 0, -angle, angle)
    return jnp.cos(angle) * rotary.factor, jnp.sin(angle) * rotary.factor


def turn(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate the pairs (i, i + H/2) of the last axis of `x`; cos and sin broadcast against them."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _fractions(inverse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the two 32-bit words of each frequency as a fraction of a turn."""
    turns = np.mod(inverse / (2 * math.pi), 1.0)
    high = np.floor(turns * 2.0**32)
    low = np.floor((turns * 2.0**32 - high) * 2.0**32)
    return high.astype(np.uint32), low.astype(np.uint32)


def _high_product(a: Array, b: np.ndarray) -> Array:
    """Return the upper word of the 64-bit product of uint32 numbers."""
    a_high, a_low = a >> 16, a & 0xFFFF
    b_high, b_low = b >> 16, b & 0xFFFF
    middle = (a_low * b_low >> 16) + (a_high * b_low & 0xFFFF) + (a_low * b_high & 0xFFFF)
    return a_high * b_high + (a_high * b_low >> 16) + (a_low * b_high >> 16) + (middle >> 16)
