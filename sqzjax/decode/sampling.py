# SPDX-License-Identifier: Apache-2.0
"""From logits to tokens: penalties, temperature, filters and the draw, row by row.

Every setting is an array with one entry per row, so requests of any kind share a batch and a
compiled program. What a whole batch does not use is left out of the program (`SamplingMode`):
greedy decoding pays for an argmax and nothing else. All of it is float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sqzjax.decode.sampling_config import SamplingConfig
from sqzjax.typing import Array, Bool, Float, Int, Leaf, Shaped

__all__ = [
    "Sampler",
    "SamplingConfig",
    "SamplingMode",
    "choose",
    "logprobs_of",
    "sampler",
]

_COLDEST = 1e-6
"""Temperatures below this one behave like it: the best token wins with certainty."""
_HOTTEST = 1e30
_BLOCK = 256
_LOWEST = -1e30
"""Score that stands for minus infinity, so that a row of nothing else still has a winner."""


class SamplingMode(NamedTuple):
    """What any row of a batch asks for; static, so the rest is not compiled at all."""

    sample: bool = False
    filter: bool = False
    penalty: bool = False
    logprobs: bool = False


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "keys",
    ],
    meta_fields=["mode"],
)
@dataclass(frozen=True)
class Sampler:
    """Sampling settings of a batch, one entry per row."""

    temperature: Leaf  # B float32; 0 is greedy
    top_k: Leaf  # B int32; 0 keeps all
    top_p: Leaf  # B float32
    min_p: Leaf  # B float32
    repetition_penalty: Leaf  # B float32
    keys: Leaf  # B 3 uint32: seed, row id, number of the sample; more where a decoder draws anew
    mode: SamplingMode


def sampler(configs: Sequence[SamplingConfig], streams: Sequence[tuple[int, int]]) -> Sampler:
    """Gather the settings of all rows.

    `streams` holds (row id, number of the sample); rows with equal seed and stream draw alike.
    """
    temperature = [min(config.effective_temperature, _HOTTEST) for config in configs]
    drawn = [config for config, value in zip(configs, temperature) if value > 0]
    mode = SamplingMode(
        sample=bool(drawn),
        filter=any(c.top_k > 0 or c.top_p < 1 or c.min_p > 0 for c in drawn),
        penalty=any(config.repetition_penalty != 1 for config in configs),
        logprobs=any(config.logprobs for config in configs),
    )
    keys = [(config.seed, *stream) for config, stream in zip(configs, streams)]
    return Sampler(
        temperature=np.array(temperature, np.float32),
        top_k=np.array([config.top_k for config in configs], np.int32),
        top_p=np.array([config.top_p for config in configs], np.float32),
        min_p=np.array([config.min_p for config in configs], np.float32),
        repetition_penalty=np.array([c.repetition_penalty for c in configs], np.float32),
        keys=np.array(keys, np.uint32),
        mode=mode,
    )


def choose(
    logits: Float[Array, "B V"],
    settings: Sampler,
    positions: Int[Array, "B"],
    *,
    allowed: Bool[Array, "V"] | None = None,
    seen: Bool[Array, "B V"] | None = None,
) -> Int[Array, "B"]:
    """Return one token per row, in Hugging Face's order of processing.

    Repetition penalty (over the tokens marked in `seen`), then temperature, top-k, top-p, min-p,
    then the draw. `positions` are those of the tokens to be drawn and select the random numbers;
    ids outside `allowed` are never chosen.
    """
    scores = _penalised(logits, settings, allowed, seen)
    greedy = first_argmax(scores)
    if not settings.mode.sample:
        return greedy
    drawn = draw(_weights(scores, settings), uniforms(settings.keys, positions))
    return jnp.where(settings.temperature > 0, drawn, greedy)


def distribution(
    logits: Float[Array, "B V"],
    settings: Sampler,
    *,
    allowed: Bool[Array, "V"] | None = None,
    seen: Bool[Array, "B V"] | None = None,
) -> Float[Array, "B V"]:
    """Return the probabilities that `choose` draws from; a greedy row is all on one token."""
    scores = _penalised(logits, settings, allowed, seen)
    greedy = jax.nn.one_hot(first_argmax(scores), scores.shape[-1])
    if not settings.mode.sample:
        return greedy
    weights = _weights(scores, settings)
    weights = jnp.where(settings.temperature[:, None] > 0, weights, greedy)
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


def logprobs_of(
    logits: Float[Array, "B V"], tokens: Int[Array, "B"], allowed: Bool[Array, "V"] | None = None
) -> Float[Array, "B"]:
    """Return the log probabilities of `tokens` under softmax(logits), ids not `allowed` aside."""
    logits = logits.astype(jnp.float32)
    logits = logits if allowed is None else jnp.where(allowed, logits, _LOWEST)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def first_argmax(x: Float[Array, "B V"]) -> Int[Array, "B"]:
    """Return the lowest index of each row's maximum.

    Two plain reductions: XLA's argmax carries the index through one that does not vectorise, four
    to six times slower on CPU. Rows must be free of NaN.
    """
    index = jnp.arange(x.shape[-1], dtype=jnp.int32)
    best = x == jnp.max(x, axis=-1, keepdims=True)
    return jnp.min(jnp.where(best, index, x.shape[-1] - 1), axis=-1)


def uniforms(keys: Shaped[Array, "B k"], positions: Int[Array, "B"]) -> Float[Array, "B 2"]:
    """Return two numbers in [0, 1) that depend on a row's keys (seed first) and position."""

    def row(numbers, position):
        key = jax.random.key(numbers[0])
        for part in (*numbers[1:], position):
            key = jax.random.fold_in(key, part)
        return jax.random.uniform(key, (2,), jnp.float32)

    return jax.vmap(row)(keys, positions)


