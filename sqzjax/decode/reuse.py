# SPDX-License-Identifier: Apache-2.0
"""Which keys and values a denoising step takes over from the step before: reuse policies.

Block-causal models (SDAR, CDLM students) have an exact cache of finished blocks. In bidirectional
ones (LLaDA, Dream) every token changes every key, so reuse is an approximation: `Prefix` and `Dual`
freeze what lies outside the block, `Delayed` what has been a token for a step, `Periodic` the
prompt and the answer at intervals of their own. To add one, write a class and extend the union.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from sqzjax import kvcache
from sqzjax.decode.denoiser import Denoiser, DiffusionState
from sqzjax.kvcache import Dense, KVCache
from sqzjax.kvcache.similar import Similar
from sqzjax.models import ModelConfig
from sqzjax.typing import Array, Bool, Float, Params

Pass = Callable[[DiffusionState, Array], tuple[Array, DiffusionState]]
"""Logits of the block for the marked rows, and the state with their keys written."""


class Reuse(ABC):
    """A policy: a frozen dataclass that turns a state into the logits of every row's block."""

    cached: bool = True
    """Whether the decoder holds a cache at all."""
    whole_block: bool = True
    """Whether every step predicts all positions of a block, not only the masked ones."""

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError if the policy does not suit the model."""
        if config.mask == "block_causal":
            raise ValueError(
                f"reuse.kind={getattr(self, 'kind', '')!r} is for bidirectional models: "
                "block-causal ones take 'exact' (or 'none')"
            )

    def holds(self, cache: KVCache) -> KVCache:
        """Return the cache that the policy needs, made of the decoder's, or raise ValueError."""
        return cache

    def begin(self, denoiser: Denoiser, params: Params, state: DiffusionState, longest: int):
        """Return the state before the first step; `longest` is the longest prompt."""
        del denoiser, params, longest
        return state

    @abstractmethod
    def logits(
        self, denoiser: Denoiser, params: Params, state: DiffusionState, running: Bool[Array, "B"]
    ) -> tuple[Float[Array, "B n V"], DiffusionState]:
        """Return the logits of each running row's block, and the state with caches written."""

    def leaves(self, running: Array, was_open: Array, is_open: Array) -> Bool[Array, "B"]:
        """Return the rows that go on to their next block after this step."""
        return running & was_open & ~is_open


@dataclass(frozen=True, kw_only=True)
class NoReuse(Reuse):
    """Run the whole canvas at every step."""

    kind: Literal["none"] = "none"
    cached = False

    def check(self, config: ModelConfig) -> None:
        del config

    def logits(self, denoiser, params, state, running):
        return _whole(denoiser, params)(state, running)


@dataclass(frozen=True, kw_only=True)
class Exact(Reuse):
    """Run the block against the keys of all blocks before it, which nothing changes any more.

    Spends one more pass on every finished block but the last, to write its keys. Where logits are
    shifted, that pass also leaves what predicts the first token of the next block.
    """

    kind: Literal["exact"] = "exact"

    def check(self, config: ModelConfig) -> None:
        if config.mask != "block_causal":
            raise ValueError(
                "reuse.kind='exact' needs a block-causal model: later blocks change the keys of "
                f"a {config.mask} one; use 'prefix' or 'dual'"
            )

    def begin(self, denoiser, params, state, longest):
        begun = state.start > 0
        read = replace(state, canvas=state.canvas[:, :longest])
        hidden, read = denoiser.canvas_pass(params, read, begun, state.start)
        last = _row(hidden, state.start - 1) if denoiser.model.config.shift_logits else None
        return replace(state, caches=read.caches, forwards=begun.astype(jnp.int32), reused=last)

    def logits(self, denoiser, params, state, running):
        block = denoiser.block(state)
        # Caches that approximate between the steps of a block start anew for the pass that stays.
        closing = running & ~jnp.any(block.masked, axis=1)
        kept = jnp.where(closing, state.start, state.canvas.shape[1])
        state = replace(state, caches=kvcache.truncate(state.caches, kept))
        hidden, state = denoiser.window_pass(params, state, running, block.index)
        if denoiser.model.config.shift_logits:
            last = _row(hidden, state.end - 1 - state.start)
            # Position 0 has none before it and predicts itself, as in every other pass.
            before = jnp.where((state.start > 0)[:, None], state.reused, hidden[:, 0])
            kept = jnp.where(closing[:, None], last, state.reused)
            state = replace(state, reused=kept)
            hidden = jnp.concatenate([before[:, None], hidden[:, :-1]], axis=1)
        return denoiser.model.head(params, hidden), state

    def leaves(self, running, was_open, is_open):
        # The keys of a finished block are those of the pass after its last commit.
        return running & ~was_open


