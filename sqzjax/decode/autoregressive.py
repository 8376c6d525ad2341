# SPDX-License-Identifier: Apache-2.0
"""Plain decoding: one token per row and step. The reference that lossless decoders must equal.

A step reads every weight and every cached key and value once, so its time is their bytes over the
memory bandwidth, whatever the batch, until arithmetic takes over.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from sqzjax import kvcache
from sqzjax.decode.base import Decoder, Output, Requests, emit
from sqzjax.decode.prefill import prefill
from sqzjax.decode.sampling import Sampler, choose, logprobs_of
from sqzjax.kvcache import Dense, KVCache
from sqzjax.models import DecoderLM, ModelConfig
from sqzjax.typing import Array, Bool, Int, Leaf, Params


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["output", "caches", "pending", "seen", "sampler"],
    meta_fields=[],
)
@dataclass(frozen=True)
class AutoregressiveState:
    """Invariant: the caches hold the prompt and every emitted token but the last of each row."""

    output: Output
    caches: Leaf  # kvcache.CacheStates of B rows
    pending: Leaf  # B int32: the last emitted token, which the caches do not hold yet
    seen: Leaf  # B V bool: tokens of prompt and output, or None without repetition penalty
    sampler: Sampler


@dataclass(frozen=True, kw_only=True)
class Autoregressive(Decoder[AutoregressiveState]):
    """Decode one token at a time with any cache policy.

    `prefill_chunk` is the most prompt tokens read by one forward pass. `allow_mask_token` lets the
    model's mask id (of diffusion models) be emitted.
    """

    kind: Literal["autoregressive"] = "autoregressive"
    model: DecoderLM
    cache: KVCache = Dense()
    prefill_chunk: int = 512
    allow_mask_token: bool = False

    def __post_init__(self) -> None:
        config = self.model.config
        if config.mask != "causal" or config.shift_logits:
            raise ValueError(
                f"mask={config.mask!r}, shift_logits={config.shift_logits} ({config.family}): "
                "autoregressive decoding needs a causal model; use a diffusion decoder"
            )
        if self.prefill_chunk < 1:
            raise ValueError(f"prefill_chunk={self.prefill_chunk} must be >= 1")

    @property
    def embeds_dtype(self) -> str:
        return self.model.execution.dtype

    def init(self, params: Params, requests: Requests) -> AutoregressiveState:
        batch, width = requests.tokens.shape
        caches = self.model.init_caches(
            self.cache,
            batch=batch,
            capacity=requests.capacity,
            max_new=min(self.prefill_chunk, width),
        )
        logits, caches = prefill(
            self.model,
            params,
            caches,
            requests.tokens,
            requests.lengths,
            chunk=self.prefill_chunk,
            embeds=requests.embeds,
        )
        seen = None
        if requests.sampler.mode.penalty:
            seen = seen_tokens(requests.tokens, requests.lengths, logits.shape[1])
        if requests.rows is not None:
            caches = kvcache.reorder(caches, requests.rows)
            logits = logits[requests.rows]
            seen = None if seen is None else seen[requests.rows]
        pending = jnp.zeros(logits.shape[0], jnp.int32)
        state = AutoregressiveState(
            requests.empty_output(), caches, pending, seen, requests.sampler
        )
        return self._emit(state, logits)

    def step(self, params: Params, state: AutoregressiveState) -> AutoregressiveState:
        positions = jnp.where(state.output.done, -1, state.caches.length)
        out = self.model.forward(
            params,
            state.pending[:, None],
            positions=positions[:, None],
            caches=state.caches,
        )
        assert out.logits is not None
        return self._emit(replace(state, caches=out.caches), out.logits[:, 0])

    def stats(self, state: AutoregressiveState) -> dict[str, int | float]:
        return {"cache_bytes": kvcache.nbytes(state.caches)}

    def _emit(self, state: AutoregressiveState, logits: Array) -> AutoregressiveState:
        """Choose the next token of every row from the logits that predict it."""
        allowed = allowed_tokens(self.model.config, mask_token=self.allow_mask_token)
        positions = state.caches.length
        token = choose(logits, state.sampler, positions, allowed=allowed, seen=state.seen)
        logprobs = None
        if state.sampler.mode.logprobs:
            logprobs = logprobs_of(logits, token, allowed)[:, None]
        seen = state.seen
        if seen is not None:
            seen |= token[:, None] == jnp.arange(logits.shape[1])
        output = emit(state.output, token[:, None], jnp.ones_like(token), logprobs)
        return replace(state, output=output, pending=token, seen=seen)


def allowed_tokens(config: ModelConfig, *, mask_token: bool = False) -> Bool[Array, "V"] | None:
    """Return which ids may be emitted, None if all: no padded rows, no mask id unless asked."""
    banned = None if mask_token else config.tokens.mask
    if banned is None and config.embedding_size == config.vocab_size:
        return None
    ids = jnp.arange(config.embedding_size)
    allowed = ids < config.vocab_size
    return allowed if banned is None else allowed & (ids != banned)


def seen_tokens(
    tokens: Int[Array, "B T"], lengths: Int[Array, "B"], vocabulary: int
) -> Bool[Array, "B V"]:
    """Return which ids below `vocabulary` occur in each right-padded row."""
    valid = jnp.arange(tokens.shape[1]) < lengths[:, None]
    rows = jnp.arange(tokens.shape[0])[:, None]
    ids = jnp.where(valid, tokens, vocabulary)
    empty = jnp.zeros((tokens.shape[0], vocabulary), bool)
    return empty.at[rows, ids].set(True, mode="drop")
