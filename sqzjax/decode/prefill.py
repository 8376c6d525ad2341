# SPDX-License-Identifier: Apache-2.0
"""Read prompts into caches, in chunks, and return what the last token of each predicts.

Prompts of different lengths are right-padded into one array; padding has position -1, so it is
neither seen nor cached. Chunks bound the activations and the slots that ring caches need beyond
their window; wholly padded chunks are skipped at run time, not at compile time.
"""

from typing import Any

import jax
import jax.numpy as jnp

from sqzjax.decode.embeds import embed
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
    embeds: Float[Array, "B T D"] | None = None,
) -> tuple[Float[Array, "B V"], CacheStates]:
    """Return the float32 logits after each row's last token, and the filled caches.

    The caches must accept `chunk` new tokens. Longer prompts need T to be a multiple of `chunk`.
    `embeds` are read where `tokens` are EMBEDDED. Rows of length 0 yield meaningless (finite)
    logits.
    """
    width = tokens.shape[1]

    def read(caches, start, part, given):
        positions = start + jnp.arange(part.shape[1], dtype=jnp.int32)
        positions = jnp.where(positions < lengths[:, None], positions, -1)
        row = jnp.clip(lengths - 1 - start, 0, part.shape[1] - 1)
        inputs: dict[str, Any] = {"tokens": part}
        if given is not None:
            inputs = {"embeds": embed(params, part, given)}
        out = model.forward(params, **inputs, positions=positions, caches=caches, logits=row)
        assert out.caches is not None and out.logits is not None
        return out.caches, out.logits[:, 0]

    if width <= chunk:
        caches, logits = read(caches, 0, tokens, embeds)
        return logits, caches
    if width % chunk:
        raise ValueError(f"{width} padded prompt tokens must be a multiple of chunk={chunk}")

    def body(index, carry):
        caches, logits = carry
        start = index * chunk
        part, given = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1), (tokens, embeds)
        )
        caches, new = read(caches, start, part, given)
        last = (lengths > start) & (lengths <= start + chunk)
        return caches, jnp.where(last[:, None], new, logits)

    logits = jnp.zeros((tokens.shape[0], model.config.embedding_size), jnp.float32)
    chunks = (jnp.max(lengths) + chunk - 1) // chunk
    caches, logits = jax.lax.fori_loop(0, chunks, body, (caches, logits))
    return logits, caches
