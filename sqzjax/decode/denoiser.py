# SPDX-License-Identifier: Apache-2.0
"""The canvas of diffusion decoding: its state, its geometry, and passes of the model over it.

Every row has a canvas of ids (prompt, then answer and masks) and a pointer to its current block.
`Denoiser` runs the model over the whole canvas or a window of it and picks the rows that predict
the block; which of these passes a step takes is a `sqzjax.decode.reuse.Reuse` policy.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sqzjax.decode.base import Output
from sqzjax.decode.context import Context
from sqzjax.decode.embeds import embed
from sqzjax.decode.sampling import Sampler
from sqzjax.models import DecoderLM
from sqzjax.typing import Array, Bool, Float, Int, Leaf, Params


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "output", "canvas", "prompt", "total", "start", "end", "denoised", "opened", "caches",
        "reused", "context", "sampler", "forwards", "guided", "embeds", "logprobs",
    ],
    meta_fields=[],
)  # fmt: skip
@dataclass(frozen=True)
class DiffusionState:
    """Invariant: positions before `start` are final; those from it to `total` may be masked.

    Prompts that are embeddings are EMBEDDED on the canvas: neither masked nor any token.
    """

    output: Output
    canvas: Leaf  # B W int32: prompt, answer and masks; W a multiple of the block
    prompt: Leaf  # B int32: length of the prompt
    total: Leaf  # B int32: end of the canvas that the model sees
    start: Leaf  # B int32: first position of the current block
    end: Leaf  # B int32: end of the current block, at most `total`
    denoised: Leaf  # B int32: denoising steps done in this block
    opened: Leaf  # B int32: masked positions of this block when it was opened
    caches: Leaf  # kvcache.CacheStates, or None
    reused: Leaf  # what the `Reuse` policy keeps, or None
    context: Leaf  # what the `Context` keeps for the positions of the block, or None
    sampler: Sampler
    forwards: Leaf  # B int32: forward passes that each row took part in
    guided: Leaf  # B int32: those of the reference model
    embeds: Leaf  # B W D: what EMBEDDED positions of the canvas are, or None without any
    logprobs: Leaf  # B W float32: log probability of each token filled in, or None unasked


class Block(NamedTuple):
    """Each row's current block: positions (-1 beyond its end), ids, and which are masked."""

    index: Array  # B n int32
    ids: Array  # B n int32
    masked: Array  # B n bool


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """A masked diffusion model over canvases; `width` is the most positions of a block."""

    model: DecoderLM
    width: int
    context: Context

    @property
    def mask_id(self) -> int:
        """The id of a position that is still to be filled."""
        mask = self.model.config.tokens.mask
        assert mask is not None  # the decoder refuses models without one
        return mask

    def block(self, state: DiffusionState) -> Block:
        """Return the current block of each row."""
        index = state.start[:, None] + jnp.arange(self.width, dtype=jnp.int32)
        index = jnp.where(index < state.end[:, None], index, -1)
        ids = jnp.take_along_axis(state.canvas, jnp.maximum(index, 0), axis=1)
        return Block(index, ids, (ids == self.mask_id) & (index >= 0))

    def predictors(self, state: DiffusionState) -> Int[Array, "B n"]:
        """Return the position whose output predicts each position of the block."""
        index = state.start[:, None] + jnp.arange(self.width, dtype=jnp.int32)
        return jnp.maximum(index - 1, 0) if self.model.config.shift_logits else index

    def visible(self, state: DiffusionState) -> Bool[Array, "B W"]:
        """Return which positions of the canvas hold a token."""
        inside = jnp.arange(state.canvas.shape[1]) < state.total[:, None]
        return inside & (state.canvas != self.mask_id)

    def canvas_pass(
        self, params: Params, state: DiffusionState, rows: Bool[Array, "B"], end: Int[Array, "B"]
    ) -> tuple[Float[Array, "B W D"], DiffusionState]:
        """Run the canvas of the marked rows up to `end`."""
        index = jnp.broadcast_to(jnp.arange(state.canvas.shape[1]), state.canvas.shape)
        return self._run(params, state, state.canvas, index, rows, end)

    def window_pass(
        self,
        params: Params,
        state: DiffusionState,
        rows: Bool[Array, "B"],
        index: Int[Array, "B n"],
    ) -> tuple[Float[Array, "B n D"], DiffusionState]:
        """Run some positions of the marked rows, rewriting their keys; those < 0 are left out."""
        ids = jnp.take_along_axis(state.canvas, jnp.clip(index, 0, state.canvas.shape[1] - 1), 1)
        return self._run(params, state, ids, index, rows, state.total)

    def logits(
        self, params: Params, hidden: Float[Array, "B T D"], state: DiffusionState, first: Array
    ) -> Float[Array, "B n V"]:
        """Return the block's logits from hidden states whose row 0 is position `first` `[B]`."""
        index = self.predictors(state) - first[:, None]
        index = jnp.clip(index, 0, hidden.shape[1] - 1)
        return self.model.head(params, jnp.take_along_axis(hidden, index[..., None], axis=1))

    def _run(self, params, state: DiffusionState, ids, index, rows, end):
        positions = jnp.where((index >= 0) & (index < end[:, None]) & rows[:, None], index, -1)
        out = self.model.forward(
            params,
            **self._inputs(params, state, ids, index),
            positions=positions.astype(jnp.int32),
            caches=state.caches,
            logits="none",
            return_hidden="last",
        )
        assert out.hidden is not None
        return out.hidden, replace(state, caches=out.caches)

    def _inputs(
        self, params: Params, state: DiffusionState, ids: Array, index: Array
    ) -> dict[str, Any]:
        """Return ids, or embeddings where some are given or masks of the block carry a context."""
        table = params["embed"]["embedding"]
        carried = self.context.embed(table[self.mask_id], state.context)
        if carried is None and state.embeds is None:
            return {"tokens": ids}
        if carried is None:
            return {"embeds": _embedded(params, state, ids, index)}
        place = index - state.start[:, None]
        inside = (place >= 0) & (index < state.end[:, None]) & (ids == self.mask_id)
        place = jnp.clip(place, 0, self.width - 1)
        carried = jnp.take_along_axis(carried, place[..., None], axis=1)
        embeds = _embedded(params, state, ids, index)
        return {"embeds": jnp.where(inside[..., None], carried.astype(embeds.dtype), embeds)}


def _embedded(params: Params, state: DiffusionState, ids: Array, index: Array) -> Array:
    """Return the embeddings of the positions `index` of the canvas, whose ids are `ids`."""
    given = None
    if state.embeds is not None:
        place = jnp.clip(index, 0, state.embeds.shape[1] - 1)
        given = jnp.take_along_axis(state.embeds, place[..., None], axis=1)
    return embed(params, ids, given)
