# SPDX-License-Identifier: Apache-2.0
"""What coded caches share: a body of codes, a window of the newest tokens, a few exact first ones.

New tokens enter the window as they are; once it holds `residual_length` tokens and a whole group
more, its oldest group is coded and joins the body. Attention is the merge of the body, read tile by
tile and never decoded as a whole, the window and the sinks. A method says what it keeps of a
token, how a group is coded, and how the body is attended to; prompts attend to their own tokens
exactly.

Truncating to a length that the window still reaches is exact. Below it, a group that is cut in two
returns to the window as decoded. Tokens must come in order: whatever was held at or after the first
new position is forgotten, as when the last block of a diffusion model is rewritten.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.common import round_up
from pallas_kernels.decode_attention import MAX_QUERIES
from sqzjax.attention import decode, dense
from sqzjax.attention.partial import Partial, merge
from sqzjax.checks import check_count
from sqzjax.kvcache.base import Attended, AttentionSpec, KVCache, NewTokens, Query, Ring
from sqzjax.kvcache.slots import cut, write, write_runs
from sqzjax.typing import Array, Int, Leaf, PyTree

TILE = 512
"""Slots that attention decodes at a time; bodies of more are a multiple of it."""
_NEVER = jnp.iinfo(jnp.int32).max


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["body", "window", "sinks", "length", "coded"],
    meta_fields=["capacity", "slots", "group"],
)
@dataclass(frozen=True)
class CodedState:
    """Invariants: tokens 0 .. coded - 1 are in the body, token p in slot p modulo `slots`, and
    coded .. length - 1 in the window, token p in slot p - coded. The first tokens are in `sinks`
    as well, which then answer for them. `coded` is a multiple of the group."""

    body: Leaf  # leaves B A rows ..., rows per group times slots / group
    window: Leaf  # leaves B A residual_length + group ..., none where tokens are coded at once
    sinks: Leaf  # leaves B A sinks ...
    length: Leaf  # B int32
    coded: Leaf  # B int32
    capacity: int
    slots: int
    group: int  # tokens coded together


class CodedCache(KVCache[CodedState]):
    """Base of the coded caches; a subclass is a frozen dataclass that defines what is below.

    What is kept of a token is a pytree whose leaves are `[B, A, T, ...]`, A often the kv heads.
    """

    residual_length: int = 0
    """Newest tokens that stay uncoded; rollbacks of up to as many are exact."""
    sinks: int = 0
    """First tokens of a sequence that are kept exactly for good."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("residual_length", self.residual_length, 0)
        check_count("sinks", self.sinks, 0)

    @abstractmethod
    def group(self, spec: AttentionSpec) -> int:
        """Return how many tokens are coded together; raise ValueError if the spec cannot be."""

    @abstractmethod
    def keep(self, new: NewTokens) -> PyTree:
        """Return what the window keeps of new tokens, leaves `[B, A, T, ...]`."""

    @abstractmethod
    def encode(self, kept: PyTree, fitted: PyTree) -> PyTree:
        """Return the codes of tokens, a whole number of groups; leaves `[B, A, rows, ...]`."""

    def encode_at(self, kept: PyTree, positions: Array, new: NewTokens) -> PyTree:
        """Return the codes of tokens at `positions` `[B, n]`, some of which came before `new`."""
        return self.encode(kept, new.fitted)

    def fitted_form(self, spec: AttentionSpec) -> PyTree:
        """Return arrays of the shapes that `fit` gives, from which the layout of codes follows."""
        return None

    @abstractmethod
    def decode(self, codes: PyTree, kept: PyTree) -> PyTree:
        """Return one coded group as the window would keep it; `kept` shows dtypes and shapes."""

    @abstractmethod
    def attend_body(self, state: CodedState, query: Query, starts: Array, limits: Array) -> Partial:
        """Attend to the body at positions `[starts, limits)`, both `[B, T]`, below `coded`."""

    @abstractmethod
    def exact(self, kept: PyTree, query: Query, positions: Array) -> tuple[Array, Array]:
        """Return rotated keys and values `[B, K, S, H]` of kept tokens at `positions` `[B, S]`."""

    def init(self, spec: AttentionSpec, batch: int) -> CodedState:
        group = self.group(spec)
        tokens = spec.capacity
        if spec.window is not None:
            tokens = min(tokens, spec.window + spec.max_new + group)
        # A leaf of one row would be taken for one that all tokens share.
        slots = round_up(max(tokens, 2 * group), group)
        if slots > TILE:
            slots = round_up(tokens, _tile(group))

        def kept(tokens):
            return _zeros(jax.eval_shape(lambda: self.keep(blank(tokens))))

        def blank(tokens):
            return _blank(spec, batch, tokens)._replace(fitted=self.fitted_form(spec))

        def coded():
            new = blank(slots)
            return self.encode(self.keep(new), new.fitted)

        body = jax.eval_shape(coded)
        window = self.residual_length + group
        # Each in a buffer of its own, so that a step may take them over.
        length, coded_length = jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32)
        return CodedState(
            _zeros(body),
            None if window == 1 else kept(window),
            kept(self.sinks) if self.sinks else None,
            length,
            coded_length,
            spec.capacity,
            slots,
            group,
        )

    def exact_new(self, tokens: int) -> bool:
        return tokens > self.residual_length

    def ring(self, state: CodedState, window: int | None) -> Ring | None:
        if window is None or state.slots >= state.capacity:
            return None
        # The newest `residual_length` tokens take no slot. Groups of one call need slots of their
        # own: of two that are written to the same one, either may be the last.
        first = state.slots + self.residual_length
        return Ring(first, min(state.slots, first - (window - 1)))

    def lengths(self, state: CodedState) -> Int[Array, "B"]:
        return state.length

    def update(self, state: CodedState, new: NewTokens) -> CodedState:
        valid = (new.positions >= 0) & (new.positions < state.capacity)
        state = self.truncate(state, jnp.min(jnp.where(valid, new.positions, _NEVER), axis=1))
        top = jnp.max(jnp.where(valid, new.positions + 1, 0), axis=1).astype(jnp.int32)
        length = jnp.maximum(state.length, top)
        kept = self.keep(new)
        sinks = state.sinks
        if sinks is not None:
            first = valid & (new.positions < self.sinks)
            sinks = _place(sinks, kept, new.positions, first)
        state = replace(state, sinks=sinks, length=length)
        group = state.group
        if state.window is None:
            codes = self.encode_at(kept, new.positions, new)
            body = self._write(state, codes, new.positions, valid)
            return replace(state, body=body, coded=length)
        ready = jnp.maximum(length - self.residual_length - state.coded, 0) // group
        if new.positions.shape[1] == 1:
            window = _place(state.window, kept, new.positions - state.coded[:, None], valid)
            return self._flush_one(replace(state, window=window), ready, new)
        return self._flush_many(state, kept, new, valid, ready)

    def _flush_one(self, state: CodedState, ready: Array, new: NewTokens) -> CodedState:
        """Code the window's first group in the rows where it is due."""
        group = state.group
        due = ready > 0
        positions = state.coded[:, None] + jnp.arange(group)

        def flush(held):
            window = held[1]
            codes = self.encode_at(_head(window, group), positions, new)
            moved = jax.tree.map(lambda leaf: jnp.roll(leaf, -group, axis=2), window)
            return codes, jax.tree.map(lambda a, b: _where(due, a, b), moved, window)

        none = _zeros(jax.eval_shape(flush, (None, state.window))[0])
        codes, window = _once(jnp.any(due), flush, (none, state.window))
        body = self._write(state, codes, state.coded[:, None], due[:, None])
        coded = state.coded + jnp.where(due, group, 0)
        return replace(state, body=body, window=window, coded=coded)

    def _flush_many(self, state, kept, new: NewTokens, valid: Array, ready: Array) -> CodedState:
        """Line the window and the new tokens up, code the groups that are due, keep the rest."""
        group, count = state.group, new.positions.shape[1]
        size = self.residual_length + group
        groups = (group - 1 + count) // group
        room = max(groups * group + size - count, size)
        line = jax.tree.map(lambda leaf: _padded(leaf, room - size + count), state.window)
        line = _place(line, kept, new.positions - state.coded[:, None], valid)
        positions = state.coded[:, None] + jnp.arange(groups * group)
        codes = self.encode_at(_head(line, groups * group), positions, new)
        place = jnp.arange(groups)
        starts = state.coded[:, None] + place * group
        body = self._write(state, codes, starts, place < ready[:, None])
        shift = ready * group
        window = jax.tree.map(lambda leaf: cut(leaf, shift, size), line)
        return replace(state, body=body, window=window, coded=state.coded + shift)

    def _write(self, state: CodedState, codes: PyTree, starts: Array, valid: Array) -> PyTree:
        """Write groups whose first tokens are at positions `starts` `[B, n]` into the body."""
        group = state.group
        place = starts % state.slots // group

        def one(leaf, new):
            each = leaf.shape[2] * group // state.slots
            if leaf.shape[2] == 1 or each == 0:  # a table or a static scale: no tokens in it
                return leaf
            return write_runs(leaf, new, place, valid)

        return jax.tree.map(one, state.body, codes)

    def truncate(self, state: CodedState, length: Int[Array, "B"]) -> CodedState:
        group = state.group
        length = jnp.minimum(state.length, length).astype(jnp.int32)
        undone = length < state.coded
        coded = jnp.where(undone, length // group * group, state.coded)
        if group == 1:
            return replace(state, length=length, coded=coded)
        again = undone & (length > coded)

        def refill(window):
            # Tied to the window: XLA would take what does not change out of the loop, due or not.
            window, place = jax.lax.optimization_barrier((window, coded % state.slots // group))
            codes = jax.tree.map(partial(_group_of, place, group, state.slots), state.body)
            found = self.decode(codes, _head(window, group))

            def put(old, new):
                new = jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), 0, axis=2)
                return _where(again, new, old)

            return jax.tree.map(put, window, found)

        window = _once(jnp.any(again), refill, state.window)
        return replace(state, window=window, length=length, coded=coded)

    def attend(self, state: CodedState, query: Query) -> Attended:
        if query.mask.kind == "bidirectional":
            raise ValueError(
                f"cache kind={getattr(self, 'kind', '')!r} holds tokens that nothing changes any "
                "more; a bidirectional model needs kind='dense'"
            )
        starts, limits = query.span()
        body = self.attend_body(
            state,
            query,
            jnp.maximum(starts, self.sinks),
            jnp.minimum(limits, state.coded[:, None]),
        )
        parts = [body]
        if state.window is not None:
            parts.append(self._attend_kept(state, query, state.window, state.coded, self.sinks))
        if state.sinks is not None:
            parts.append(self._attend_kept(state, query, state.sinks, jnp.zeros_like(state.coded)))
        return Attended(merge(*parts), state, query.carry)

    def _attend_kept(
        self, state: CodedState, query: Query, kept: PyTree, first: Array, lowest: int = 0
    ) -> Partial:
        """Attend to uncoded tokens at positions `first`, `first + 1`, ... from `lowest` on."""
        count = jax.tree.leaves(kept)[0].shape[2]
        positions = first[:, None] + jnp.arange(count, dtype=jnp.int32)
        k, v = self.exact(kept, query, positions)
        held = jnp.clip(state.length - first, 0, count)
        if query.q.shape[1] <= MAX_QUERIES:
            starts, limits = query.span()
            starts = jnp.maximum(starts, lowest) - first[:, None]
            limits = limits - first[:, None]
            return decode.attend_span(query.q, k, v, held, starts, limits, scale=query.scale)
        seen = (jnp.arange(count) < held[:, None]) & (positions >= lowest)
        if query.before is not None:
            seen &= positions < query.before[:, None]
        return dense.attend(
            query.q,
            k,
            v,
            query_positions=query.positions,
            key_positions=jnp.where(seen, positions, -1),
            mask=query.mask,
            window=query.window,
            scale=query.scale,
        )


def _blank(spec: AttentionSpec, batch: int, tokens: int) -> NewTokens:
    heads = (batch, tokens, spec.num_kv_heads, spec.head_dim)
    k = jnp.zeros(heads, spec.dtype)
    x = jnp.zeros((batch, tokens, spec.model_dim), spec.dtype)
    return NewTokens(k, k, k, x, jnp.zeros((batch, tokens), jnp.int32))


def _zeros(form: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), form)


