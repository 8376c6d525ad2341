# SPDX-License-Identifier: Apache-2.0
"""Products of a few rows with integer weights of 4 or 8 bits, scaled in groups."""

from pallas_kernels.int_gemv.api import int_gemv
from pallas_kernels.int_gemv.packing import PackedWeights, pack, quantize, unpack

__all__ = ["PackedWeights", "int_gemv", "pack", "quantize", "unpack"]
