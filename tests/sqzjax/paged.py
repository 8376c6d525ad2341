# SPDX-License-Identifier: Apache-2.0
"""Page-wise sparse attention by its definition, in float64 and one row at a time.

The reference of the paged cache policies, and a stream of random layers' tokens to feed both.
"""

import math
from dataclasses import dataclass, field
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from sqzjax.attention import Mask
from sqzjax.kvcache import AttentionSpec, NewTokens, Query

HEADS, KV_HEADS, WIDTH = 4, 2, 8
GROUP = HEADS // KV_HEADS


def spec(capacity, dtype="float32"):
    return AttentionSpec(
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=WIDTH,
        model_dim=1,
        capacity=capacity,
        max_new=capacity,
        dtype=dtype,
    )


def new_tokens(k, v, positions):
    k, v = jnp.asarray(k, jnp.float32), jnp.asarray(v, jnp.float32)
    return NewTokens(k, v, k, jnp.zeros((*k.shape[:2], 1)), jnp.asarray(positions, jnp.int32))


@partial(jax.jit, static_argnums=(0, 1, 2))
def empty(policy, capacity, batch):
    """The state of a policy before the first token."""
    return policy.init(spec(capacity), batch)


@partial(jax.jit, static_argnums=0)
def updated(policy, state, k, v, positions):
    """The state with further tokens."""
    return policy.update(state, new_tokens(k, v, positions))


def query_of(q, positions, mask):
    def unused(*_):
        raise AssertionError("paged policies do not rebuild keys")

    return Query(
        q=jnp.asarray(q, jnp.float32),
        q_pre=jnp.asarray(q, jnp.float32),
        positions=jnp.asarray(positions, jnp.int32),
        mask=mask,
        window=None,
        scale=1 / math.sqrt(WIDTH),
        project_kv=unused,
        rotate=unused,
    )


@cache
def attending(policy, mask):
    """The compiled `attend` of a policy as a function of state, queries and positions."""
    return jax.jit(lambda state, q, at: policy.attend(state, query_of(q, at, mask)))


def block_mask(size):
    return Mask(kind="block_causal", block_size=size)


@dataclass
class Row:
    """One sequence: its tokens, the remembered block, and the pages counted."""

    policy: object
    k: np.ndarray = field(default_factory=lambda: np.zeros((0, KV_HEADS, WIDTH)))
    v: np.ndarray = field(default_factory=lambda: np.zeros((0, KV_HEADS, WIDTH)))
    block: dict = field(default_factory=dict)
    read: int = 0
    held: int = 0
    dense: int = 0

    def write(self, positions, k, v):
        for position, key, value in zip(positions, k, v):
            if position < 0:
                continue
            if position >= len(self.k):
                grown = position + 1 - len(self.k)
                self.k = np.concatenate([self.k, np.zeros((grown, *self.k.shape[1:]))])
                self.v = np.concatenate([self.v, np.zeros((grown, *self.v.shape[1:]))])
            self.k[position], self.v[position] = key, value

    def attend(self, q, head, tokens):
        """Output and log-sum-exp of one query head over chosen tokens."""
        if not len(tokens):
            return np.zeros(WIDTH), -np.inf
        scores = self.k[tokens, head // GROUP] @ q[head] / math.sqrt(WIDTH)
        weights = np.exp(scores - scores.max())
        out = weights @ self.v[tokens, head // GROUP] / weights.sum()
        return out, scores.max() + np.log(weights.sum())

    def chosen_pages(self, queries, prefix, kv):
        """The union of the pages that the queries choose in one kv head."""
        size = self.policy.page_size
        pages = range(-(-prefix // size))
        union = set()
        for q in queries:
            bounds = []
            for page in pages:
                keys = self.k[page * size : (page + 1) * size, kv]
                high, low = keys.max(0), keys.min(0)
                heads = q[kv * GROUP : (kv + 1) * GROUP]
                bounds.append(max(np.maximum(h * high, h * low).sum() for h in heads))
            forced = {0, len(pages) - 1} & set(pages)
            rest = sorted(set(pages) - forced, key=lambda page: -bounds[page])
            union |= forced | set(rest[: self.policy.budget // size - len(forced)])
        return sorted(union)

    def sparse(self, queries, prefix):
        """Attention of some queries to the pages chosen by all of them, `[A, N]` pairs."""
        size, parts = self.policy.page_size, [[None] * HEADS for _ in queries]
        for kv in range(KV_HEADS):
            pages = self.chosen_pages(queries, prefix, kv)
            self.read += len(pages)
            tokens = [t for p in pages for t in range(p * size, min((p + 1) * size, prefix))]
            for part, q in zip(parts, queries):
                for head in range(kv * GROUP, (kv + 1) * GROUP):
                    part[head] = self.attend(q, head, tokens)
        self.held += KV_HEADS * -(-prefix // size)
        return parts

    def step(self, positions, q):
        """Attend the block's queries `[T, N, H]` as the policy says; zeros for an idle row."""
        if positions[-1] < 0:
            return np.zeros(q.shape)
        causal = self.policy.kind == "quest"
        size = self.policy.page_size if causal else self.mask_size
        start = positions[0 if causal else -1] // size * size
        prefix = min(start, len(self.k))
        context = self.sparse(q, prefix) if causal else self.reuse(positions, start, prefix, q)
        out = np.zeros(q.shape)
        for t, head in np.ndindex(len(q), HEADS):
            end = positions[t] + 1 if causal else start + size
            own, own_lse = self.attend(q[t], head, np.arange(start, min(end, len(self.k))))
            far, far_lse = context[t][head]
            top = max(own_lse, far_lse)
            near, away = np.exp(own_lse - top), np.exp(far_lse - top)
            out[t, head] = (near * own + away * far) / (near + away)
        return out

    def reuse(self, positions, start, prefix, q):
        """LoSA's attention to the context: remembered, but for the most changed tokens."""
        key = (start, tuple(positions))
        if self.block.get("key") != key:
            self.dense += KV_HEADS * -(-prefix // self.policy.page_size)
            tokens = np.arange(prefix)
            parts = [[self.attend(x, head, tokens) for head in range(HEADS)] for x in q]
            self.block = {"key": key, "q": q.copy(), "parts": parts}
            return parts
        change = ((q - self.block["q"]) ** 2).mean((1, 2))
        active = np.argsort(-change, kind="stable")[: self.policy.active_tokens]
        renewed = self.sparse(q[active], prefix)
        for place, part in zip(active, renewed):
            self.block["parts"][place] = part
        moved = range(len(q)) if self.policy.reference == "last" else active
        for place in moved:
            self.block["q"][place] = q[place]
        return self.block["parts"]

    mask_size = 0
