# SPDX-License-Identifier: Apache-2.0
"""A few attention layers with biases and key norms, for caches that rebuild keys and values.

Layers' inputs are given, not computed: each resembles the one below. What a cache must answer is
computed from the codes it holds, in float64.
"""

import math
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sqzjax.attention import Mask, rope
from sqzjax.attention.rope_config import RopeConfig
from sqzjax.kvcache import AttentionSpec, KVCache, NewTokens, Query
from sqzjax.kvcache.base import LayerWeights
from sqzjax.models import fit_cache
from tests.contracts.decoders import tiny_model, tiny_params

WIDTH, BATCH, EPS = 8, 2, 1e-6


class Layers:
    """`count` layers of `heads` query and `kv_heads` key heads over inputs of `model` channels."""

    def __init__(
        self,
        policy: KVCache,
        *,
        heads: int = 4,
        kv_heads: int = 4,
        model: int = 32,
        count: int = 1,
        length: int = 40,
        capacity: int = 64,
        drift: float = 0.3,
        seed: int = 0,
    ):
        rng = np.random.default_rng(seed)
        self.heads, self.kv_heads, self.length = heads, kv_heads, length
        shape, columns = (BATCH, length, model), kv_heads * WIDTH
        steps = rng.normal(size=(count, *shape)) * [[[[1.0]]], *[[[[drift]]]] * (count - 1)]
        self.x = np.cumsum(steps, axis=0).astype(np.float32)
        self.q = self._random(rng, count, BATCH, length, heads, WIDTH)
        self.wk, self.wv = (
            self._random(rng, count, model, columns) / np.float32(math.sqrt(model))
            for _ in range(2)
        )
        self.bk, self.bv = (self._random(rng, count, kv_heads, WIDTH) for _ in range(2))
        self.norm = 1 + np.float32(0.2) * self._random(rng, count, WIDTH)
        self.policies = [policy.layer_policy(i, count) for i in range(count)]
        fits = [p.fit(self.weights(i)) for i, p in enumerate(self.policies)]
        self.fitted = jax.tree.map(jnp.asarray, fits)
        self.spec = AttentionSpec(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=WIDTH,
            model_dim=model,
            capacity=capacity,
            max_new=length,
        )
        self.step = jax.jit(self._step)
        self.init = jax.jit(self._init)

    @staticmethod
    def _random(rng: Any, *shape: int) -> Any:
        return rng.normal(size=shape).astype(np.float32)

    def weights(self, i: int) -> LayerWeights:
        """What `fit` sees of layer `i`."""
        k, v = jnp.asarray(self.wk[i]), jnp.asarray(self.wv[i])
        return LayerWeights(i, len(self.policies), self.kv_heads, WIDTH, k, v, "test")

    def _init(self) -> list[Any]:
        """Empty states of all layers."""
        return [policy.init(self.spec, BATCH) for policy in self.policies]

    def finish_kv(self, i: int, k: Any, v: Any) -> tuple[Any, Any]:
        """Biases and key norm; numpy arrays give numpy arrays, of their precision."""
        k, v = k + self.bk[i], v + self.bv[i]
        size = ((k**2).mean(axis=-1, keepdims=True) + EPS) ** 0.5
        return k / size * self.norm[i], v

    def project_kv(self, i: int, x: Any) -> tuple[Any, Any]:
        shape = (*x.shape[:-1], self.kv_heads, WIDTH)
        return self.finish_kv(i, (x @ self.wk[i]).reshape(shape), (x @ self.wv[i]).reshape(shape))

    @staticmethod
    def rotate(k: Any, positions: Any) -> Any:
        return rope.rotate(k, *rope.angles(RopeConfig(), WIDTH, positions))

    def query(self, i: int, q: Any, positions: Any, carry: Any = None) -> Query:
        """Queries of layer `i`."""
        return Query(
            q=self.rotate(q, jnp.maximum(positions, 0)),
            q_pre=q,
            positions=positions,
            mask=Mask(),
            window=None,
            scale=1 / math.sqrt(WIDTH),
            project_kv=partial(self.project_kv, i),
            rotate=self.rotate,
            finish_kv=partial(self.finish_kv, i),
            carry=carry,
            fitted=self.fitted[i],
        )

    def _step(self, states, x, q, positions):
        outs, after, carries, carry = [], [], [], None
        for i, (policy, state) in enumerate(zip(self.policies, states)):
            k, v = self.project_kv(i, x[i])
            new = NewTokens(
                self.rotate(k, jnp.maximum(positions, 0)),
                v,
                k,
                x[i],
                positions,
                carry,
                self.fitted[i],
            )
            state = policy.update(state, new)
            part, state, carry = policy.attend(state, self.query(i, q[i], positions, carry))
            outs.append(part.out)
            after.append(state)
            carries.append(carry)
        return jnp.stack(outs), after, carries

    def run(self, states: list[Any], start: int, count: int, positions: Any = None):
        """Append tokens `start` ...; return each layer's output and state and what it hands up."""
        here = slice(start, start + count)
        if positions is None:
            positions = np.broadcast_to(np.arange(start, start + count), (BATCH, count))
        return self.step(
            states, self.x[:, :, here], self.q[:, :, here], np.asarray(positions, np.int32)
        )

    def fill(self, end: int, chunk: int, states: list[Any] | None = None, start: int = 0):
        """Append tokens `start` .. `end` - 1 in chunks; return what the last of them gave."""
        states, found = states or self.init(), None
        for begin in range(start, end, chunk):
            found = self.run(states, begin, min(chunk, end - begin))
            states = found[1]
        return found

    def reference(self, i: int, x: Any, start: int, count: int) -> np.ndarray:
        """Float64 attention of queries `start` ... of layer `i` to inputs `x` `[B, S, D]`."""
        return self.attention(i, *self.project_kv(i, np.asarray(x, np.float64)), start, count)

    def attention(self, i: int, k: Any, v: Any, start: int, count: int) -> np.ndarray:
        """The same, to keys before rotation and values `[B, S, K, H]`."""
        k, q = (_rotated(np.asarray(y, np.float64)) for y in (k, self.q[i, :, : start + count]))
        here, q, v = np.arange(start, start + count), q[:, start:], np.asarray(v, np.float64)
        group = self.heads // self.kv_heads
        k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
        scores = np.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(WIDTH)
        scores[:, :, np.arange(k.shape[1]) > here[:, None]] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)


