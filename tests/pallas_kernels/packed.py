# SPDX-License-Identifier: Apache-2.0
"""Packed keys and values of every form that caches use, at random or as shapes alone."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.packing import pack, words_of
from pallas_kernels.qtensor import QTensor

_pack = jax.jit(pack, static_argnums=1)


def _array(numbers, dtype):
    """Return an array that numpy rounded: jax would compile the conversion of each shape."""
    return jnp.asarray(np.asarray(numbers, jnp.dtype(dtype)))


@dataclass(frozen=True)
class Packed:
    """How a tensor is packed: `scale` "token" (of `group` channels, 0: all), "channel" (of `group`
    tokens) or "static"; `exact` slots per row."""

    bits: int
    scale: str = "token"
    group: int = 0
    offset: bool = True
    bias: int = 0
    table: bool = False
    exact: int = 0
    dtype: str = "float16"  # of scales, offsets and exact entries

    def _factors(self, shape) -> tuple[int, ...]:
        *lead, rows, width = shape
        if self.scale == "token":
            return (*lead, rows, width // (self.group or width))
        if self.scale == "channel":
            return (*lead, rows // self.group, width)
        return (1, lead[1], 1, width)

    def make(self, shape: tuple[int, ...], seed: int) -> QTensor:
        """Return a random tensor of elements of order one, `shape` `[B, K, S, H]`."""
        rng = np.random.default_rng(seed)
        middle = (2**self.bits - 1) / 2
        codes = _pack(_array(rng.integers(0, 2**self.bits, shape), "uint32"), self.bits)
        factors = self._factors(shape)
        size = 1.0 if self.table else 1 / middle
        scale = _array(rng.uniform(0.5, 1.5, factors) * size, self.dtype)
        offset = table = residual = place = None
        if self.offset:
            low = 0.0 if self.table else -1.0
            offset = _array(low + rng.normal(0, 0.3, factors), self.dtype)
        if self.table:
            table = _array(np.sort(rng.normal(0, 1, (1, 1, 1, 2**self.bits))), "float32")
        if self.exact:
            rows = math.prod(shape[:-1])
            columns = np.argsort(rng.random((rows, shape[-1])), axis=1)[:, : self.exact]
            columns = columns.reshape(*shape[:-1], self.exact)
            drawn = rng.normal(0, 2, columns.shape)
            # The second half of the rows have an unused slot, which lies at channel 0.
            drawn[..., shape[2] // 2 :, -1] = 0
            columns[..., shape[2] // 2 :, -1] = 0
            place, residual = _array(columns, "uint8"), _array(drawn, self.dtype)
        form = (self.bits, shape[-1], self.bias)
        return QTensor(codes, scale, offset, table, residual, place, *form)

    def struct(self, shape: tuple[int, ...]) -> QTensor:
        """Return the shapes and types of such a tensor."""
        of = jax.ShapeDtypeStruct
        factors = of(self._factors(shape), self.dtype)
        exact = (*shape[:-1], self.exact)
        return QTensor(
            codes=of((*shape[:-1], words_of(shape[-1], self.bits)), jnp.uint32),
            scale=factors,
            offset=factors if self.offset else None,
            table=of((1, 1, 1, 2**self.bits), jnp.float32) if self.table else None,
            residual=of(exact, self.dtype) if self.exact else None,
            place=of(exact, jnp.uint8) if self.exact else None,
            bits=self.bits,
            width=shape[-1],
            bias=self.bias,
        )


INT8 = Packed(8)
INT4 = Packed(4)
INT4_GROUPS = Packed(4, group=32)
SYMMETRIC = Packed(4, offset=False, bias=7)
KIVI_KEYS = Packed(2, "channel", 32)
KIVI_VALUES = Packed(2, group=32)
NUQ_KEYS = Packed(3, "static", table=True, exact=2)
NUQ_VALUES = Packed(3, table=True, exact=2)
NUQ4_KEYS = Packed(4, "static", table=True, exact=1)
NUQ4_VALUES = Packed(4, table=True, exact=1)
NUQ3_KEYS = Packed(3, "static", table=True, exact=1)
NUQ3_VALUES = Packed(3, table=True, exact=1)
NUQ2_KEYS = Packed(2, "static", table=True, exact=1)
NUQ2_VALUES = Packed(2, table=True, exact=1)
NORMAL_FLOAT = Packed(4, group=32, table=True)
