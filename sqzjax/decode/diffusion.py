# SPDX-License-Identifier: Apache-2.0
"""Block-wise decoding of masked diffusion models: a commit policy times a cache policy.

Every row has a canvas of ids, prompt then masks, and a pointer to its current block; a step is one
denoising of each row's own block, so rows never wait for each other and their tokens do not depend
on the batch. Block-causal models (SDAR, CDLM students) have an exact cache; bidirectional ones
(LLaDA, Dream) none, or the approximate ones of Fast-dLLM (arXiv 2505.22618).

A step costs a forward pass over the block (with a cache) or over the canvas (without).
"""

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.common import round_up
from sqzjax import kvcache
from sqzjax.decode.autoregressive import allowed_tokens
from sqzjax.decode.base import Decoder, Output, Requests, emit
from sqzjax.decode.commit import Candidates, CommitConfig, TopCount
from sqzjax.decode.sampling import Sampler, choose
from sqzjax.kvcache import Dense, KVCache
from sqzjax.models import DecoderLM
from sqzjax.typing import Array, Int, Leaf, Params

CacheKind = Literal["none", "exact", "prefix", "dual"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "output", "canvas", "prompt", "total", "start", "denoised", "opened", "caches", "sampler",
        "forwards",
    ],
    meta_fields=[],
)  # fmt: skip
@dataclass(frozen=True)
class DiffusionState:
    """Invariant: positions before `start` are final; those from it to `total` may be masked."""

    output: Output
    canvas: Leaf  # B W int32: prompt, answer and masks; W a multiple of the block
    prompt: Leaf  # B int32: length of the prompt
    total: Leaf  # B int32: end of the canvas that the model sees
    start: Leaf  # B int32: first position of the current block
    denoised: Leaf  # B int32: denoising steps done in this block
    opened: Leaf  # B int32: masked positions of this block when it was opened
    caches: Leaf  # kvcache.CacheStates, or None
    sampler: Sampler
    forwards: Leaf  # B int32: forward passes that each row took part in