def _head(kept: PyTree, count: int) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[:, :, :count], kept)


def _padded(leaf: Array, extra: int) -> Array:
    return jnp.pad(leaf, [(0, extra if axis == 2 else 0) for axis in range(leaf.ndim)])


def _once(due: Array, change: Callable[[PyTree], PyTree], held: PyTree) -> PyTree:
    """Return `change(held)` if due, else `held` where it is, which `lax.cond` would copy."""
    return jax.lax.fori_loop(0, due.astype(jnp.int32), lambda _, now: change(now), held)


def _where(rows: Array, new: Array, old: Array) -> Array:
    return jnp.where(rows.reshape(-1, *(1 for _ in new.shape[1:])), new, old)


def _place(buffers: PyTree, kept: PyTree, slots: Array, valid: Array) -> PyTree:
    """Write kept tokens `[B, A, T, ...]` at the slots `[B, T]` of the buffers."""
    return jax.tree.map(
        lambda buffer, new: write(buffer, jnp.moveaxis(new, 2, 1), slots, valid), buffers, kept
    )


def _group_of(place: Array, group: int, slots: int, leaf: Array) -> Array:
    """Return the codes of one group of each row: group number `place` `[B]`."""
    each = leaf.shape[2] * group // slots
    if leaf.shape[2] == 1 or each == 0:
        return leaf
    return cut(leaf, place * each, each)


def _tile(group: int) -> int:
    if TILE % group == 0:
        return TILE
    return round_up(TILE, group)
