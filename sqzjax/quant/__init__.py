# SPDX-License-Identifier: Apache-2.0
"""Quantizers: policies that turn arrays into packed `QTensor`s."""

from pallas_kernels.packing import pack, unpack
from pallas_kernels.qtensor import QTensor, dequantize
from sqzjax.quant.base import Quantizer
from sqzjax.quant.codebook import Codebook
from sqzjax.quant.float8 import Float8
from sqzjax.quant.normal_float import NormalFloat
from sqzjax.quant.uniform import Uniform

QuantizerConfig = Uniform | NormalFloat | Float8 | Codebook
"""Union of the quantizers that a configuration file may name by `kind`."""

__all__ = [
    "Codebook",
    "Float8",
    "NormalFloat",
    "QTensor",
    "Quantizer",
    "QuantizerConfig",
    "Uniform",
    "dequantize",
    "pack",
    "unpack",
]