def _rotated(y: np.ndarray) -> np.ndarray:
    """Rotate `[B, S, heads, H]` by its positions 0, 1, ... ."""
    rates = RopeConfig().theta ** (-np.arange(0, WIDTH, 2) / WIDTH)
    turns = np.arange(y.shape[1])[:, None, None] * rates
    first, second = np.split(y, 2, axis=-1)
    cos, sin = np.cos(turns), np.sin(turns)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


MODELS = {
    "heads": {"num_kv_heads": 4, "qk_norm": True},
    "groups_of_4": {"num_kv_heads": 1, "qkv_bias": True},
    "groups_of_8": {"num_heads": 8, "num_kv_heads": 1, "head_dim": 8, "qkv_bias": True},
}


@cache
def model_of(name):
    """A model with random biases and norms."""
    model = tiny_model(**MODELS[name])
    rng = np.random.default_rng(3)

    def disturbed(path, leaf):
        if path[-1].key not in ("bias", "scale"):
            return leaf
        return leaf + (0.3 * rng.normal(size=leaf.shape)).astype(np.float32)

    params = jax.tree.map(np.asarray, tiny_params(model))
    params = jax.tree_util.tree_map_with_path(disturbed, params)
    return model, jax.tree.map(jnp.asarray, params)


@cache
def _all_hidden(model):
    return jax.jit(lambda p, tokens: model.forward(p, tokens, return_hidden="all").hidden)


def hidden_states(name, policy, length=16, prompt=11):
    """Inputs of all layers and the output, without a cache and through it: prompt, then steps."""
    model, params = model_of(name)
    tokens = np.random.default_rng(1).integers(0, 50, (2, length)).astype(np.int32)
    expected = np.asarray(_all_hidden(model)(params, tokens))
    params = fit_cache(model, params, policy)
    caches = jax.jit(lambda: model.init_caches(policy, batch=2, capacity=24, max_new=prompt))()

    @jax.jit
    def step(params, caches, tokens, positions):
        out = model.forward(
            params, tokens, positions=positions, caches=caches, return_hidden="all", logits="none"
        )
        return out.hidden, out.caches

    parts = []
    for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, length))]:
        at = np.broadcast_to(np.arange(start, end, dtype=np.int32), (2, end - start))
        part, caches = step(params, caches, tokens[:, start:end], at)
        parts.append(part)
    return np.concatenate(parts, axis=2), expected
