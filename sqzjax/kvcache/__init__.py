# SPDX-License-Identifier: Apache-2.0
"""Key/value cache policies and the states of a whole model's caches."""

from sqzjax.kvcache.alisa import ALISA
from sqzjax.kvcache.base import Attended, AttentionSpec, KVCache, NewTokens, Query
from sqzjax.kvcache.dense import Dense, DenseState
from sqzjax.kvcache.gear import GEAR
from sqzjax.kvcache.h2o import H2O
from sqzjax.kvcache.kvquant import KVQuant
from sqzjax.kvcache.losa import LoSA
from sqzjax.kvcache.mustafar import Mustafar
from sqzjax.kvcache.quantized import KIVI, Quantized
from sqzjax.kvcache.quest import PagedState, Quest
from sqzjax.kvcache.scissorhands import Scissorhands
from sqzjax.kvcache.states import (
    CacheStates,
    check_room,
    init_states,
    nbytes,
    reorder,
    report,
    truncate,
)
from sqzjax.kvcache.streaming import StreamingLLM
from sqzjax.kvcache.xquant import XQuant
from sqzjax.kvcache.xquant_cl import XQuantCL

CacheConfig = (
    Dense
    | KVQuant
    | Quest
    | LoSA
    | Quantized
    | KIVI
    | StreamingLLM
    | H2O
    | GEAR
    | Scissorhands
    | ALISA
    | XQuant
    | XQuantCL
    | Mustafar
)
"""Union of the policies a configuration file may name by `kind`."""

__all__ = [
    "ALISA",
    "GEAR",
    "H2O",
    "KIVI",
    "Attended",
    "AttentionSpec",
    "CacheConfig",
    "CacheStates",
    "Dense",
    "DenseState",
    "KVCache",
    "KVQuant",
    "LoSA",
    "Mustafar",
    "NewTokens",
    "PagedState",
    "Quantized",
    "Query",
    "Quest",
    "Scissorhands",
    "StreamingLLM",
    "XQuant",
    "XQuantCL",
    "check_room",
    "init_states",
    "nbytes",
    "reorder",
    "report",
    "truncate",
]
