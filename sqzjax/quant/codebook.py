# SPDX-License-Identifier: Apache-2.0
"""Codes into a fitted table, with exact slots for the outliers of each row (arXiv 2401.18079).

The "nuqX" of KVQuant. The paper keeps 1 % of the numbers of a whole layer's vector; here each
(token, kv head) has slots of its own, a fixed number, so heads stay apart on a mesh and a tile is
decoded by compares alone. At 128 channels one slot is 0.78 % of the numbers and 24 bits per row:
nuq3-1% takes 3.19 bits of a key element and 3.44 of a value element, scale and offset included.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.packing import pack
from pallas_kernels.qtensor import QTensor, dequantize
from sqzjax.numerics import half
from sqzjax.quant.base import Quantizer
from sqzjax.quant.codebooks import check_bits, nearest, normal_float
from sqzjax.quant.uniform import stored_range
from sqzjax.typing import Array, Float, Int, PyTree


@dataclass(frozen=True, kw_only=True)
class Codebook(Quantizer):
    """`bits`-bit codes into a table, for elements scaled to [-1, 1].

    `axis` "token" finds scale and offset of each row, without the elements in its slots; "channel"
    takes those of each column, `[K, 1, H]` float32, from `fitted`, and gives the slots to the
    largest scaled magnitudes. `fitted["table"]` `[1, 2**bits]` are the levels by which codes are
    chosen (NormalFloat's without a calibration), `fitted["levels"]`, if any, those they stand for.
    `outliers` is the fraction of a row with a slot, rounded, at least one slot unless 0. A slot
    holds the residual to the element's own code in float16, so an outlier that finds no slot is
    merely clipped.
    """

    kind: Literal["codebook"] = "codebook"
    bits: int = 3
    axis: Literal["token", "channel"] = "token"
    outliers: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self.bits)
        if not 0 <= self.outliers <= 1:
            raise ValueError(f"outliers={self.outliers} must be a fraction in [0, 1]")

    def check(self, width: int) -> None:
        if width > 1 << 16:
            raise ValueError(f"{width} channels must be at most 65536, the places of outliers")

    def slots(self, width: int) -> int:
        """Return the slots of a row of `width` elements."""
        return max(1, round(self.outliers * width)) if self.outliers else 0

    def static(self, fitted: PyTree = None) -> dict[str, Array]:
        fitted = fitted or {}
        fields = {
            "table": _float32(fitted["levels"]) if "levels" in fitted else self._table(fitted)
        }
        if self.axis == "channel":
            if "scale" not in fitted:
                raise ValueError(
                    "axis='channel' needs the scales of a calibration; use the cache kind='kvquant'"
                )
            fields |= {name: _float32(fitted[name]) for name in ("scale", "offset")}
        return fields

    def encode(self, x: Float[Array, "... S H"], fitted: PyTree = None) -> QTensor:
        self.check_shape(x.shape)
        width = x.shape[-1]
        x = x.astype(jnp.float32)
        static = self.static(fitted)
        slots = self.slots(width)
        if self.axis == "channel":
            scale, offset = static["scale"], static["offset"]
            u = (x - offset) / scale
            place = jax.lax.top_k(jnp.abs(u), slots)[1] if slots else None
        else:
            low, high, place = row_range(x, slots)
            scale, offset = stored_range(low, high)
            u = (x - offset.astype(jnp.float32)) / scale.astype(jnp.float32)
        packed = pack(nearest(u, self._table(fitted or {})), self.bits)
        dense = QTensor(packed, scale, offset, None, None, None, self.bits, width)
        dense = self.complete(dense, fitted)
        return dense if place is None else _with_slots(dense, x, place)

    def _table(self, fitted: PyTree) -> Array:
        return _float32(fitted["table"] if "table" in fitted else normal_float(self.bits)[None])


def _float32(values: Any) -> Array:
    return jnp.asarray(values, jnp.float32)


def row_range(
    x: Float[Array, "... S H"], slots: int
) -> tuple[Float[Array, "... S 1"], Float[Array, "... S 1"], Int[Array, "... S E"] | None]:
    """Return the least and greatest element of each row without its outliers, and their places.

    The outliers are those `slots` extremes whose absence leaves the narrowest range.
    """
    width = x.shape[-1]
    if slots in (0, width):
        ends = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
        every = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), x.shape)
        return *ends, every if slots else None
    top, above = jax.lax.top_k(x, slots + 1)
    bottom, below = jax.lax.top_k(-x, slots + 1)
    # With i outliers above, slots - i below: the range of the rest.
    low, high = -bottom[..., ::-1], top
    best = jnp.argmin(high - low, axis=-1, keepdims=True)
    slot = jnp.arange(slots)
    upper = slot < best
    lower = jnp.take_along_axis(below, jnp.maximum(slot - best, 0), axis=-1)
    place = jnp.where(upper, above[..., :slots], lower)
    return (
        jnp.take_along_axis(low, best, axis=-1),
        jnp.take_along_axis(high, best, axis=-1),
        place,
    )


def _with_slots(dense: QTensor, x: Array, place: Array) -> QTensor:
    """Return `dense` with the residuals of `x` at `place`."""
    residual = jnp.take_along_axis(x - dequantize(dense), place, axis=-1)
    # Among equal elements the two ends of a row may name the same one, which counts once.
    same = place[..., :, None] == place[..., None, :]
    again = jnp.any(jnp.tril(same, -1), axis=-1)
    residual = half(jnp.where(again, 0, residual))
    place = place.astype(jnp.uint8 if dense.width <= 256 else jnp.uint16)
    fields = {"residual": residual, "place": place}
    return QTensor(**{**vars(dense), **fields})
