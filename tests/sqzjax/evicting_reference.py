# SPDX-License-Identifier: Apache-2.0
"""Caches of chosen tokens by their definitions: float64, one kv head at a time, in dictionaries."""

import math
from dataclasses import dataclass, field
from functools import cache

import jax
import numpy as np

from sqzjax.attention import dense
from sqzjax.kvcache import KVCache
from tests.contracts.caches import CacheCase
from tests.contracts.layer import BATCH, HEADS, KV_HEADS, WIDTH, Layer
from tests.tolerances import CHUNKED

GROUP = HEADS // KV_HEADS


@cache
def layer_of(policy: KVCache, length: int = 64, capacity: int = 128) -> Layer:
    """A layer with a stream of tokens, the same at every call."""
    return Layer(CacheCase("", policy, capacity=capacity), length)


@cache
def stepping(layer: Layer):
    """The step of a model's layer, compiled: state, tokens and positions to what is attended."""
    policy = layer.case.policy

    @jax.jit
    def step(state, tokens, positions):
        new, query = layer.new(tokens, positions), layer.query(tokens, positions)

        def attend_new():
            return dense.attend(
                query.q,
                new.k.transpose(0, 2, 1, 3),
                new.v.transpose(0, 2, 1, 3),
                query_positions=query.positions,
                key_positions=new.positions,
                mask=query.mask,
                scale=query.scale,
            )

        return policy.extend(state, new, query, attend_new)

    def run(state, tokens, positions=None):
        tokens = np.broadcast_to(tokens, (BATCH, np.shape(tokens)[-1]))
        return step(state, tokens, tokens if positions is None else positions)

    return run


@cache
def attending(layer: Layer):
    """The compiled `attend` of a layer's policy: state and tokens to what is attended."""
    policy = layer.case.policy
    return jax.jit(lambda state, tokens: policy.attend(state, layer.query(tokens)))


class SumOfProbabilities:
    """H2O's score."""

    def __init__(self, newest):
        self.newest, self.dropped = newest, 1

    def fresh(self):
        return 0.0

    def observed(self, memory, probabilities, position):
        return memory + probabilities.sum()

    def worth(self, memory, age, position):
        return memory


class CountOfUnimportant:
    """Scissorhands' score: how many of the last queries gave less than 1/t."""

    def __init__(self, newest, dropped, history):
        self.newest, self.dropped, self.history = newest, dropped, history

    def fresh(self):
        return ()

    def observed(self, memory, probabilities, position):
        return (*memory, position) if probabilities.mean() < 1 / (position + 1) else memory

    def worth(self, memory, age, position):
        count = sum(query > position - self.history for query in memory)
        return np.float32(-(count + age / (1 + age)))


@dataclass
class Head:
    """One kv head of one sequence: at most `slots` tokens of `k`, `v` `[T, H]`, by position."""

    method: SumOfProbabilities | CountOfUnimportant
    slots: int
    k: np.ndarray
    v: np.ndarray
    held: dict = field(default_factory=dict)

    def attend(self, position, q):
        seen = sorted(p for p in self.held if p <= position)
        weights = np.exp(q @ self.k[seen].T / math.sqrt(WIDTH))
        weights /= weights.sum(-1, keepdims=True)
        for column, p in enumerate(seen):
            self.held[p] = self.method.observed(self.held[p], weights[:, column], position)
        return weights @ self.v[seen]

    def drop(self, number, length, last):
        """Drop some of the tokens that are not among the newest, those of least worth."""
        old = [p for p in self.held if length - 1 - p >= self.method.newest]
        old.sort(key=lambda p: self.method.worth(self.held[p], length - 1 - p, last))
        for p in old[:number]:
            del self.held[p]

    def step(self, positions, q):
        """Take tokens in and return their attention `[T, G, H]`."""
        length = positions[-1] + 1
        if len(positions) == 1 and len(self.held) == self.slots:
            self.drop(self.method.dropped, length, length - 2)
        self.held |= {p: self.method.fresh() for p in positions}
        out = [self.attend(p, one) for p, one in zip(positions, q)]
        self.drop(max(0, len(self.held) - self.slots), length, length - 1)
        return np.stack(out)


def kind(policy):
    """The name of a test's parameter."""
    return policy.kind


def close(actual, expected, tolerance=CHUNKED["float32"]):
    np.testing.assert_allclose(actual, expected, atol=tolerance, rtol=tolerance)


def chunked(end, sizes):
    """Chunks of tokens 0 .. end - 1, of the given sizes, then one by one."""
    start, sizes = 0, list(sizes)
    while start < end:
        size = sizes.pop(0) if sizes else 1
        yield np.arange(start, start + size)
        start += size


def heads_of(layer: Layer, method, slots: int) -> list[list[Head]]:
    """Empty heads `[B][K]` over a layer's stream of tokens."""
    new = layer.new(np.arange(layer.length))
    k, v = np.asarray(new.k, np.float64), np.asarray(new.v, np.float64)
    return [[Head(method, slots, k[b, :, h], v[b, :, h]) for h in range(KV_HEADS)]
            for b in range(BATCH)]  # fmt: skip


def queries_of(layer: Layer) -> np.ndarray:
    """Rotated queries of a layer's stream, `[B, K, T, G, H]`."""
    q = np.asarray(layer.query(np.arange(layer.length)).q, np.float64)
    return np.moveaxis(q.reshape(BATCH, -1, KV_HEADS, GROUP, WIDTH), 2, 1)


def rotated(x: np.ndarray, positions: np.ndarray, theta: float = 10000.0) -> np.ndarray:
    """Rotate vectors `[T, H]` to positions `[T]`."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-np.arange(half) / half)
    first, second = x[:, :half], x[:, half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
