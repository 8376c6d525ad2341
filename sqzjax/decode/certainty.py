# SPDX-License-Identifier: Apache-2.0
"""How sure a diffusion model is of the tokens it predicts: what commit policies go by."""

import jax
import jax.numpy as jnp

from sqzjax.decode.commit import Score
from sqzjax.decode.sampling import Sampler, distribution
from sqzjax.typing import Array, Float, Int


def probability(logits: Float[Array, "R V"], token: Int[Array, "R"]) -> Float[Array, "R"]:
    """Return the probability of one token per row."""
    found = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return jnp.exp(found - jax.nn.logsumexp(logits, axis=-1))


def tempered(logits: Float[Array, "R V"], settings: Sampler) -> Float[Array, "R V"]:
    """Return logits of the distribution that is drawn from; greedy rows keep their own."""
    if not settings.mode.sample:
        return logits
    drawn = jnp.log(distribution(logits, settings))
    return jnp.where(settings.temperature[:, None] > 0, drawn, logits)


def certainty(
    logits: Float[Array, "R V"], token: Int[Array, "R"], score: Score
) -> tuple[Float[Array, "R"], Float[Array, "R"], Float[Array, "R"]]:
    """Return score, confidence and entropy of the predictions; a random score is 0 throughout."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1)
    confidence = jnp.take_along_axis(weights, token[:, None], axis=-1)[:, 0] / total
    finite = jnp.where(weights > 0, logits - top, 0.0)
    entropy = jnp.log(total) - jnp.sum(weights * finite, axis=-1) / total
    chosen = confidence
    if score == "entropy":
        chosen = -entropy
    elif score == "margin":
        best = jnp.arange(logits.shape[-1]) == jnp.argmax(logits, axis=-1)[:, None]
        second = jnp.max(jnp.where(best, 0.0, weights), axis=-1)
        chosen = (1.0 - second) / total
    elif score == "random":
        chosen = jnp.zeros_like(confidence)
    return chosen, confidence, entropy
