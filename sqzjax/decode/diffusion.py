# SPDX-License-Identifier: Apache-2.0
"""Block-wise decoding of masked diffusion models: a commit policy times a reuse policy.

A step is one denoising of each row's own block, so rows never wait for each other and their tokens
do not depend on the batch. It costs a forward pass over the block where keys and values are reused
(`sqzjax.decode.reuse`), over the canvas where they are not.
"""

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common import round_up
from sqzjax import kvcache
from sqzjax.decode.adaptive import AdaptiveBlocks
from sqzjax.decode.autoregressive import allowed_tokens
from sqzjax.decode.base import Decoder, Requests, emit
from sqzjax.decode.certainty import certainty, probability, tempered
from sqzjax.decode.commit import Ancestral, Candidates, CommitConfig, TopCount
from sqzjax.decode.context import ContextConfig, NoContext, Residual
from sqzjax.decode.denoiser import Block, Denoiser, DiffusionState
from sqzjax.decode.reuse import NoReuse, ReuseConfig
from sqzjax.decode.sampling import Sampler, choose, logprobs_of, uniforms
from sqzjax.kvcache import Dense, KVCache
from sqzjax.models import DecoderLM
from sqzjax.models.config import check_reference
from sqzjax.typing import Array, Params


@dataclass(frozen=True, kw_only=True)
class Diffusion(Decoder[DiffusionState]):
    """Decode a masked diffusion model block by block.

    `commit` says which positions a step fills, `reuse` which keys and values it takes over,
    `context` what masked positions carry along, `adaptive` where blocks end. `eos_last` fills stop
    ids only when nothing else is left (LLaDA's `confidence_eos_eot_inf`, at any temperature).
    `block_size` 0 takes the model's own, or 32. Blocks start at position 0 for block-causal models
    and after the prompt for others. With a `reference` model, parameters are a dict of "model" and
    "reference"; prompts that are embeddings go into both as they are.
    """

    kind: Literal["diffusion"] = "diffusion"
    model: DecoderLM
    cache: KVCache = Dense()
    commit: CommitConfig = TopCount()
    reuse: ReuseConfig = NoReuse()
    context: ContextConfig = NoContext()
    adaptive: AdaptiveBlocks | None = None
    block_size: int = 0
    eos_last: bool = False
    reference: DecoderLM | None = None

    def __post_init__(self) -> None:
        config = self.model.config
        if config.mask == "causal" or config.tokens.mask is None:
            raise ValueError(
                f"mask={config.mask!r}, mask token {config.tokens.mask} ({config.family}): "
                "diffusion decoding needs a model with a mask token that is not causal"
            )
        self.reuse.check(config)
        self.reuse.holds(self.cache)
        if self.commit.remasks and not self.reuse.whole_block:
            raise ValueError(
                f"commit.remask needs predictions for all tokens of a block, which reuse.kind="
                f"{self.reuse.kind!r} leaves out; use another reuse or remask=0"
            )
        if self.eos_last and isinstance(self.commit, Ancestral):
            raise ValueError(
                "eos_last has no effect with commit.kind='ancestral', which does not rank positions"
            )
        if self.block_size < 0:
            raise ValueError(f"block_size={self.block_size} must be >= 0 (0: the model's own)")
        if self.adaptive is not None:
            self.adaptive.check(config.vocab_size, config.tokens.mask)
        if self._aligned:
            self._check_aligned()
        elif self.adaptive is not None and self.adaptive.most < self._default_size:
            raise ValueError(
                f"adaptive.most={self.adaptive.most} must be at least block_size="
                f"{self._default_size}, the size of blocks without a delimiter"
            )
        wanted = isinstance(self.context, Residual) and self.context.init_from == "reference"
        if wanted != (self.reference is not None):
            raise ValueError(
                "a reference model belongs to context.init_from='reference', and that needs one"
            )
        if self.reference is not None:
            check_reference(self.reference.config, config)

    def _check_aligned(self) -> None:
        config = self.model.config
        if self.adaptive is not None:
            raise ValueError(
                f"adaptive={self.adaptive}: block-causal models have blocks of their own size"
            )
        if self.block_size not in (0, config.block_size):
            raise ValueError(
                f"block_size={self.block_size} must be the model's own, {config.block_size}, or 0"
            )

    @property
    def embeds_dtype(self) -> str | None:
        """Name of the compute dtype; None where a reference model of another size reads along."""
        size = self.model.config.hidden_size
        same = self.reference is None or self.reference.config.hidden_size == size
        return self.model.execution.dtype if same else None

    @property
    def unsupported(self) -> tuple[str, ...]:
        return ("repetition_penalty",)

    @property
    def _aligned(self) -> bool:
        return self.model.config.mask == "block_causal"

    @property
    def _default_size(self) -> int:
        return self.block_size or self.model.config.block_size or 32

    @property
    def denoiser(self) -> Denoiser:
        """The model over canvases with blocks of at most `width` positions."""
        width = self._default_size if self.adaptive is None else self.adaptive.most
        return Denoiser(model=self.model, width=width, context=self.context)

    def init(self, params: Params, requests: Requests) -> DiffusionState:
        own = self._own(params)
        denoiser = self.denoiser
        rows = requests.rows
        given = (requests.tokens, requests.lengths, requests.embeds)
        given = given if rows is None else jax.tree.map(lambda leaf: leaf[rows], given)
        tokens, prompt, embeds = given
        tokens, prompt = jnp.asarray(tokens), jnp.asarray(prompt, jnp.int32)
        total = prompt + jnp.asarray(requests.limits, jnp.int32)
        size = self._default_size
        if self._aligned:
            total = (total + size - 1) // size * size
        start = prompt // size * size if self._aligned else prompt
        width = round_up(max(requests.capacity, tokens.shape[1]) + denoiser.width, denoiser.width)
        canvas = jnp.pad(tokens, ((0, 0), (0, width - tokens.shape[1])))
        canvas = jnp.where(jnp.arange(width) < prompt[:, None], canvas, denoiser.mask_id)
        if embeds is not None:  # as wide as the canvas, so that prompts of any bucket share a step
            embeds = jnp.pad(embeds, ((0, 0), (0, width - tokens.shape[1]), (0, 0)))
        caches = None
        if self.reuse.cached:
            cache = self.reuse.holds(self.cache)
            rows = tokens.shape[0]
            caches = self.model.init_caches(cache, batch=rows, capacity=width, max_new=width)
        zeros = jnp.zeros_like(prompt)
        state = DiffusionState(
            output=requests.empty_output(),
            canvas=canvas.astype(jnp.int32),
            prompt=prompt,
            total=total,
            start=start,
            end=jnp.minimum(start + denoiser.width, total),
            denoised=zeros,
            opened=zeros,
            caches=caches,
            reused=None,
            context=self.context.init(self.model, own, tokens.shape[0], denoiser.width),
            sampler=requests.sampler,
            forwards=zeros,
            guided=zeros,
            embeds=embeds,
            logprobs=jnp.zeros(canvas.shape) if requests.sampler.mode.logprobs else None,
        )
        state = self.reuse.begin(denoiser, own, state, tokens.shape[1])
        return self._open(params, state, jnp.ones_like(prompt, bool))

    def step(self, params: Params, state: DiffusionState) -> DiffusionState:
        own, running = self._own(params), ~state.output.done
        logits, state = self.reuse.logits(self.denoiser, own, state, running)
        logits, context = self.context.adjust(
            logits, self.denoiser.block(state).masked, state.context
        )
        if self.adaptive is not None:
            state = self._end_block(logits, state, running & (state.denoised == 0))
        block = self.denoiser.block(state)
        token, logprob, chosen, reopened = self._predict(logits, block, state)
        decided = running[:, None] & (state.denoised >= self.context.warmup)[:, None]
        chosen, reopened = chosen & decided, reopened & decided
        kept = jnp.where(reopened, self.denoiser.mask_id, block.ids)
        context = self.context.update(self.model, own, logits, state.denoised, context)
        state = replace(
            state,
            canvas=_scatter(state.canvas, block.index, jnp.where(chosen, token, kept)),
            logprobs=_noted(state.logprobs, block.index, logprob, chosen),
            denoised=state.denoised + running,
            forwards=state.forwards + running,
            context=context,
        )
        was_open = jnp.any(block.masked, axis=1)
        is_open = jnp.any((block.masked & ~chosen) | reopened, axis=1)
        state = self._emit(state, running & was_open & ~is_open)
        left = self.reuse.leaves(running, was_open, is_open)
        start = jnp.where(left, state.end, state.start)
        end = jnp.minimum(start + self.denoiser.width, state.total)
        state = replace(state, start=start, end=jnp.where(left, end, state.end))
        return self._open(params, state, left)

    def stats(self, state: DiffusionState) -> dict[str, int | float]:
        own, other = (np.asarray(n) for n in jax.device_get((state.forwards, state.guided)))
        passes = own + other  # both models count: what a text costs is what is reported
        counts = {"forwards": int(passes.max(initial=0)), "row_forwards": int(passes.sum())}
        if self.reference is not None:
            counts["reference_forwards"] = int(other.sum())
        if state.caches is None:
            return {"cache_bytes": 0, **counts}
        held = kvcache.nbytes(state.caches)
        return {"cache_bytes": held, **counts, **kvcache.report(state.caches)}

    def _own(self, params: Params) -> Params:
        return params if self.reference is None else params["model"]

    def _open(self, params: Params, state: DiffusionState, rows: Array) -> DiffusionState:
        """Reset what belongs to the block in the marked rows, whose block has just been opened."""
        opened = jnp.sum(self.denoiser.block(state).masked, axis=1, dtype=jnp.int32)
        state = replace(
            state,
            denoised=jnp.where(rows, 0, state.denoised),
            opened=jnp.where(rows, opened, state.opened),
        )
        if state.context is None:
            return state

        def fresh(context):
            new = self._fresh_context(params, state, rows)
            return jax.tree.map(partial(_select, rows), new, context)

        context = jax.lax.cond(jnp.any(rows), fresh, lambda old: old, state.context)
        guided = state.guided
        if self.reference is not None:
            guided = guided + (rows & ~state.output.done)
        return replace(state, context=context, guided=guided)

    def _fresh_context(self, params: Params, state: DiffusionState, rows: Array):
        own, size = self._own(params), state.canvas.shape[0]
        context = self.context.init(self.model, own, size, self.denoiser.width)
        if self.reference is None:
            return context
        plain = Denoiser(model=self.reference, width=self.denoiser.width, context=NoContext())
        seen = replace(state, caches=None, context=None, total=state.end)
        logits, _ = NoReuse().logits(plain, params["reference"], seen, rows & ~state.output.done)
        return self.context.update(self.model, own, logits, state.denoised, context)

    def _end_block(self, logits: Array, state: DiffusionState, rows: Array) -> DiffusionState:
        """Put the end of freshly opened blocks where the model predicts a delimiter."""
        assert self.adaptive is not None
        token = jnp.argmax(logits, axis=-1)
        chance = jnp.exp(jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1))
        default = jnp.full_like(state.start, self._default_size)
        end = self.adaptive.ends(token, chance, state, default)
        state = replace(state, end=jnp.where(rows, end, state.end))
        opened = jnp.sum(self.denoiser.block(state).masked, axis=1, dtype=jnp.int32)
        return replace(state, opened=jnp.where(rows, opened, state.opened))

    def _predict(self, logits: Array, block: Block, state: DiffusionState):
        """Return a token for every position of the block, its log probability if somebody asked,
        where to put it, and where a mask.
        """
        rows, width, size = logits.shape
        flat = logits.reshape(rows * width, size).astype(jnp.float32)
        allowed = allowed_tokens(self.model.config)
        settings = _repeated(state.sampler, width)
        # Each step draws anew, by a key of its own: the canvas' width depends on the batch.
        step = jnp.repeat(state.denoised, width)[:, None].astype(settings.keys.dtype)
        settings = replace(settings, keys=jnp.concatenate([settings.keys, step], axis=1))
        position = jnp.maximum(block.index, 0).reshape(-1)
        token = choose(flat, settings, position, allowed=allowed)
        flat = flat if allowed is None else jnp.where(allowed, flat, -jnp.inf)
        logprob = None
        if state.logprobs is not None:
            logprob = logprobs_of(flat, token).reshape(rows, width)
        judged = tempered(flat, settings) if self.commit.tempered else flat
        sure = certainty(judged, token, self.commit.score)
        token = token.reshape(rows, width)
        candidates = Candidates(
            *(part.reshape(rows, width) for part in sure),
            masked=block.masked,
            step=state.denoised - self.context.warmup,
            size=state.opened,
        )
        if self.commit.draws:
            other = jnp.concatenate([settings.keys, jnp.ones_like(step)], axis=1)
            noise = uniforms(other, position)[:, 0].reshape(rows, width)
            candidates = candidates._replace(noise=noise)
        if self.eos_last:
            ends = jnp.any(token[..., None] == state.output.stop_ids[:, None, :], axis=-1)
            low = {"score": -1e9, "confidence": 0.0, "entropy": 1e9}
            late = {k: jnp.where(ends, x, getattr(candidates, k)) for k, x in low.items()}
            candidates = candidates._replace(**late)
        if self.commit.remasks:
            fixed = block.masked | (block.index < state.prompt[:, None])
            held = probability(flat, jnp.maximum(block.ids, 0).reshape(-1))
            held = jnp.where(fixed, jnp.inf, held.reshape(rows, width))
            candidates = candidates._replace(held=held)
        return token, logprob, self.commit.commit(candidates), self.commit.reopens(candidates)

    def _emit(self, state: DiffusionState, rows: Array) -> DiffusionState:
        """Put out the finished blocks of the marked rows, without the prompt's tail."""
        block, width = self.denoiser.block(state), self.denoiser.width
        skipped = jnp.maximum(state.prompt - state.start, 0)
        source = (state.start + skipped)[:, None] + jnp.arange(width)
        source = jnp.minimum(source, state.canvas.shape[1] - 1)
        tokens, logprobs = jax.tree.map(
            lambda canvas: jnp.take_along_axis(canvas, source, axis=1),
            (state.canvas, state.logprobs),
        )
        count = jnp.where(rows, jnp.sum(block.index >= 0, axis=1) - skipped, 0)
        return replace(state, output=emit(state.output, tokens, count, logprobs))


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Settings of `Diffusion` for configuration files; the fields are explained there."""

    kind: Literal["diffusion"] = "diffusion"
    commit: CommitConfig = TopCount()
    reuse: ReuseConfig = NoReuse()
    context: ContextConfig = NoContext()
    adaptive: AdaptiveBlocks | None = None
    block_size: int = 0
    eos_last: bool = False

    def build(
        self, model: DecoderLM, cache: KVCache = Dense(), reference: DecoderLM | None = None
    ) -> Diffusion:
        """Return the decoder of a model; ValueError if they do not go together."""
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "kind"}
        return Diffusion(model=model, cache=cache, reference=reference, **settings)


def _select(rows: Array, new: Array, old: Array) -> Array:
    return jnp.where(rows.reshape(-1, *[1] * (old.ndim - 1)), new, old)


def _scatter(canvas: Array, index: Array, ids: Array) -> Array:
    """Write a block's ids into the canvas; a select over it is one fused pass."""
    offset = jnp.arange(canvas.shape[1]) - index[:, :1]
    inside = (offset >= 0) & (offset < jnp.sum(index >= 0, axis=1, keepdims=True))
    new = jnp.take_along_axis(ids, jnp.clip(offset, 0, ids.shape[1] - 1), axis=1)
    return jnp.where(inside, new, canvas)


def _noted(canvas: Array | None, index: Array, new: Array | None, chosen: Array) -> Array | None:
    """Write numbers of the chosen positions of a block into the canvas, where it is kept."""
    if canvas is None or new is None:
        return canvas
    old = jnp.take_along_axis(canvas, jnp.maximum(index, 0), axis=1)
    return _scatter(canvas, index, jnp.where(chosen, new, old))


def _repeated(sampler: Sampler, width: int) -> Sampler:
    """Return the settings of every position of a block."""
    return jax.tree.map(lambda leaf: jnp.repeat(jnp.asarray(leaf), width, axis=0), sampler)
