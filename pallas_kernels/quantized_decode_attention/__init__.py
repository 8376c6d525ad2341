# SPDX-License-Identifier: Apache-2.0
"""Decode attention over packed keys and values."""

from pallas_kernels.quantized_decode_attention.api import quantized_decode_attention

__all__ = ["quantized_decode_attention"]
