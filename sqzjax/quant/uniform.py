# SPDX-License-Identifier: Apache-2.0
"""Integer codes at equal distances, per token or per channel, in groups of any size.

The quantizer of KIVI (arXiv 2402.02750), XQuant (2508.10395) and the plain INT8/INT4 caches.
Rounds half to even; scales are computed in float32 and stored in 16 bits, and codes are chosen for
the stored scales. Elements that are all equal come back within a relative 2**-11. No step is finer
than 2**-24, the least float16, and what a group's scale and offset cannot reach saturates.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from pallas_kernels.packing import PLANES, pack
from pallas_kernels.qtensor import QTensor, stretch
from sqzjax.checks import check_choice, check_count
from sqzjax.numerics import half, saturated
from sqzjax.quant.base import Quantizer
from sqzjax.typing import Array, Float, PyTree

TINY = 2.0**-24
"""The least float16, and the distance between those below `_NORMAL`."""
_NORMAL = 2.0**-14
"""The least float16 that has all its bits."""


@dataclass(frozen=True, kw_only=True)
class Uniform(Quantizer):
    """`bits`-bit integers with a scale, and unless `symmetric` an offset, per group.

    `axis` "token": a group is `group_size` consecutive channels of one token (0: all of them).
    "channel": `group_size` consecutive tokens of one channel. Symmetric codes span
    -(2**(bits-1) - 1) .. 2**(bits-1) - 1.
    """

    kind: Literal["uniform"] = "uniform"
    bits: int = 4
    axis: Literal["token", "channel"] = "token"
    group_size: int = 0
    symmetric: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("bits", self.bits, PLANES)
        if self.symmetric and self.bits < 2:
            raise ValueError(f"bits={self.bits} must be >= 2 for symmetric codes")
        check_groups(self.axis, self.group_size)

    @property
    def token_group(self) -> int:
        return self.group_size if self.axis == "channel" else 1

    def check(self, width: int) -> None:
        check_width(self.axis, self.group_size, width)

    def encode(self, x: Float[Array, "... S H"], fitted: PyTree = None) -> QTensor:
        del fitted
        self.check_shape(x.shape)
        rows, width = x.shape[-2:]
        x = x.astype(jnp.float32)
        low, high = extremes(x, self.axis, self.group_size)
        most = 2 ** (self.bits - 1) - 1
        bias, top = (most, 2 * most) if self.symmetric else (0, 2**self.bits - 1)
        if self.symmetric:
            scale, offset = stored_scale(jnp.maximum(-low, high) / most), None
        else:
            # From the offset as it is stored, below the least element, to the greatest.
            offset = _half_below(low)
            below = offset.astype(jnp.float32)
            scale = stored_scale((high - below) / top)
            x -= stretch(below, rows, width)
        levels = jnp.round(x / stretch(scale.astype(jnp.float32), rows, width))
        # Clipped before the cast, beyond whose range levels may lie.
        packed = pack(jnp.clip(levels + bias, 0, top).astype(jnp.int32), self.bits)
        return QTensor(packed, scale, offset, None, None, None, self.bits, width, bias)


def extremes(x: Array, axis: str, group_size: int) -> tuple[Array, Array]:
    """Return the least and greatest element of each group of `x`, `[..., S', H']`.

    Groups are those of `Uniform`.
    """
    rows, width = x.shape[-2:]
    if axis == "channel":
        shape, reduced = (rows // group_size, group_size, width), -2
    else:
        group = group_size or width
        shape, reduced = (rows, width // group, group), -1
    groups = x.reshape(*x.shape[:-2], *shape)
    return groups.min(reduced), groups.max(reduced)


def stored_range(low: Array, high: Array) -> tuple[Array, Array]:
    """Return the float16 scale and offset that map [-1, 1] to [low, high].

    The scale grows by what the offset misses: it is rounded, and saturates beyond float16.
    """
    middle = (high + low) / 2
    offset = half(middle)
    missed = jnp.abs(middle - offset.astype(jnp.float32))
    return stored_scale((high - low) / 2 + missed), offset


def _half_below(x: Array) -> Array:
    """Return `x` rounded down to float16, saturated."""
    nearest = half(x)
    above = nearest.astype(jnp.float32) > saturated(x)
    return jnp.where(above, jnp.nextafter(nearest, jnp.float16(-jnp.inf)), nearest)


def stored_scale(scale: Array) -> Array:
    """Return scales as float16, at least `TINY`.

    Few bits are left of small ones, which are rounded up: rounded down, the ends of a group would
    lie beyond the last code.
    """
    up = jnp.ceil(scale / TINY) * TINY
    return half(jnp.maximum(jnp.where(scale < _NORMAL, up, scale), TINY))


def check_groups(axis: str, group_size: int) -> None:
    """Raise ValueError unless the settings describe groups."""
    least = 1 if axis == "channel" else 0
    check_count("group_size", group_size, least, "0, all channels, is for axis='token'")


def check_width(axis: str, group_size: int, width: int) -> None:
    """Raise ValueError unless rows of `width` elements are whole groups."""
    if axis == "token" and group_size and width % group_size:
        divisors = [size for size in range(1, group_size) if width % size == 0]
        raise ValueError(
            f"group_size={group_size} must divide the {width} channels that are coded; use one of "
            f"{divisors[-3:]}"
        )