@dataclass(frozen=True, kw_only=True)
class Prefix(Reuse):
    """Freeze what lies before the block between full passes (Fast-dLLM, arXiv 2505.22618).

    A full pass opens each block, and another comes every `refresh` steps (0: never again).
    """

    kind: Literal["prefix"] = "prefix"
    refresh: int = 0

    def __post_init__(self) -> None:
        _check_counts(refresh=self.refresh)

    def logits(self, denoiser, params, state, running):
        # Everything from the block on, and one position more where logits are shifted.
        size = max(denoiser.width, state.output.tokens.shape[1] + 1)
        size = min(size, state.canvas.shape[1])
        window = _window(denoiser, params, size)
        return _either(denoiser, params, state, running, _due(state, self.refresh), window)


@dataclass(frozen=True, kw_only=True)
class Dual(Reuse):
    """Freeze what lies outside the block between full passes (Fast-dLLM, arXiv 2505.22618).

    `look` positions on either side of the block are recomputed with it, and the first `warmup`
    steps of a block are full passes too (dInfer's vicinity refresh, arXiv 2510.08666: 16 and 4).
    """

    kind: Literal["dual"] = "dual"
    refresh: int = 0
    look: int = 0
    warmup: int = 1

    def __post_init__(self) -> None:
        _check_counts(refresh=self.refresh, look=self.look)
        if self.warmup < 1:
            raise ValueError(f"warmup={self.warmup} must be >= 1: a full pass opens a block")

    def logits(self, denoiser, params, state, running):
        size = min(_block_rows(denoiser) + 2 * self.look, state.canvas.shape[1])
        window = _window(denoiser, params, size, self.look)
        due = _due(state, self.refresh) | (state.denoised < self.warmup)
        return _either(denoiser, params, state, running, due, window)


@dataclass(frozen=True, kw_only=True)
class Delayed(Reuse):
    """Reuse the keys of tokens from one step after they were filled in (dKV-Cache, arXiv
    2505.15781, variant Decode).

    Keys change most at the step that turns a mask into a token, so the step after still computes
    them. The first two steps of a block and every `refresh`-th are full passes. A step runs the
    positions that are not reused, in one of a few sizes: the cost falls as the answer fills up.
    """

    kind: Literal["delayed"] = "delayed"
    refresh: int = 8
    whole_block = False

    def __post_init__(self) -> None:
        _check_counts(refresh=self.refresh)

    def begin(self, denoiser, params, state, longest):
        del params, longest
        return replace(state, reused=jnp.zeros(state.canvas.shape, bool))

    def logits(self, denoiser, params, state, running):
        visible = denoiser.visible(state)
        due = _due(state, self.refresh) | (state.denoised < 2)
        fed = ~state.reused & (jnp.arange(state.canvas.shape[1]) < state.total[:, None])
        if denoiser.model.config.shift_logits:  # whatever predicts a mask must run
            fed |= jnp.roll(state.canvas == denoiser.mask_id, -1, axis=1).at[:, -1].set(False)
        partial_pass = _chosen(denoiser, params, fed)
        logits, state = _either(denoiser, params, state, running, due, partial_pass)
        return logits, replace(state, reused=jnp.where(running[:, None], visible, state.reused))


@dataclass(frozen=True, kw_only=True)
class Periodic(Reuse):
    """Refresh the prompt every `prompt` steps and the answer every `response` steps of a row
    (dLLM-Cache, arXiv 2506.06295).

    Between refreshes each layer recomputes the `share` of the answer's tokens whose values have
    changed most (`kvcache.similar`; 0.25 there), or, with `share` 0, the block runs alone. With a
    share the cache must be dense, and holds what layers added to the residual stream besides.
    Tokens that are left out keep the predictions of an earlier step: answers of which most tokens
    change at every step, as short ones do, lose accuracy by it.
    """

    kind: Literal["periodic"] = "periodic"
    prompt: int = 50
    response: int = 8
    share: float = 0.0

    def __post_init__(self) -> None:
        if min(self.prompt, self.response) < 1:
            raise ValueError(
                f"prompt={self.prompt}, response={self.response} must be >= 1: steps between "
                "refreshes"
            )
        if not 0 <= self.share < 1:
            raise ValueError(f"share={self.share} must lie in [0, 1); 0 runs the block alone")

    def holds(self, cache):
        if not self.share:
            return cache
        if not isinstance(cache, Dense):
            raise ValueError(
                f"reuse.share={self.share} compares values with those held and needs the dense "
                f"cache, not {getattr(cache, 'kind', type(cache).__name__)!r}; set share=0"
            )
        return Similar(dense=cache)

    def logits(self, denoiser, params, state, running):
        size = min(state.output.tokens.shape[1] + denoiser.width, state.canvas.shape[1])

        def answer(state, rows):
            first = jnp.maximum(state.prompt - 1, 0)
            index = first[:, None] + jnp.arange(size, dtype=jnp.int32)
            hidden, state = denoiser.window_pass(params, state, rows, index)
            return denoiser.logits(params, hidden, state, first), state

        def changed(state, rows):
            logits, state = answer(_sharing(state, self.share), rows)
            return logits, _sharing(state, 1.0)

        def cached(state, rows):
            fresh = state.forwards % self.response == 0
            block = _window(denoiser, params, min(_block_rows(denoiser), state.canvas.shape[1]))
            return _choose(state, rows, fresh, answer, changed if self.share else block)

        due = state.forwards % self.prompt == 0
        return _choose(state, running, due, _whole(denoiser, params), cached)


