# SPDX-License-Identifier: Apache-2.0
"""Decode attention to chosen pages of a cache; see `api`."""

from pallas_kernels.paged_decode_attention.api import paged_decode_attention

__all__ = ["paged_decode_attention"]
