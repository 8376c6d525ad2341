# SPDX-License-Identifier: Apache-2.0
"""The AdamW step that speed measurements time and capacity plans compile."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sqzjax import losses
from sqzjax.models import DecoderLM
from sqzjax.typing import Array, Params


def adamw_step(model: DecoderLM) -> tuple[Any, Callable[..., tuple[Any, Any]]]:
    """Return AdamW and `step(params, state, tokens [B, T + 1]) -> (params, state)`.

    The loss is the library's next-token loss over T tokens of every row. Pure; not jitted.
    """
    optimizer, tied = optax.adamw(1e-4), model.config.tie_embeddings

    def loss(params: Params, tokens: Array) -> Array:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        hidden: Any = model.forward(params, inputs, logits="none", return_hidden="last").hidden
        table = losses.head_table(params, tied)
        weights = jnp.ones(targets.shape)
        return losses.cross_entropy(hidden, table, targets, weights, tied=tied).sum / targets.size

    def step(params: Any, state: Any, tokens: Array) -> tuple[Any, Any]:
        updates, state = optimizer.update(jax.grad(loss)(params, tokens), state, params)
        return optax.apply_updates(params, updates), state

    return optimizer, step
