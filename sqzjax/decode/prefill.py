# SPDX-License-Identifier: Apache-2.0
"""Read prompts into caches, in chunks, and return what the last token of each predicts.

Prompts of different lengths are right-padded into one array; padding has position -1, so it is
neither seen nor cached. Chunks bound the activations and the slots that ring caches need beyond
their window; wholly padded chunks are skipped at run time, not at compile time.
"""

import jax
import jax.numpy as jnp

from sqzjax.kvcache import CacheStates
from sqzjax.models import DecoderLM
from sqzjax.typing import Array, Float, Int, Params


def prefill(
    model: DecoderLM,
    params: Params,
    caches: CacheStates,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    *,
    chunk: int,
) -> tuple[Float[Array, "B V"], CacheStates]:
    """Return the float32 logits after each row's last token, and the filled caches.

    The caches must accept `chunk` new tokens. Longer prompts need T to be a multiple of `chunk`.
    Rows of length 0 yield meaningless (finite) logits.
    """
    width = tokens.shape[1]

    def read(caches, start, part):
        positions = start + jnp.arange(part.shape[1], dtype=jnp.int32)
        positions = jnp.where(positions < lengths[:, None], positions, -1)
        row = jnp.clip(lengths - 1 - start, 0, part.shape[1] - 1)
        out = model.forward(params, part, positions=positions, caches=caches, logits=row)
        assert out.caches is not None and out.logits is not None
        return out.caches, out.logits[:, 0]

    if width <= chunk:
        caches, logits = read(caches, 0, tokens)
        return logits, caches
    if width % chunk:
        raise ValueError(f"{width} padded prompt tokens must be a multiple of chunk={chunk}")

    def body(index, carry):
        caches, logits = carry
        start = index * chunk
        part = jax.lax.dynamic_slice_in_dim(tokens, start, chunk, axis=1)
        caches, new = read(caches, start, part)
        last = (lengths > start) & (lengths <= start + chunk)
        return caches, jnp.where(last[:, None], new, logits)

    logits = jnp.zeros((tokens.shape[0], model.config.embedding_size), jnp.float32)
    chunks = (jnp.max(lengths) + chunk - 1) // chunk
    caches, logits = jax.lax.fori_loop(0, chunks, body, (caches, logits))
    return logits, caches
