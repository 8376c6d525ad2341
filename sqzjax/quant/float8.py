# SPDX-License-Identifier: Apache-2.0
"""8-bit floating-point elements: half the bytes of bfloat16, nothing to look up, no groups."""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np

from pallas_kernels.qtensor import QTensor
from sqzjax.quant.base import Quantizer
from sqzjax.typing import Array, Float, PyTree

FORMATS = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}


@dataclass(frozen=True, kw_only=True)
class Float8(Quantizer):
    """Elements divided by one scale per head and rounded to 8 bits.

    The scale is fixed, so that a token's codes do not depend on the others: `fitted["scale"]`
    `[K, 1, 1]`, the largest magnitude over `largest`, or 1 without a calibration: up to 448.
    Larger elements saturate; e4m3 has no infinity and would turn them into NaN. "e5m2" has a bit
    less precision and is not recommended.
    """

    kind: Literal["float8"] = "float8"
    format: Literal["e4m3", "e5m2"] = "e4m3"

    @property
    def largest(self) -> float:
        """Return the largest finite value of the format."""
        return float(jnp.finfo(FORMATS[self.format]).max)

    def check(self, width: int) -> None:
        del width

    def static(self, fitted: PyTree = None) -> dict[str, Array]:
        scale = np.ones((1, 1)) if fitted is None else fitted["scale"]
        return {"scale": jnp.asarray(scale, jnp.float32)}

    def encode(self, x: Float[Array, "... S H"], fitted: PyTree = None) -> QTensor:
        self.check_shape(x.shape)
        x = x.astype(jnp.float32) / self.static(fitted)["scale"]
        codes = jnp.clip(x, -self.largest, self.largest).astype(FORMATS[self.format])
        tensor = QTensor(codes, None, None, None, None, None, 8, x.shape[-1])
        return self.complete(tensor, fitted)
