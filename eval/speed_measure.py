# SPDX-License-Identifier: Apache-2.0
"""Time generation and training steps of one model, and relate them to the roofline.

Every timing follows a warm-up that compiles, and ends when the device is done. Two views of
decoding: whole greedy generations (tokens/s, time to first token, mean time per output token) and
a stream that hands over every token, whose steps give a median and a 90th percentile.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eval.machine import seconds_of
from eval.speed_config import SpeedEmulator
from eval.train_step import adamw_step, emulator_step
from sqzjax.analysis import (
    Hardware,
    Precision,
    Workload,
    decode_bytes,
    operators,
    roofline,
    swin_flops,
    training_flops,
)
from sqzjax.decode import Generator, SamplingConfig
from sqzjax.models import DecoderLM, Execution
from sqzjax.models.swin import SwinEmulator
from sqzjax.typing import Params


@dataclass(frozen=True, kw_only=True)
class SpeedResult:
    """Decode speed of one model at one batch size; times in milliseconds, medians over repeats.

    `tokens_per_second` counts the new tokens of all sequences over whole calls, prefill included.
    `ttft_ms`: call to first token. `tpot_ms`: a step inside the decode loop. `step_ms` and
    `step_p90_ms`: a step of a stream, the token fetched by the host (`num_steps` of them).
    `step_bytes`: weights and cache that a step must move at the mean context. `roofline_percent`:
    the roofline's time of such a step over `tpot_ms`.
    """

    batch: int
    prompt_len: int
    new_tokens: int
    dtype: str
    num_params: int
    seconds: tuple[float, ...]
    tokens_per_second: float
    ttft_ms: float
    tpot_ms: float
    step_ms: float
    step_p90_ms: float
    num_steps: int
    cache_bytes: int
    step_bytes: int
    roofline_ms: float | None
    roofline_percent: float | None
    bound: str | None


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Speed of a training step (forward, backward, AdamW); `mfu_percent` needs a hardware record.

    `flops` counts matrix operations, 3 times the forward pass, every attention score included.
    """

    batch: int
    seq_len: int
    dtype: str
    num_params: int
    step_ms: float
    step_p90_ms: float
    num_steps: int
    tokens_per_second: float
    flops: float
    mfu_percent: float | None


@dataclass(frozen=True, kw_only=True)
class EmulatorResult:
    """Speed of an emulator's training step; `num_params` counts all of its weights."""

    batch: int
    dtype: str
    remat: str
    layers: str
    num_params: int
    seconds: tuple[float, ...]
    step_ms: float
    samples_per_second: float
    flops: float
    mfu_percent: float | None


def random_prompts(vocab_size: int, batch: int, prompt_len: int, seed: int) -> list[list[int]]:
    """Return equally long prompts of random ids, the same for the same arguments."""
    ids = np.random.default_rng(seed).integers(3, max(4, vocab_size), (batch, prompt_len))
    return ids.tolist()


def greedy(new_tokens: int) -> SamplingConfig:
    """Return the request for exactly `new_tokens` greedy tokens."""
    return SamplingConfig(temperature=0.0, max_new_tokens=new_tokens, ignore_eos=True)


def measure_decode(
    model: DecoderLM,
    params: Params,
    *,
    batch: int,
    prompt_len: int,
    new_tokens: int,
    repeats: int = 5,
    hardware: Hardware | None = None,
    seed: int = 0,
) -> SpeedResult:
    """Time greedy generation with the dense cache; `hardware` adds the roofline columns."""
    config, dtype = model.config, model.execution.dtype
    prompts = random_prompts(config.vocab_size, batch, prompt_len, seed)
    generator, sampling = Generator(model, params), greedy(new_tokens)
    generator.generate(prompts, sampling)
    seconds, stats = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        stats.append(generator.generate(prompts, sampling).stats)
        seconds.append(time.perf_counter() - start)
    steps = _stream_steps(generator, prompts, sampling)
    tpot = _median([one.tpot_seconds for one in stats])

    # Means over the generation: every step sees one token more than the last.
    context = prompt_len + new_tokens // 2
    precision = Precision.uniform(8 * jnp.dtype(dtype).itemsize)
    limit = None
    if hardware is not None:
        work = Workload(phase="decode", batch=batch, context=context)
        limit = roofline(operators(config, precision, work), hardware)
    return SpeedResult(
        batch=batch,
        prompt_len=prompt_len,
        new_tokens=new_tokens,
        dtype=dtype,
        num_params=config.num_params,
        seconds=tuple(seconds),
        tokens_per_second=batch * new_tokens / _median(seconds),
        ttft_ms=1e3 * _median([one.ttft_seconds for one in stats]),
        tpot_ms=1e3 * tpot,
        step_ms=1e3 * _median(steps),
        step_p90_ms=1e3 * float(np.quantile(steps, 0.9)),
        num_steps=len(steps),
        cache_bytes=stats[0].cache_bytes,
        step_bytes=int(decode_bytes(config, precision, batch, context)),
        roofline_ms=None if limit is None else 1e3 * limit.seconds,
        roofline_percent=None if limit is None else 100 * limit.fraction(tpot),
        bound=None if limit is None else limit.bound,
    )


