# SPDX-License-Identifier: Apache-2.0
"""Integer codes at equal distances, per token or per channel, in groups of any size.

The quantizer of KIVI (arXiv 2402.02750), XQuant (2508.10395) and the plain INT8/INT4 caches.
Rounds half to even; scales are computed in float32 and stored in 16 bits, and codes are chosen for
the stored scales. A group whose elements are all equal is exact.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from pallas_kernels.packing import PLANES, pack
from pallas_kernels.qtensor import QTensor, stretch
from sqzjax.quant.base import Quantizer
from sqzjax.typing import Array, Float, PyTree

TINY = 2.0**-14
"""The least normal float16: a smaller scale would lose its bits."""


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
        if self.bits not in PLANES:
            raise ValueError(f"bits={self.bits} must be one of {', '.join(map(str, PLANES))}")
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
        rows, width = x.shape[-2:]
        x = x.astype(jnp.float32)
        low, high = extremes(x, self.axis, self.group_size)
        half = 2 ** (self.bits - 1) - 1
        bias, top = (half, 2 * half) if self.symmetric else (0, 2**self.bits - 1)
        span = jnp.maximum(-low, high) / half if self.symmetric else (high - low) / top
        scale = jnp.maximum(span, TINY).astype(jnp.float16)
        offset = None if self.symmetric else low.astype(jnp.float16)
        if offset is not None:
            x -= stretch(offset.astype(jnp.float32), rows, width)
        levels = jnp.round(x / stretch(scale.astype(jnp.float32), rows, width)).astype(jnp.int32)
        packed = pack(jnp.clip(levels + bias, 0, top), self.bits)
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
    """Return the float16 scale and offset that map [-1, 1] to [low, high]."""
    scale = jnp.maximum((high - low) / 2, TINY).astype(jnp.float16)
    return scale, ((high + low) / 2).astype(jnp.float16)


def check_groups(axis: str, group_size: int) -> None:
    """Raise ValueError unless the settings describe groups."""
    if group_size < 0 or (axis == "channel" and group_size == 0):
        raise ValueError(
            f"group_size={group_size} must be >= 1 (0, all channels, for axis='token')"
        )


def check_width(axis: str, group_size: int, width: int) -> None:
    """Raise ValueError unless rows of `width` elements are whole groups."""
    if axis == "token" and group_size and width % group_size:
        raise ValueError(
            f"group_size={group_size} must divide the {width} channels of a head; use 0 for all "
            "of them"
        )
