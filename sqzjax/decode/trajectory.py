# SPDX-License-Identifier: Apache-2.0
"""Teacher trajectories: in which order a masked diffusion model fills a response, and from what.

Algorithm 1 of CDLM (arXiv 2511.19269): block after block, one token per step, the position of
highest confidence first. A whole trajectory is the final tokens and the step at which each was
filled: the state before step k shows exactly the positions of rank < k. The hidden states stand
for the teacher's distributions, about V / D times smaller than they are.

No cache, hence exact for bidirectional models: `length` forward passes over prompt and response.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sqzjax.decode.autoregressive import allowed_tokens
from sqzjax.decode.sampling import draw, first_argmax
from sqzjax.models import DecoderLM
from sqzjax.typing import Array, Bool, Float, Int, Key, Params


class Trajectory(NamedTuple):
    """How the responses of a batch were filled; index i is the i-th token after the prompt.

    Positions beyond a row's response have rank -1, token 0 and hidden state 0.
    """

    tokens: Array  # B Lg int32
    rank: Array  # B Lg int32: the step that filled the position
    hidden: Array  # B Lg D: final-norm state that the token was read from, at that step


def response_lengths(
    lengths: Int[Array, "B"], length: int, block_size: int, *, aligned: bool
) -> Int[Array, "B"]:
    """Return how many tokens follow each prompt: `length`, `aligned` cut to end with a block."""
    if not aligned:
        return jnp.full_like(lengths, length)
    return (lengths + length) // block_size * block_size - lengths


def visible(rank: Int[Array, "*B n"], step: Int[Array, "*B"]) -> Bool[Array, "*B n"]:
    """Return which positions the state before `step` shows; one step per row."""
    return (rank >= 0) & (rank < step[..., None])


def collect(
    model: DecoderLM,
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    *,
    length: int,
    block_size: int,
    temperature: float = 0.0,
    key: Key | None = None,
    rows: Int[Array, "B"] | None = None,
    aligned: bool = False,
) -> Trajectory:
    """Fill `length` masked positions after each right-padded prompt, one per step.

    Blocks start right after the prompt, or, `aligned`, at multiples of `block_size` as for
    block-causal students: the first block then begins with the prompt's tail, and a response
    ends with its last whole block. The most confident position is that of the largest
    probability; its token is the best one, or drawn at `temperature` with random numbers that
    depend on `key`, the row's number in `rows` and the step alone.
    """
    config = model.config
    if config.mask == "causal" or config.tokens.mask is None:
        raise ValueError(
            f"mask={config.mask!r}, mask token {config.tokens.mask} ({config.family}): "
            "trajectories need a model with a mask token that is not causal"
        )
    if length < 1 or block_size < 1 or temperature < 0:
        raise ValueError(
            f"length={length} and block_size={block_size} must be >= 1, temperature={temperature} "
            ">= 0"
        )
    if aligned and length < block_size:
        raise ValueError(
            f"length={length} must be >= block_size={block_size}, or a response may hold no block"
        )
    if temperature > 0 and key is None:
        raise ValueError(f"temperature={temperature} draws tokens and needs a key; give key=...")
    rows = jnp.arange(tokens.shape[0]) if rows is None else rows
    key = jax.random.key(0) if key is None else key
    settings = (length, block_size, temperature > 0, aligned)
    return _collect(model, settings, params, tokens, lengths, jnp.float32(temperature), key, rows)


@partial(jax.jit, static_argnums=(0, 1))
def _collect(model, settings, params, tokens, lengths, temperature, key, rows) -> Trajectory:
    length, block_size, sample, aligned = settings
    count = response_lengths(lengths, length, block_size, aligned=aligned)
    canvas = jnp.pad(tokens.astype(jnp.int32), ((0, 0), (0, length)))
    place = jnp.arange(canvas.shape[1], dtype=jnp.int32)
    canvas = jnp.where(place < lengths[:, None], canvas, model.config.tokens.mask)
    positions = jnp.where(place < (lengths + count)[:, None], place, -1)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
    allowed = allowed_tokens(model.config)

    def step(number, carry):
        canvas, filled = carry
        out = model.forward(
            params, canvas, positions=positions, logits="none", return_hidden="last"
        )
        start = _block_start(lengths, number, block_size, aligned)
        index = start[:, None] + jnp.arange(block_size, dtype=jnp.int32)
        open_ = (index >= lengths[:, None]) & (index < (lengths + count)[:, None])
        open_ &= jnp.take_along_axis(filled.rank, _inside(index - lengths[:, None], length), 1) < 0
        source = _inside(index - model.config.shift_logits, canvas.shape[1])
        hidden = jnp.take_along_axis(out.hidden, source[..., None], axis=1)
        logits = model.head(params, hidden)
        logits = logits if allowed is None else jnp.where(allowed, logits, -jnp.inf)
        best = first_argmax(jnp.where(open_, _confidence(logits), -1.0))
        hidden, logits = (_pick(x, best) for x in (hidden, logits))
        token = first_argmax(logits)
        if sample:
            token = _drawn(logits, temperature, keys, number)
        target = jnp.take_along_axis(index, best[:, None], axis=1)[:, 0]
        now = jnp.any(open_, axis=1)
        canvas = jnp.where((place == target[:, None]) & now[:, None], token[:, None], canvas)
        hit = jnp.arange(length) == (target - lengths)[:, None]
        hit &= now[:, None]
        return canvas, Trajectory(
            jnp.where(hit, token[:, None], filled.tokens),
            jnp.where(hit, number, filled.rank),
            jnp.where(hit[..., None], hidden[:, None], filled.hidden),
        )

    shape = (tokens.shape[0], length)
    width = (*shape, model.config.hidden_size)
    empty = Trajectory(
        jnp.zeros(shape, jnp.int32),
        jnp.full(shape, -1, jnp.int32),
        jnp.zeros(width, model.execution.dtype),
    )
    return jax.lax.fori_loop(0, length, step, (canvas, empty))[1]


def _block_start(lengths: Array, step: Array, block_size: int, aligned: bool) -> Array:
    """Return where the block begins that holds the `step`-th position of each response."""
    if aligned:
        return (lengths + step) // block_size * block_size
    return lengths + step // block_size * block_size


def _inside(index: Array, size: int) -> Array:
    return jnp.clip(index, 0, size - 1)


def _pick(x: Array, index: Array) -> Array:
    """Return `x[b, index[b]]` of `x [B, n, ...]`."""
    return jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]


def _confidence(logits: Float[Array, "B n V"]) -> Float[Array, "B n"]:
    """Return the largest probability of each distribution."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    return 1.0 / jnp.sum(jnp.exp(logits - top), axis=-1)


def _drawn(logits: Array, temperature: Array, keys: Array, step: Array) -> Array:
    """Return one token per row, drawn at `temperature`."""
    numbers = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, step), (2,)))(keys)
    weights = jnp.exp((logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature)
    return draw(weights, numbers)
