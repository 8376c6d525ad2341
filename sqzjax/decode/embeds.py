# SPDX-License-Identifier: Apache-2.0
"""Prompts that are embeddings instead of token ids: soft prompts, images, compressed contexts.

In `Requests.tokens`, and so on a diffusion canvas, `EMBEDDED` stands where a position has an
embedding and no id. It lies beyond every vocabulary: it is no mask (the position is visible and
never filled), no stop id and no padding of stop ids, a repetition penalty drops it, and looking it
up by mistake yields NaN. A batch of ids alone has no buffer and runs the programs it always ran.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from sqzjax.errors import RequestError
from sqzjax.typing import Array, Float, Int, Params

EMBEDDED = 2**31 - 1
"""Id of a position that is given as an embedding."""


def are_embeds(prompt: Any) -> bool:
    """Return whether a prompt is an array of floats with two dimensions."""
    if getattr(prompt, "ndim", None) != 2:
        return False
    return jnp.issubdtype(np.asarray(prompt).dtype, jnp.floating)


def check_embeds(index: int, prompt: Any, width: int, dtype: str) -> Float[np.ndarray, "T D"]:
    """Return a copy of a prompt's embeddings in `dtype`, or raise RequestError."""
    with np.errstate(over="ignore"):  # what overflows is refused below
        array = np.array(prompt, jnp.dtype(dtype))
    if array.shape[1] != width:
        raise RequestError(
            f"prompt {index} has embeddings of shape {array.shape}; they must be [T, {width}], "
            "the model's hidden_size; project them to it first"
        )
    if not array.size:
        raise RequestError(f"prompt {index} is empty; give at least one row of embeddings")
    bad = np.argwhere(~np.isfinite(array))
    if bad.size:
        row, column = bad[0]
        value = np.asarray(prompt)[row, column]
        raise RequestError(
            f"prompt {index}: the embedding at position {row} has {value} in column {column}; all "
            f"must be finite in {dtype}; check what computed them"
        )
    return array


def embed(
    params: Params, tokens: Int[Array, "B T"], embeds: Float[Array, "B T D"] | None
) -> Float[Array, "B T D"]:
    """Return `embeds` where `tokens` are EMBEDDED and the model's own embeddings elsewhere."""
    own = jnp.take(params["embed"]["embedding"], tokens, axis=0)
    return own if embeds is None else jnp.where((tokens == EMBEDDED)[..., None], embeds, own)
