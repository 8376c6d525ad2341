# SPDX-License-Identifier: Apache-2.0
"""Caches whose parts are float16 hold numbers beyond it: saturated, never infinite or NaN."""

import jax.numpy as jnp
import numpy as np
import pytest

from sqzjax.kvcache import GEAR, KIVI, KVQuant, Quantized, XQuant
from sqzjax.quant import Codebook, NormalFloat, Uniform
from tests.contracts.caches import CASES as CACHES
from tests.contracts.caches import CacheCase
from tests.contracts.layer import BATCH, Layer

(KVQUANT,) = (case for case in CACHES if case.name == "kvquant")
SYMMETRIC, TABLE = Uniform(symmetric=True), NormalFloat(axis="channel", group_size=4)
CASES = (
    CacheCase("gear", GEAR(group_size=8, rank=2)),
    CacheCase("kivi", KIVI(group_size=4, residual_length=0)),
    CacheCase("kvquant", KVQuant(sinks=0), fitted=KVQUANT.fitted),
    CacheCase("slots", Quantized(key=Uniform(bits=8), value=Codebook(outliers=0.2))),
    CacheCase("symmetric", Quantized(key=SYMMETRIC, value=TABLE)),
    CacheCase("xquant", XQuant(bits=4, form="input", residual_length=0)),
    CacheCase(
        "xquant_latent",
        XQuant(bits=4, form="latent", group_size=4, residual_length=0, exact_first=True),
    ),
)
FACTOR, LENGTH = 3e5, 16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attention_over_large_numbers_is_finite(case, dtype):
    layer = Layer(CacheCase(case.name, case.policy, fitted=case.fitted, dtype=dtype), LENGTH)
    layer.x = layer.x.at[..., 3].multiply(FACTOR)
    new = layer.new(np.arange(LENGTH))
    assert all(jnp.abs(x).max() > 1e5 for x in (new.k, new.v, new.x))
    state = layer.fill(case.policy.init(layer.spec, BATCH), LENGTH)
    np.testing.assert_array_equal(state.coded, [LENGTH] * BATCH)
    out = np.asarray(layer.attend(state, layer.query(np.arange(14, LENGTH))).partial.out)
    assert np.all(np.isfinite(out))
    assert np.abs(out).max() > 2e4  # as near as the format comes, not zero