def draw(weights: Float[Array, "B V"], numbers: Float[Array, "B 2"]) -> Int[Array, "B"]:
    """Draw an index with probability proportional to its weight; weight 0 is never drawn.

    Inverse CDF with one number for the block of 256 indices and one for the index inside it: two
    numbers a row are far cheaper than V Gumbel variates, and two levels keep the resolution of a
    large vocabulary's tail that one float32 sum over all of it would lose.
    """
    rows, vocabulary = weights.shape
    padded = jnp.pad(weights, ((0, 0), (0, -vocabulary % _BLOCK)))
    blocks = padded.reshape(rows, -1, _BLOCK)
    block = _first_beyond(jnp.sum(blocks, axis=-1), numbers[:, 0])
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * _BLOCK + _first_beyond(inside, numbers[:, 1])


def _first_beyond(weights: Array, number: Array) -> Array:
    """Return the first index where the running sum exceeds `number` times the total."""
    running = jnp.cumsum(weights, axis=-1)
    index = jnp.arange(weights.shape[-1], dtype=jnp.int32)
    positive = weights > 0
    beyond = positive & (running > (number * running[:, -1])[:, None])
    first = jnp.min(jnp.where(beyond, index, weights.shape[-1]), axis=-1)
    # Rounding may leave no index beyond; the last one of positive weight was meant then.
    return jnp.minimum(first, jnp.max(jnp.where(positive, index, 0), axis=-1))


def _penalised(logits, settings, allowed, seen) -> Array:
    logits = logits.astype(jnp.float32)
    scores = jnp.where(logits > _LOWEST, logits, _LOWEST)  # minus infinity and NaN come last
    if settings.mode.penalty and seen is not None:
        penalty = settings.repetition_penalty[:, None]
        changed = jnp.where(scores < 0, scores * penalty, scores / penalty)
        scores = jnp.where(seen, changed, scores)
    return scores if allowed is None else jnp.where(allowed, scores, -jnp.inf)


def _weights(scores: Array, settings: Sampler) -> Array:
    """Return unnormalised probabilities after temperature and filters; the best token has 1."""
    temperature = jnp.maximum(settings.temperature, _COLDEST)[:, None]
    # The maximum goes first: dividing by a tiny temperature would overflow otherwise.
    best = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp((scores - best) / temperature)
    if not settings.mode.filter:
        return weights
    counts = jnp.ones_like(weights, jnp.int32)
    kept = jnp.where(settings.top_k > 0, settings.top_k, scores.shape[-1])
    weights = _keep_best(weights, counts, jnp.minimum(kept, scores.shape[-1]))
    mass = jnp.sum(weights, axis=-1)
    # Rounding must not cut the tail off where nothing was asked for.
    mass = jnp.where(settings.top_p < 1, settings.top_p * mass, 0.0)
    nucleus = _keep_best(weights, weights, mass)
    weights = jnp.where((settings.top_p < 1)[:, None], nucleus, weights)
    # Ratios of weights outlive any filter, and the best is 1: min-p is a bound on the weight.
    return jnp.where(weights >= settings.min_p[:, None], weights, 0.0)


def _keep_best(weights: Array, amounts: Array, needed: Array) -> Array:
    """Zero all but the largest weights whose `amounts` add up to `needed`, ties included.

    Bisection on the bit pattern, which orders floats in [0, 1] as integers: 30 sums over the
    vocabulary take a fiftieth of the time of sorting it on CPU.
    """
    bits = jax.lax.bitcast_convert_type(weights, jnp.int32)
    best = jnp.max(bits, axis=-1)

    def refine(index, edge):
        higher = edge | (1 << (29 - index))
        total = jnp.sum(jnp.where(bits >= higher[:, None], amounts, 0), axis=-1)
        # A subnormal `needed` is flushed to zero, which no weights at all would reach.
        return jnp.where((total >= needed) & (higher <= best), higher, edge)

    edge = jax.lax.fori_loop(0, 30, refine, jnp.zeros(weights.shape[0], jnp.int32))
    return jnp.where(bits >= edge[:, None], weights, 0.0)
