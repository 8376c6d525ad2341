# SPDX-License-Identifier: Apache-2.0
"""Attention of up to some tens of query rows per sequence over a cache; see `api`."""

from pallas_kernels.decode_attention.api import MAX_QUERIES, decode_attention
from pallas_kernels.decode_attention.xla import slot_positions

__all__ = ["MAX_QUERIES", "decode_attention", "slot_positions"]
