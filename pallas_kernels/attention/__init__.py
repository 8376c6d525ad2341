# SPDX-License-Identifier: Apache-2.0
"""Attention of many queries, for prefill and training; see `api`."""

from pallas_kernels.attention.api import attention, noisy_clean_attention
from pallas_kernels.attention.mask import AttentionMask
from pallas_kernels.partials import Partial, merge

__all__ = ["AttentionMask", "Partial", "attention", "merge", "noisy_clean_attention"]