def _sharing(state: DiffusionState, share: float) -> DiffusionState:
    """Return a state whose caches have passes run that share of their tokens."""
    policies = tuple(replace(policy, share=share) for policy in state.caches.policies)
    return replace(state, caches=replace(state.caches, policies=policies))


ReuseConfig = NoReuse | Exact | Prefix | Dual | Delayed | Periodic


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 0:
            raise ValueError(f"{name}={value} must be >= 0 (0: never)")


def _block_rows(denoiser: Denoiser) -> int:
    """Return how many positions hold a block and what predicts it: one more where shifted."""
    return denoiser.width + denoiser.model.config.shift_logits


def _row(hidden: Array, index: Array) -> Array:
    """Return `hidden[b, index[b]]` of `[B, T, D]`, the nearest where there is none."""
    index = jnp.clip(index, 0, hidden.shape[1] - 1)
    return jnp.take_along_axis(hidden, index[:, None, None], axis=1)[:, 0]


def _due(state: DiffusionState, refresh: int) -> Array:
    """Rows whose block has just been opened, or that are due for a refresh."""
    opening = state.denoised == 0
    return opening | (state.denoised % refresh == 0) if refresh else opening


def _whole(denoiser: Denoiser, params: Params) -> Pass:
    """Return the pass over the whole canvas."""

    def run(state, rows):
        hidden, state = denoiser.canvas_pass(params, state, rows, state.total)
        return denoiser.logits(params, hidden, state, jnp.zeros_like(state.start)), state

    return run


def _window(denoiser: Denoiser, params: Params, size: int, look: int = 0) -> Pass:
    """Return the pass over `size` positions from `look` before the block's predictors on."""

    def run(state, rows):
        first = jnp.maximum(denoiser.predictors(state)[:, 0] - look, 0)
        index = first[:, None] + jnp.arange(size, dtype=jnp.int32)
        hidden, state = denoiser.window_pass(params, state, rows, index)
        return denoiser.logits(params, hidden, state, first), state

    return run


def _chosen(denoiser: Denoiser, params: Params, fed: Array) -> Pass:
    """Return the pass over the marked positions `[B, W]`, in the smallest of a few sizes."""
    length = fed.shape[1]
    sizes = sorted({max(denoiser.width, -(-length * part // 4)) for part in (1, 2, 3, 4)})
    place = jnp.cumsum(fed, axis=1) - 1

    def sized(size: int):
        def run(state, rows):
            slot = jnp.where(fed & (place < size), place, size)
            columns = jnp.broadcast_to(jnp.arange(length), fed.shape)
            index = jnp.full((fed.shape[0], size), -1, jnp.int32)
            index = jax.vmap(lambda to, at, what: to.at[at].set(what, mode="drop"))(
                index, slot, columns
            )
            hidden, state = denoiser.window_pass(params, state, rows, index)
            wanted = jnp.minimum(denoiser.predictors(state), length - 1)
            where = jnp.clip(jnp.take_along_axis(place, wanted, axis=1), 0, size - 1)
            hidden = jnp.take_along_axis(hidden, where[..., None], axis=1)
            return denoiser.model.head(params, hidden), state

        return run

    def run(state, rows):
        most = jnp.max(jnp.where(rows, jnp.sum(fed, axis=1), 0))
        which = jnp.searchsorted(jnp.asarray(sizes), most)
        return jax.lax.switch(which, [sized(size) for size in sizes], state, rows)

    return run


def _either(denoiser, params, state, running, due, cheap: Pass):
    """Give the rows that are due a full pass, the others the cheap one."""
    return _choose(state, running, due, _whole(denoiser, params), cheap)


def _choose(state: DiffusionState, rows: Array, due: Array, first: Pass, second: Pass) -> Any:
    """Run `first` for the marked rows that are due and `second` for the rest, each if any."""
    shapes = jax.eval_shape(first, state, rows)[0]

    def nothing(state, rows):
        del rows
        return jnp.zeros(shapes.shape, shapes.dtype), state

    one, state = jax.lax.cond(jnp.any(rows & due), first, nothing, state, rows & due)
    two, state = jax.lax.cond(jnp.any(rows & ~due), second, nothing, state, rows & ~due)
    return jnp.where(due[:, None, None], one, two), state