@dataclass(frozen=True, kw_only=True)
class Diffusion(Decoder[DiffusionState]):
    """Decode a masked diffusion model block by block.

    `cache_kind`: "none" runs the whole canvas each step; "exact" needs a block-causal model and
    spends one more pass per finished block; "prefix" and "dual" freeze what lies outside the
    block (dual) or before it (prefix) between full passes, one at each block's opening and every
    `refresh` steps (0: never again). `eos_last` fills stop ids only when nothing else is left
    (LLaDA's `confidence_eos_eot_inf`, at any temperature). `block_size` 0 takes the model's own.
    Blocks start at position 0 for block-causal models and after the prompt for others.
    """

    kind: Literal["diffusion"] = "diffusion"
    model: DecoderLM
    cache: KVCache = Dense()
    commit: CommitConfig = TopCount()
    cache_kind: CacheKind = "none"
    block_size: int = 0
    refresh: int = 0
    eos_last: bool = False

    def __post_init__(self) -> None:
        config = self.model.config
        if config.mask == "causal" or config.tokens.mask is None:
            raise ValueError(
                f"mask={config.mask!r}, mask token {config.tokens.mask} ({config.family}): "
                "diffusion decoding needs a model with a mask token that is not causal"
            )
        aligned = config.mask == "block_causal"
        if self.cache_kind == "exact" and not aligned:
            raise ValueError(
                "cache_kind='exact' needs a block-causal model: later blocks change the keys of "
                f"a {config.mask} one; use 'prefix' or 'dual'"
            )
        if aligned and (self.cache_kind in ("prefix", "dual") or config.shift_logits):
            raise ValueError(
                f"cache_kind={self.cache_kind!r}, shift_logits={config.shift_logits}: block-causal "
                "models take 'exact' (or 'none') and unshifted logits"
            )
        if aligned and self.block_size not in (0, config.block_size):
            raise ValueError(
                f"block_size={self.block_size} must be the model's own, {config.block_size}, or 0"
            )
        if self.block_size < 0 or self.refresh < 0:
            raise ValueError(
                f"block_size={self.block_size}, refresh={self.refresh} must be >= 0 (0: default)"
            )

    @property
    def width(self) -> int:
        """Positions of a block."""
        return self.block_size or self.model.config.block_size or 32

    @property
    def mask_id(self) -> int:
        """The id of a position that is still to be filled."""
        mask = self.model.config.tokens.mask
        assert mask is not None  # checked when the decoder was made
        return mask

    def init(self, params: Params, requests: Requests) -> DiffusionState:
        rows = requests.rows
        tokens = requests.tokens if rows is None else requests.tokens[rows]
        prompt = requests.lengths if rows is None else requests.lengths[rows]
        tokens, prompt = jnp.asarray(tokens), jnp.asarray(prompt, jnp.int32)
        aligned = self.model.config.mask == "block_causal"
        total = prompt + jnp.asarray(requests.limits, jnp.int32)
        if aligned:
            total = (total + self.width - 1) // self.width * self.width
        size = round_up(max(requests.capacity, tokens.shape[1]) + self.width, self.width)
        canvas = jnp.pad(tokens, ((0, 0), (0, size - tokens.shape[1])))
        canvas = jnp.where(jnp.arange(size) < prompt[:, None], canvas, self.mask_id)
        caches = None
        if self.cache_kind != "none":
            caches = self.model.init_caches(
                self.cache, batch=tokens.shape[0], capacity=size, max_new=size
            )
        zeros = jnp.zeros_like(prompt)
        state = DiffusionState(
            output=requests.empty_output(),
            canvas=canvas.astype(jnp.int32),
            prompt=prompt,
            total=total,
            start=prompt // self.width * self.width if aligned else prompt,
            denoised=zeros,
            opened=zeros,
            caches=caches,
            sampler=requests.sampler,
            forwards=zeros,
        )
        if self.cache_kind == "exact":
            begun = state.start > 0
            read = replace(state, canvas=state.canvas[:, : tokens.shape[1]])
            _, caches = self._canvas_pass(params, read, begun, state.start)
            state = replace(state, caches=caches, forwards=begun.astype(jnp.int32))
        return replace(state, opened=jnp.sum(self._block(state)[2], axis=1, dtype=jnp.int32))

    def step(self, params: Params, state: DiffusionState) -> DiffusionState:
        running = ~state.output.done
        logits, state = self._logits(params, state, running)
        index, ids, masked = self._block(state)
        token, chosen = self._predict(logits, index, masked, state)
        ids = jnp.where(chosen & running[:, None], token, ids)
        state = replace(
            state,
            canvas=_scatter(state.canvas, index, ids),
            denoised=state.denoised + running,
            forwards=state.forwards + running,
        )
        open_before, open_now = jnp.any(masked, axis=1), jnp.any(masked & ~chosen, axis=1)
        filled = running & open_before & ~open_now
        # An exact cache needs the keys of the finished block, which the next pass writes.
        left = running & ~open_before if self.cache_kind == "exact" else filled
        return self._advance(self._emit(state, filled), left)

    def stats(self, state: DiffusionState) -> dict[str, int | float]:
        passes = [int(n) for n in jax.device_get(state.forwards)]
        held = 0 if state.caches is None else kvcache.nbytes(state.caches)
        return {"cache_bytes": held, "forwards": max(passes, default=0)}

    def _block(self, state: DiffusionState) -> tuple[Array, Array, Array]:
        """Return positions (-1 beyond the end), ids and masks of each row's block."""
        index = state.start[:, None] + jnp.arange(self.width, dtype=jnp.int32)
        index = jnp.where(index < state.total[:, None], index, -1)
        ids = jnp.take_along_axis(state.canvas, jnp.maximum(index, 0), axis=1)
        return index, ids, (ids == self.mask_id) & (index >= 0)

    def _logits(self, params: Params, state: DiffusionState, running: Array):
        """Return the logits that predict each row's block, and the state with caches written."""
        if self.cache_kind == "none":
            hidden, _ = self._canvas_pass(params, state, running, state.total)
            return self._head(params, hidden, state), state
        if self.cache_kind == "exact":
            index, ids, _ = self._block(state)
            positions = jnp.where(running[:, None], index, -1)
            out = self.model.forward(params, ids, positions=positions, caches=state.caches)
            assert out.logits is not None
            return out.logits, replace(state, caches=out.caches)
        return self._approximate(params, state, running)

    def _canvas_pass(self, params: Params, state: DiffusionState, rows: Array, end: Array):
        """Run the canvas of the marked rows up to `end`; return hidden states and caches."""
        positions = jnp.arange(state.canvas.shape[1], dtype=jnp.int32)
        positions = jnp.where((positions < end[:, None]) & rows[:, None], positions, -1)
        out = self.model.forward(
            params,
            state.canvas,
            positions=positions,
            caches=state.caches,
            logits="none",
            return_hidden="last",
        )
        assert out.hidden is not None
        return out.hidden, out.caches

    def _predictors(self, state: DiffusionState) -> Array:
        """Return the position whose output predicts each position of the block."""
        index = state.start[:, None] + jnp.arange(self.width, dtype=jnp.int32)
        return jnp.maximum(index - 1, 0) if self.model.config.shift_logits else index

    def _head(self, params: Params, hidden: Array, state: DiffusionState) -> Array:
        """Return logits of the block's predictors from the hidden states of the canvas."""
        index = jnp.minimum(self._predictors(state), hidden.shape[1] - 1)
        return self.model.head(params, jnp.take_along_axis(hidden, index[..., None], axis=1))

    def _approximate(self, params: Params, state: DiffusionState, running: Array):
        """Refresh the rows that open a block (or are due); give the others the cached pass."""
        due = state.denoised == 0
        if self.refresh:
            due |= state.denoised % self.refresh == 0
        shape = (*self._block(state)[0].shape, self.model.config.embedding_size)

        def nothing(caches):
            return jnp.zeros(shape, jnp.float32), caches

        def whole(caches):
            now = replace(state, caches=caches)
            hidden, caches = self._canvas_pass(params, now, running & due, state.total)
            return self._head(params, hidden, state), caches

        def window(caches):
            return self._window_pass(params, replace(state, caches=caches), running & ~due)

        fresh, caches = jax.lax.cond(jnp.any(running & due), whole, nothing, state.caches)
        cached, caches = jax.lax.cond(jnp.any(running & ~due), window, nothing, caches)
        logits = jnp.where(due[:, None, None], fresh, cached)
        return logits, replace(state, caches=caches)

    def _window_pass(self, params: Params, state: DiffusionState, rows: Array):
        """Feed the block (dual) or everything from it on (prefix), rewriting its keys."""
        size = self.width
        if self.cache_kind == "prefix":  # the rest of the answer, and one more if shifted
            size = min(max(size, state.output.tokens.shape[1] + 1), state.canvas.shape[1])
        first = self._predictors(state)[:, :1]
        index = first + jnp.arange(size, dtype=jnp.int32)
        positions = jnp.where((index < state.total[:, None]) & rows[:, None], index, -1)
        ids = jnp.take_along_axis(state.canvas, jnp.clip(index, 0, state.canvas.shape[1] - 1), 1)
        out = self.model.forward(
            params,
            ids,
            positions=positions,
            caches=state.caches,
            logits="none",
            return_hidden="last",
        )
        assert out.hidden is not None
        return self.model.head(params, out.hidden[:, : self.width]), out.caches

    def _predict(self, logits: Array, index: Array, masked: Array, state: DiffusionState):
        """Return a token for every position of the block and which of them to commit."""
        rows, width, size = logits.shape
        config = self.model.config
        flat = logits.reshape(rows * width, size).astype(jnp.float32)
        allowed = allowed_tokens(config)
        settings = _repeated(state.sampler, width)
        # Each step draws anew.
        number = jnp.maximum(index, 0) + state.canvas.shape[1] * state.denoised[:, None]
        token = choose(flat, settings, number.reshape(-1), allowed=allowed)
        flat = flat if allowed is None else jnp.where(allowed, flat, -jnp.inf)
        token = token.reshape(rows, width)
        candidates = Candidates(
            *_certainty(flat, token.reshape(-1), self.commit.score, (rows, width)),
            masked=masked,
            step=state.denoised,
            size=state.opened,
        )
        if self.eos_last:
            ends = jnp.any(token[..., None] == state.output.stop_ids[:, None, :], axis=-1)
            low = {"score": -1e9, "confidence": 0.0, "entropy": 1e9}
            late = {k: jnp.where(ends, x, getattr(candidates, k)) for k, x in low.items()}
            candidates = candidates._replace(**late)
        return token, self.commit.commit(candidates)

    def _emit(self, state: DiffusionState, rows: Array) -> DiffusionState:
        """Put out the finished blocks of the marked rows, without the prompt's tail."""
        index, ids, _ = self._block(state)
        skipped = jnp.maximum(state.prompt - state.start, 0)
        source = jnp.arange(self.width) + skipped[:, None]
        tokens = jnp.take_along_axis(ids, jnp.minimum(source, self.width - 1), axis=1)
        count = jnp.sum(index >= 0, axis=1) - skipped
        return replace(state, output=emit(state.output, tokens, jnp.where(rows, count, 0)))

    def _advance(self, state: DiffusionState, rows: Array) -> DiffusionState:
        """Open the next block of the marked rows."""
        state = replace(
            state,
            start=jnp.where(rows, state.start + self.width, state.start),
            denoised=jnp.where(rows, 0, state.denoised),
        )
        opened = jnp.sum(self._block(state)[2], axis=1, dtype=jnp.int32)
        return replace(state, opened=jnp.where(rows, opened, state.opened))


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Settings of `Diffusion` for configuration files; the fields are explained there."""

    kind: Literal["diffusion"] = "diffusion"
    commit: CommitConfig = TopCount()
    cache_kind: CacheKind = "none"
    block_size: int = 0
    refresh: int = 0
    eos_last: bool = False

    def build(self, model: DecoderLM, cache: KVCache = Dense()) -> Diffusion:
        """Return the decoder of a model; ValueError if they do not go together."""
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "kind"}
        return Diffusion(model=model, cache=cache, **settings)


def _scatter(canvas: Array, index: Array, ids: Array) -> Array:
    """Write a block's ids into the canvas; a select over it is one fused pass."""
    offset = jnp.arange(canvas.shape[1]) - index[:, :1]
    inside = (offset >= 0) & (offset < jnp.sum(index >= 0, axis=1, keepdims=True))
    new = jnp.take_along_axis(ids, jnp.clip(offset, 0, ids.shape[1] - 1), axis=1)
    return jnp.where(inside, new, canvas)


def _repeated(sampler: Sampler, width: int) -> Sampler:
    """Return the settings of every position of a block."""
    return jax.tree.map(lambda leaf: jnp.repeat(jnp.asarray(leaf), width, axis=0), sampler)


def _certainty(
    logits: Array, token: Int[Array, "R"], score: str, shape: tuple[int, int]
) -> tuple[Array, Array, Array]:
    """Return score, confidence and entropy of the predictions, from the raw distribution."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1)
    probability = jnp.take_along_axis(weights, token[:, None], axis=-1)[:, 0] / total
    finite = jnp.where(weights > 0, logits - top, 0.0)
    entropy = jnp.log(total) - jnp.sum(weights * finite, axis=-1) / total
    chosen = probability
    if score == "entropy":
        chosen = -entropy
    elif score == "margin":
        best = jnp.arange(logits.shape[-1]) == jnp.argmax(logits, axis=-1)[:, None]
        second = jnp.max(jnp.where(best, 0.0, weights), axis=-1)
        chosen = (1.0 - second) / total
    return chosen.reshape(shape), probability.reshape(shape), entropy.reshape(shape)
