# SPDX-License-Identifier: Apache-2.0
"""Every cache policy with the settings under which it must pass the contract.

`policy` is given a budget that keeps everything; `tolerance` names the row of the tolerance table
its attention output is held to.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from sqzjax.kvcache import (
    ALISA,
    GEAR,
    H2O,
    KIVI,
    Dense,
    KVCache,
    KVQuant,
    LoSA,
    Mustafar,
    Quantized,
    Quest,
    Scissorhands,
    StreamingLLM,
    XQuant,
    XQuantCL,
)
from sqzjax.kvcache.similar import Similar


@dataclass(frozen=True)
class CacheCase:
    """One policy under one shape; `window` makes the layer a sliding-window one."""

    name: str
    policy: KVCache
    window: int | None = None
    capacity: int = 64
    dtype: str = "float32"
    fitted: Any = None  # what `fit` would make, for methods that need a calibration
    slow: bool = False  # left to the slow tests: another setting of a policy stands for it


_TABLE = np.linspace(-1, 1, 8, dtype=np.float32)[None]
_RANGES = {"scale": np.full((2, 1, 8), 3, np.float32), "offset": np.zeros((2, 1, 8), np.float32)}
_KVQUANT = {"k": {"table": _TABLE, **_RANGES}, "v": {"table": _TABLE}}

_CL = XQuantCL(first_bits=16, first_layers=1, accumulator="float32")

CASES = (
    CacheCase("alisa", ALISA(budget=64)),
    CacheCase("dense", Dense()),
    CacheCase("dense_bf16", Dense(), dtype="bfloat16"),
    CacheCase("dense_ring", Dense(), window=9),
    CacheCase("dense_blocks", Dense(), capacity=2500),
    CacheCase("gear", GEAR(group_size=8, residual_length=64)),
    CacheCase("h2o", H2O(budget=64)),
    CacheCase("kivi", KIVI(group_size=8, residual_length=64)),
    CacheCase("kivi_pre_rope", KIVI(group_size=8, residual_length=64, rope="pre"), slow=True),
    CacheCase("kvquant", KVQuant(residual_length=64), fitted=_KVQUANT),
    CacheCase("losa", LoSA(budget=64)),
    CacheCase(
        "mustafar", Mustafar(key_sparsity=0.0, value_sparsity=0.0, residual_length=6, group_size=4)
    ),
    CacheCase("quantized", Quantized(residual_length=64), slow=True),
    CacheCase("quest", Quest(budget=2512), capacity=2500),
    CacheCase("scissorhands", Scissorhands(budget=64)),
    CacheCase("similar", Similar()),
    CacheCase("streaming_llm", StreamingLLM(budget=64)),
    CacheCase("xquant", XQuant(bits=16, residual_length=4)),
    CacheCase(
        "xquant_latent", XQuant(bits=16, form="latent", residual_length=4), window=9, slow=True
    ),
    CacheCase("xquant_cl_base", _CL.layer_policy(0, 2), slow=True),
)


def parameters(cases: tuple[CacheCase, ...]) -> list:
    """Return the cases as parameters of a test, named and marked."""
    marks = {True: (pytest.mark.slow,), False: ()}
    return [pytest.param(case, id=case.name, marks=marks[case.slow]) for case in cases]
