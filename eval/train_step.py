# SPDX-License-Identifier: Apache-2.0
"""AdamW steps that speed measurements time and capacity plans compile."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sqzjax import losses
from sqzjax.forecast_losses import mse
from sqzjax.models import DecoderLM
from sqzjax.models.swin import SwinEmulator
from sqzjax.typing import Array, Params


def adamw_step(model: DecoderLM) -> tuple[Any, Callable[..., tuple[Any, Any]]]:
    """Return AdamW and `step(params, state, tokens [B, T + 1]) -> (params, state)`.

    The loss is the library's next-token loss over T tokens of every row. Pure; not jitted.
    """
    tied = model.config.tie_embeddings

    def loss(params: Params, tokens: Array) -> Array:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        hidden: Any = model.forward(params, inputs, logits="none", return_hidden="last").hidden
        table = losses.head_table(params, tied)
        weights = jnp.ones(targets.shape)
        return losses.cross_entropy(hidden, table, targets, weights, tied=tied).sum / targets.size

    return _adamw(loss)


def emulator_step(model: SwinEmulator) -> tuple[Any, Callable[..., tuple[Any, Any]]]:
    """Return AdamW and `step(params, state, fields [B, S, C, H, W]) -> (params, state)`.

    The loss is the mean of squares of the forecast of the last state from those before it; all
    channels beyond the prognostic ones are constants. Pure; not jitted.
    """

    def loss(params: Params, fields: Array) -> Array:
        target = fields[:, -1, : model.config.out_channels]
        return mse(model.forward(params, fields[:, :-1]), target).mean()

    return _adamw(loss)


def _adamw(loss: Callable[..., Array]) -> tuple[Any, Callable[..., tuple[Any, Any]]]:
    optimizer = optax.adamw(1e-4)

    def step(params: Any, state: Any, batch: Array) -> tuple[Any, Any]:
        updates, state = optimizer.update(jax.grad(loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    return optimizer, step
