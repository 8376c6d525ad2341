# SPDX-License-Identifier: Apache-2.0
"""Time decode steps at a given context, without prefilling it.

The cache starts out full of random keys and values, and the library's own decoding loop runs on
from there, so a context of 32k costs no 32k prefill. Speed does not depend on the values. The
decoder's program is compiled once per shape; weights, caches and outputs stay on the device.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eval.speed_trace import Breakdown, measure_breakdown
from sqzjax import kvcache
from sqzjax.analysis import Hardware, Precision, Workload, decode_bytes, operators, roofline
from sqzjax.decode import SamplingConfig
from sqzjax.decode.autoregressive import Autoregressive, AutoregressiveState
from sqzjax.decode.base import Output, advance
from sqzjax.decode.sampling import sampler
from sqzjax.kvcache import CacheStates
from sqzjax.models import DecoderLM
from sqzjax.typing import Key, Params

_NO_STOP = -1


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Speed of decode steps of one model, batch size and context; times in milliseconds.

    `step_ms` is the median over runs of `steps` steps each, `context` the cached tokens before
    the first of them. `step_bytes`: weights and cache that a step must move at the mean context.
    """

    batch: int
    context: int
    dtype: str
    num_params: int
    steps: int
    seconds: tuple[float, ...]
    step_ms: float
    tokens_per_second: float
    cache_bytes: int
    step_bytes: int
    roofline_ms: float | None
    roofline_percent: float | None
    bound: str | None
    breakdown: Breakdown | None


def measure_steps(
    model: DecoderLM,
    params: Params,
    *,
    batch: int,
    context: int,
    steps: int = 16,
    repeats: int = 5,
    hardware: Hardware | None = None,
    breakdown: bool = True,
    seed: int = 0,
) -> StepResult:
    """Time greedy decode steps that begin with `context` cached tokens in every row.

    `params` must have the layout of `model`; unrolled layers decode fastest.
    """
    decoder = Autoregressive(model=model)
    key = jax.random.key(seed)
    state = jax.jit(lambda key: start_state(decoder, batch, context, steps, key))(key)
    compiled = advance.lower(decoder, params, state, steps).compile()
    cache_bytes = kvcache.nbytes(state.caches)
    run = _runner(compiled, params, state, batch, context, steps)
    run()
    seconds = tuple(run() for _ in range(repeats))
    step = float(np.median(seconds)) / steps

    mean, dtype = context + (steps + 1) // 2, model.execution.dtype
    precision = Precision.uniform(8 * jnp.dtype(dtype).itemsize)
    limit = None
    if hardware is not None:
        work = Workload(phase="decode", batch=batch, context=mean)
        limit = roofline(operators(model.config, precision, work), hardware)
    parts = None
    if breakdown:
        parts = measure_breakdown(compiled, run, steps=steps, step_seconds=step)
    return StepResult(
        batch=batch,
        context=context,
        dtype=dtype,
        num_params=model.config.num_params,
        steps=steps,
        seconds=seconds,
        step_ms=1e3 * step,
        tokens_per_second=batch / step,
        cache_bytes=cache_bytes,
        step_bytes=int(decode_bytes(model.config, precision, batch, mean)),
        roofline_ms=None if limit is None else 1e3 * limit.seconds,
        roofline_percent=None if limit is None else 100 * limit.fraction(step),
        bound=None if limit is None else limit.bound,
        breakdown=parts,
    )


def filled_caches(
    model: DecoderLM, cache: kvcache.Dense, *, batch: int, context: int, room: int, key: Key
) -> CacheStates:
    """Return caches that hold `context` random tokens a row and take `room` more, one at a time."""
    empty = model.init_caches(cache, batch=batch, capacity=context + room, max_new=1)
    leaves, structure = jax.tree.flatten(empty)

    def fill(leaf: Any, key: Key) -> Any:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jax.random.normal(key, leaf.shape, leaf.dtype)
        return jnp.full_like(leaf, context)  # lengths

    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(structure, [fill(leaf, k) for leaf, k in zip(leaves, keys)])


def start_state(
    decoder: Autoregressive, batch: int, context: int, steps: int, key: Key
) -> AutoregressiveState:
    """Return the state of `decoder` before `steps` steps, its cache filled with random content."""
    caches = filled_caches(
        decoder.model, kvcache.Dense(), batch=batch, context=context, room=steps, key=key
    )
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=steps)
    settings = sampler([greedy] * batch, [(row, 0) for row in range(batch)])
    return AutoregressiveState(
        output=_empty_output(batch, steps),
        caches=caches,
        pending=jnp.zeros(batch, jnp.int32),
        seen=None,
        sampler=jax.tree.map(jnp.asarray, settings),
    )


def _empty_output(batch: int, steps: int) -> Output:
    zeros = jnp.zeros(batch, jnp.int32)
    return Output(
        tokens=jnp.zeros((batch, steps), jnp.int32),
        lengths=zeros,
        reason=jnp.zeros_like(zeros),
        limits=jnp.full(batch, steps, jnp.int32),
        stop_ids=jnp.full((batch, 1), _NO_STOP, jnp.int32),
        logprobs=None,
    )


def _runner(
    compiled: Any, params: Params, state: AutoregressiveState, batch: int, context: int, steps: int
) -> Callable[[], float]:
    """Return a function that runs all steps from the start and gives the seconds they took."""
    held = [state]

    def run() -> float:
        # The state was donated: outputs are made anew, the cache forgets what the last run added.
        length = jnp.full(batch, context, jnp.int32)
        caches = kvcache.truncate(held[0].caches, length)
        ready = replace(held[0], output=_empty_output(batch, steps), caches=caches)
        jax.block_until_ready(ready)
        began = time.perf_counter()
        held[0], done = compiled(params, ready, jnp.int32(steps))
        jax.block_until_ready(held[0])
        seconds = time.perf_counter() - began
        if int(done) != steps:
            raise RuntimeError(f"{int(done)} of {steps} steps ran; the decoder stopped early")
        return seconds

    return run
