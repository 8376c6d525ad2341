# SPDX-License-Identifier: Apache-2.0
"""Key/value cache policies and the states of a whole model's caches."""

from sqzjax.kvcache.base import Attended, AttentionSpec, KVCache, NewTokens, Query
from sqzjax.kvcache.dense import Dense, DenseState
from sqzjax.kvcache.losa import LoSA
from sqzjax.kvcache.quantized import KIVI, Quantized
from sqzjax.kvcache.quest import PagedState, Quest
from sqzjax.kvcache.states import (
    CacheStates,
    check_room,
    init_states,
    nbytes,
    reorder,
    report,
    truncate,
)

CacheConfig = Dense | Quest | LoSA | Quantized | KIVI
"""Union of the policies a configuration file may name by `kind`."""

__all__ = [
    "KIVI",
    "Attended",
    "AttentionSpec",
    "CacheConfig",
    "CacheStates",
    "Dense",
    "DenseState",
    "KVCache",
    "LoSA",
    "NewTokens",
    "PagedState",
    "Quantized",
    "Query",
    "Quest",
    "check_room",
    "init_states",
    "nbytes",
    "reorder",
    "report",
    "truncate",
]