def _stream_steps(
    generator: Generator, prompts: list[list[int]], sampling: SamplingConfig
) -> list[float]:
    """Return seconds between the tokens of a stream; the first token, of the prefill, is left out.

    The first stream is a warm-up of the host's side: the loop itself is compiled already.
    """
    for _ in range(2):
        arrivals = [time.perf_counter() for _ in generator.stream(prompts, sampling)]
    return np.diff(arrivals).tolist()


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))


def measure_train_step(
    model: DecoderLM,
    params: Params,
    *,
    batch: int,
    seq_len: int,
    repeats: int = 20,
    hardware: Hardware | None = None,
    seed: int = 0,
) -> TrainResult:
    """Time AdamW steps of the library's next-token loss on random ids; `params` stay unchanged."""
    ids = np.random.default_rng(seed).integers(0, model.config.vocab_size, (batch, seq_len + 1))
    tokens = jnp.asarray(ids, jnp.int32)
    seconds = _step_seconds(adamw_step(model), params, tokens, repeats)
    median = _median(seconds)
    flops = training_flops(model.config, batch, seq_len)
    return TrainResult(
        batch=batch,
        seq_len=seq_len,
        dtype=model.execution.dtype,
        num_params=model.config.num_params,
        step_ms=1e3 * median,
        step_p90_ms=1e3 * float(np.quantile(seconds, 0.9)),
        num_steps=repeats,
        tokens_per_second=batch * seq_len / median,
        flops=float(flops),
        mfu_percent=None if hardware is None else 100 * flops / median / hardware.peak_flops,
    )


def measure_emulator(
    entry: SpeedEmulator,
    *,
    dtype: str = "float32",
    repeats: int = 20,
    hardware: Hardware | None = None,
    seed: int = 0,
) -> EmulatorResult:
    """Time AdamW steps of one-step forecasts; `flops` by the formula of arXiv 2603.25687's code."""
    config = entry.architecture
    execution = Execution(dtype=dtype, remat=entry.remat, scan_layers=entry.scan_layers)  # type: ignore[arg-type]
    model = SwinEmulator(config, execution)
    keys = jax.random.split(jax.random.key(seed))
    shape = (entry.batch, config.context + 1, config.in_channels, *config.grid.shape)
    fields = jax.random.normal(keys[0], shape)
    params = jax.jit(model.init_params)(keys[1])
    seconds = _step_seconds(emulator_step(model), params, fields, repeats)
    median = _median(seconds)
    flops = swin_flops.training_flops(config, entry.batch)
    return EmulatorResult(
        batch=entry.batch,
        dtype=dtype,
        remat=entry.remat,
        layers="stacked" if entry.scan_layers else "unrolled",
        num_params=sum(leaf.size for leaf in jax.tree.leaves(params)),
        seconds=seconds,
        step_ms=1e3 * median,
        samples_per_second=entry.batch / median,
        flops=flops,
        mfu_percent=None if hardware is None else 100 * flops / median / hardware.peak_flops,
    )


def _step_seconds(
    built: tuple[Any, Callable[..., tuple[Any, Any]]], params: Params, batch: Any, repeats: int
) -> tuple[float, ...]:
    """Time steps that go on from each other, on a copy of `params`."""
    optimizer, pure = built
    step = jax.jit(pure, donate_argnums=(0, 1))
    held = [(jax.tree.map(jnp.copy, params), optimizer.init(params))]

    def run() -> Any:
        held[0] = step(*held[0], batch)
        return held[0]

    return seconds_of(run, repeats)
