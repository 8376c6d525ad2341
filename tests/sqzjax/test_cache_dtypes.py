# SPDX-License-Identifier: Apache-2.0
"""Caches of models that compute in 16 bits: XLA on CPU lacks products that other devices have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqzjax.kvcache import (
    ALISA,
    GEAR,
    H2O,
    KIVI,
    Dense,
    Mustafar,
    Quantized,
    Scissorhands,
    StreamingLLM,
    XQuant,
    XQuantCL,
)
from sqzjax.models import Execution, fit_cache
from sqzjax.quant import Uniform
from tests.contracts.decoders import tiny_model
from tests.parameters import drawn
from tests.tolerances import LOGITS_16_BITS

POLICIES = {
    "xquant_latent": XQuant(bits=8, group_size=8, form="latent", residual_length=4),
}
OTHERS = {
    "alisa": ALISA(budget=64),
    "dense": Dense(),
    "gear": GEAR(bits=4, group_size=4, residual_length=4),
    "h2o": H2O(budget=64),
    "kivi": KIVI(bits=4, group_size=4, residual_length=4),
    "kivi_before_rotation": KIVI(bits=4, group_size=4, residual_length=4, rope="pre"),
    "mustafar": Mustafar(),
    "quantized": Quantized(key=Uniform(bits=8), value=Uniform(bits=8)),
    "scissorhands": Scissorhands(budget=64),
    "streaming_llm": StreamingLLM(budget=64),
    "xquant_input": XQuant(bits=8, group_size=8, form="input", residual_length=4),
    "xquant_cl": XQuantCL(bits=4, group_size=8, first_layers=1),
}
TOKENS = np.random.default_rng(0).integers(0, 50, (2, 24)).astype(np.int32)


def _logits(policy, dtype):
    """Logits of tokens that come eight at a time, the later ones from codes of the earlier."""
    model = tiny_model().copy(execution=Execution(dtype=dtype, scan_layers=False))
    # With other numbers 16 bits round some to another code, which costs more than the rounding.
    params = fit_cache(model, drawn(model, 3, scale=1.7), policy)

    @jax.jit
    def step(caches, tokens, positions):
        out = model.forward(params, tokens, positions=positions, caches=caches)
        return out.caches, out.logits

    caches, found = model.init_caches(policy, batch=2, capacity=32, max_new=8), []
    for start in range(0, TOKENS.shape[1], 8):
        positions = jnp.broadcast_to(start + jnp.arange(8), (2, 8))
        caches, logits = step(caches, TOKENS[:, start : start + 8], positions)
        found.append(logits)
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [*POLICIES, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_logits_are_those_of_32_bits(name, dtype):
    policy = {**POLICIES, **OTHERS}[name]
    exact, found = _logits(policy, "float32"), _logits(policy, dtype)
    error = np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2))
    assert error < LOGITS_16_BITS[dtype], error
