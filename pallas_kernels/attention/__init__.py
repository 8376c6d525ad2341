# SPDX-License-Identifier: Apache-2.0
"""Attention of many queries, for prefill and training; see `api`."""

from pallas_kernels.attention.api import Attention, attention, merge, noisy_clean_attention
from pallas_kernels.attention.mask import AttentionMask

__all__ = ["Attention", "AttentionMask", "attention", "merge", "noisy_clean_attention"]
