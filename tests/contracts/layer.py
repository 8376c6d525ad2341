# SPDX-License-Identifier: Apache-2.0
"""One random attention layer, and float64 attention over all of its tokens as the reference."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sqzjax.attention import Mask, rope
from sqzjax.attention.rope_config import RopeConfig
from sqzjax.kvcache import AttentionSpec, NewTokens, Query
from sqzjax.kvcache.base import LayerWeights
from tests.contracts.caches import CacheCase

BATCH, HEADS, KV_HEADS, WIDTH, MODEL = 3, 4, 2, 8, 16
MAX_NEW = 16
MAX_QUERIES = 4


@partial(jax.jit, static_argnums=0)
def _update(policy, state, new):
    return policy.update(state, new)


@partial(jax.jit, static_argnums=0)
def _attend(layer, state, q, q_pre, positions):
    return layer.case.policy.attend(state, layer.asking(q, q_pre, positions))


@partial(jax.jit, static_argnums=0)
def _truncate(policy, state, lengths):
    return policy.truncate(state, lengths)


@partial(jax.jit, static_argnums=0)
def _reorder(policy, state, rows):
    return policy.reorder(state, rows)


@partial(jax.jit, static_argnums=(0, 3))
def _run(layer, state, start, count):
    tokens = start + jnp.arange(count)
    state = layer.case.policy.update(state, layer.new(tokens))
    return layer.case.policy.attend(state, layer.query(tokens))


@jax.jit
def _tokens_of(x, wk, wv, tokens, positions):
    """Rows `tokens` of the stream as keys, values, keys before rotation, inputs and positions."""
    tokens = jnp.broadcast_to(tokens, (BATCH, tokens.shape[-1]))
    positions = jnp.broadcast_to(positions, tokens.shape).astype(jnp.int32)
    x = jnp.take_along_axis(x, tokens[..., None], axis=1)
    k, v = (_heads(x @ kernel) for kernel in (wk, wv))
    return _rotate(k, positions), v, k, x, positions


@jax.jit
def _queries_of(q, tokens, positions):
    """Rows `tokens` of the queries, rotated and not, and their positions."""
    tokens = jnp.broadcast_to(tokens, (BATCH, tokens.shape[-1]))
    positions = jnp.broadcast_to(positions, tokens.shape).astype(jnp.int32)
    q = jnp.take_along_axis(q, tokens[..., None, None], axis=1)
    return _rotate(q, positions), q, positions


def _heads(x):
    return x.reshape((*x.shape[:-1], KV_HEADS, WIDTH))


def _rotate(k, positions):
    return rope.rotate(k, *rope.angles(RopeConfig(), WIDTH, positions))


_LAYERS: dict[tuple[int, int, int], "Layer"] = {}


def layer_of(case: CacheCase, length: int, seed: int = 0) -> "Layer":
    """Return the layer of a case; the same one every time, so that its programs are reused."""
    key = (id(case), length, seed)
    if key not in _LAYERS:
        _LAYERS[key] = Layer(case, length, seed)
    return _LAYERS[key]


def _padded(array, length: int, value=0):
    """Return `[B, T, ...]` with T = `length`, padded by numpy: that compiles nothing."""
    widths = [(0, 0)] * array.ndim
    widths[1] = (0, max(length - array.shape[1], 0))
    return np.pad(np.asarray(array), widths, constant_values=value)


class Layer:
    """Projections, rotation and a stream of `length` tokens for BATCH sequences."""

    def __init__(self, case: CacheCase, length: int, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.case, self.length = case, length
        dtype = jnp.dtype(case.dtype)
        self.x = jnp.asarray(rng.normal(size=(BATCH, length, MODEL)), dtype)
        scale = 1 / math.sqrt(MODEL)
        self.wk = jnp.asarray(scale * rng.normal(size=(MODEL, KV_HEADS * WIDTH)), dtype)
        self.wv = jnp.asarray(scale * rng.normal(size=(MODEL, KV_HEADS * WIDTH)), dtype)
        self.q_pre = jnp.asarray(rng.normal(size=(BATCH, length, HEADS, WIDTH)), dtype)
        self.mask = Mask()
        self.fitted = case.fitted
        if case.fitted is None:
            weights = LayerWeights(0, 1, KV_HEADS, WIDTH, self.wk, self.wv, "contract")
            self.fitted = jax.tree.map(jnp.asarray, case.policy.fit(weights))

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=WIDTH,
            model_dim=MODEL,
            capacity=self.case.capacity,
            max_new=MAX_NEW,
            window=self.case.window,
            dtype=self.case.dtype,
        )

    def project_kv(self, x):
        return _heads(x @ self.wk), _heads(x @ self.wv)

    def rotate(self, k, positions):
        return _rotate(k, positions)

    def new(self, tokens, positions=None) -> NewTokens:
        """Tokens `tokens` (`[T]` or `[B, T]` indices) at `positions` (default: the indices)."""
        tokens = jnp.asarray(tokens)
        positions = tokens if positions is None else jnp.asarray(positions)
        made = _tokens_of(self.x, self.wk, self.wv, tokens, positions)
        return NewTokens(*made, fitted=self.fitted)

    def query(self, tokens, positions=None) -> Query:
        tokens = jnp.asarray(tokens)
        positions = tokens if positions is None else jnp.asarray(positions)
        return self.asking(*_queries_of(self.q_pre, tokens, positions))

    def asking(self, q, q_pre, positions) -> Query:
        return Query(
            q=q,
            q_pre=q_pre,
            positions=positions,
            mask=self.mask,
            window=self.case.window,
            scale=1 / math.sqrt(WIDTH),
            project_kv=self.project_kv,
            rotate=self.rotate,
            rotary=rope.rotary(RopeConfig(), WIDTH),
            fitted=self.fitted,
        )

    def attend(self, state, query: Query):
        """Attend as one program, rows padded; the query's mask and window are this layer's."""
        count = query.q.shape[1]
        rows = (_padded(a, MAX_QUERIES) for a in (query.q, query.q_pre))
        attention = _attend(self, state, *rows, _padded(query.positions, MAX_QUERIES, -1))
        out, lse = (a[:, :count] for a in attention.partial[:2])
        return attention._replace(partial=attention.partial._replace(out=out, lse=lse))

    def update(self, state, new: NewTokens):
        """Write as one program, the same for any number of tokens: they are padded."""
        rows = {name: _padded(getattr(new, name), MAX_NEW) for name in ("k", "v", "k_pre", "x")}
        positions = _padded(new.positions, MAX_NEW, -1)
        return _update(self.case.policy, state, new._replace(**rows, positions=positions))

    def truncate(self, state, lengths):
        """Keep the first `lengths` tokens of every row, as one program."""
        return _truncate(self.case.policy, state, jnp.asarray(lengths, jnp.int32))

    def reorder(self, state, rows):
        """Choose rows of the batch, as one program."""
        return _reorder(self.case.policy, state, jnp.asarray(rows, jnp.int32))

    @staticmethod
    def programs() -> int:
        """How many programs `update` and `attend` have been compiled to, for all layers."""
        return _update._cache_size() + _attend._cache_size()

    def run(self, state, start: int, count: int):
        """Append tokens start .. start + count - 1 and attend with them."""
        return _run(self, state, start, count)

    def fill(self, state, end: int, start: int = 0, chunk: int = MAX_NEW):
        """Append tokens start .. end - 1 in chunks, the last one padded: one program for all."""
        for begin in range(start, end, chunk):
            tokens = np.arange(begin, begin + chunk)
            positions = np.where(tokens < end, tokens, -1)
            new = self.new(np.minimum(tokens, self.length - 1), positions)
            state = _update(self.case.policy, state, new)
        return state

    def reference(self, query: Query, lengths) -> tuple[np.ndarray, np.ndarray]:
        """Float64 attention over tokens 0 .. lengths[b] - 1; zeros and -inf for empty rows."""
        new = self.new(np.arange(self.length))
        q, k, v = (np.asarray(a, np.float64) for a in (query.q, new.k, new.v))
        positions = np.asarray(query.positions)
        out = np.zeros(q.shape)
        lse = np.full(q.shape[:3], -np.inf)
        for b, t, n in np.ndindex(*q.shape[:3]):
            seen = np.arange(self.length) < lengths[b]
            seen &= np.arange(self.length) <= positions[b, t]
            if self.case.window:
                seen &= positions[b, t] - np.arange(self.length) < self.case.window
            if not seen.any():
                continue
            kv = n // (HEADS // KV_HEADS)
            scores = k[b, seen, kv] @ q[b, t, n] / math.sqrt(WIDTH)
            top = scores.max()
            weights = np.exp(scores - top)
            out[b, t, n] = weights @ v[b, seen, kv] / weights.sum()
            lse[b, t, n] = top + np.log(weights.sum())
        return out, lse
