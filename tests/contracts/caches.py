# SPDX-License-Identifier: Apache-2.0
"""Every cache policy with the settings under which it must pass the contract.

`policy` is given a budget that keeps everything; `tolerance` names the row of the tolerance table
its attention output is held to.
"""

from dataclasses import dataclass

from sqzjax.kvcache import KIVI, Dense, KVCache, LoSA, Quantized, Quest


@dataclass(frozen=True)
class CacheCase:
    """One policy under one shape; `window` makes the layer a sliding-window one."""

    name: str
    policy: KVCache
    window: int | None = None
    capacity: int = 64
    dtype: str = "float32"


CASES = (
    CacheCase("dense", Dense()),
    CacheCase("dense_bf16", Dense(), dtype="bfloat16"),
    CacheCase("dense_ring", Dense(), window=9),
    CacheCase("dense_blocks", Dense(), capacity=2500),
    CacheCase("kivi", KIVI(group_size=8, residual_length=64)),
    CacheCase("kivi_pre_rope", KIVI(group_size=8, residual_length=64, rope="pre")),
    CacheCase("losa", LoSA(budget=64)),
    CacheCase("quantized", Quantized(residual_length=64)),
    CacheCase("quest", Quest(budget=2512), capacity=2500),
)
