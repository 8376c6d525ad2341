# SPDX-License-Identifier: Apache-2.0
"""Time forward passes of a small model by tokens fed: a floor, then growth.

The step time of `floor + slope x tokens` is what the comparison of decoding regimes rests on: as
long as the floor (weights, launches) is most of it, tokens fed together are nearly free. A minute.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eval.machine import usable_cores
from sqzjax.kvcache import CacheStates, Dense
from sqzjax.models import DecoderLM, Execution, ModelConfig
from sqzjax.typing import Params

MODEL = ModelConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=704,
    num_layers=4,
    num_heads=4,
    max_positions=1024,
)
CONTEXT = 256
FED = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def measure(
    *, model: ModelConfig = MODEL, fed: tuple[int, ...] = FED, rounds: int = 150
) -> dict[str, Any]:
    """Return the best time of a pass for each number of tokens fed, and the fit.

    The tokens see a dense cache of `CONTEXT` keys and store nothing, as a denoising step does.
    Sizes take turns, and the best of `rounds` counts: a busy machine only ever adds time.
    """
    if rounds < 1 or not fed or min(fed) < 1:
        raise ValueError(f"rounds={rounds} and every number of fed={fed} must be >= 1")
    lm = DecoderLM(model, Execution(scan_layers=False))
    params = jax.jit(lm.init_params)(jax.random.key(0))
    caches = _filled(lm, params)
    steps = [_step(lm, params, caches, tokens) for tokens in fed]
    times: list[list[float]] = [[] for _ in fed]
    for step in steps:
        jax.block_until_ready(step())  # compiles
    for _ in range(rounds):
        for step, taken in zip(steps, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(step())
            taken.append(time.perf_counter() - start)
    seconds = [min(taken) for taken in times]
    floor, slope = fit(fed, seconds)
    predicted = floor + slope * np.array(fed)
    return {
        "device": jax.devices()[0].device_kind,
        "cores": usable_cores(),
        "hidden_size": model.hidden_size,
        "num_layers": model.num_layers,
        "context": CONTEXT,
        "rounds": rounds,
        "fed": list(fed),
        "ms": [round(1e3 * value, 4) for value in seconds],
        "floor_ms": round(1e3 * floor, 4),
        "slope_ms": round(1e3 * slope, 6),
        "largest_error_percent": round(100 * float(np.max(np.abs(predicted / seconds - 1))), 1),
    }


def fit(fed: tuple[int, ...], seconds: list[float]) -> tuple[float, float]:
    """Return floor and slope of `floor + slope x fed` with the least relative errors."""
    scale = 1 / np.array(seconds)
    matrix = np.stack([scale, scale * np.array(fed)], axis=1)
    floor, slope = np.linalg.lstsq(matrix, np.ones(len(fed)), rcond=None)[0]
    return float(floor), float(slope)


def _filled(lm: DecoderLM, params: Params) -> CacheStates:
    """Return a dense cache of `CONTEXT` tokens."""
    caches = lm.init_caches(Dense(), batch=1, capacity=CONTEXT, max_new=CONTEXT)
    past = jnp.arange(CONTEXT)[None]
    ids = past % lm.config.vocab_size
    fill = jax.jit(
        lambda params, caches: (
            lm.forward(params, ids, positions=past, caches=caches, logits="none").caches
        )
    )
    return fill(params, caches)


def _step(
    lm: DecoderLM, params: Params, caches: CacheStates, tokens: int
) -> Callable[[], jax.Array]:
    """Return a call that runs one pass over `tokens` new tokens and picks the likeliest ids."""
    ids = jnp.zeros((1, tokens), jnp.int32)
    positions = CONTEXT + jnp.arange(tokens)[None]

    @jax.jit
    def run(params: Params, caches: CacheStates) -> jax.Array:
        out = lm.forward(params, ids, positions=positions, caches=caches, update_cache=False)
        return jnp.argmax(out.logits, axis=-1)  # type: ignore[arg-type]

    return lambda: run(params, caches)
