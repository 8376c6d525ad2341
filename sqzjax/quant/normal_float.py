# SPDX-License-Identifier: Apache-2.0
"""NormalFloat codes: fixed levels that suit normally distributed elements, nothing calibrated.

The control of KVQuant's fitted tables. Costs 32 bits of scale and offset per group, and a look-up
in place of a conversion when read.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from pallas_kernels.packing import pack
from pallas_kernels.qtensor import QTensor, stretch
from sqzjax.quant.base import Quantizer
from sqzjax.quant.codebooks import check_bits, nearest, normal_float
from sqzjax.quant.uniform import check_groups, check_width, extremes, stored_range
from sqzjax.typing import Array, Float, PyTree


@dataclass(frozen=True, kw_only=True)
class NormalFloat(Quantizer):
    """`bits`-bit NormalFloat levels between the least and the greatest element of each group.

    Groups are those of `Uniform`: `group_size` channels of a token, or tokens of a channel.
    """

    kind: Literal["normal_float"] = "normal_float"
    bits: int = 4
    axis: Literal["token", "channel"] = "token"
    group_size: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self.bits)
        check_groups(self.axis, self.group_size)

    @property
    def token_group(self) -> int:
        return self.group_size if self.axis == "channel" else 1

    def check(self, width: int) -> None:
        check_width(self.axis, self.group_size, width)

    def static(self, fitted: PyTree = None) -> dict[str, Array]:
        return {"table": jnp.asarray(normal_float(self.bits), jnp.float32)[None]}

    def encode(self, x: Float[Array, "... S H"], fitted: PyTree = None) -> QTensor:
        self.check_shape(x.shape)
        rows, width = x.shape[-2:]
        x = x.astype(jnp.float32)
        scale, offset = stored_range(*extremes(x, self.axis, self.group_size))
        x -= stretch(offset.astype(jnp.float32), rows, width)
        table = self.static()["table"]
        codes = nearest(x / stretch(scale.astype(jnp.float32), rows, width), table)
        packed = pack(codes, self.bits)
        tensor = QTensor(packed, scale, offset, None, None, None, self.bits, width)
        return self.complete(tensor)
